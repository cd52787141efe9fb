"""Train a chest X-ray classifier by transfer learning, see where it errs, hand over a model that others can trust.

The names below load on first use, so that the command line answers at once.
"""

__version__ = "0.1.0"
DISCLAIMER = "For research and teaching. It is no medical device; never diagnose by it."
__all__ = [
    "FitConfig", "__version__", "check_data", "evaluate", "fit", "interpret", "load_learner", "predict", "verify",
]  # fmt: skip

_HOMES = {
    "FitConfig": "config",
    "check_data": "data.audit.check",
    "evaluate": "evaluation.evaluate",
    "fit": "training.fit",
    "interpret": "evaluation.interpret",
    "load_learner": "export.reader",
    "predict": "inference.predict",
    "verify": "export.verification",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
