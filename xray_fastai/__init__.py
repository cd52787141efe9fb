"""Train a chest X-ray classifier by transfer learning, see where it errs, hand over a model that others can trust.

A public name is imported when it is first used: `import xray_fastai` loads neither torch nor fastai, and `--help`
answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors read these imports; `__getattr__` makes the same ones
    from xray_fastai.config.fit_config import FitConfig
    from xray_fastai.data.audit.check import check_data
    from xray_fastai.evaluation.compare import compare
    from xray_fastai.evaluation.evaluate import evaluate
    from xray_fastai.evaluation.interpret import interpret
    from xray_fastai.export.learner import load_learner, open_learner
    from xray_fastai.export.verification import verify
    from xray_fastai.inference.predict import predict
    from xray_fastai.training.dataloaders import dataloaders, learner
    from xray_fastai.training.fit import fit
    from xray_fastai.training.recalibrate import recalibrate
    from xray_fastai.training.save_export import save_export

__version__ = "0.2.0"
DISCLAIMER = "For research and teaching. It is no medical device; never diagnose by it."
__all__ = [
    "FitConfig", "__version__", "check_data", "compare", "dataloaders", "evaluate", "fit", "interpret", "learner",
    "load_learner", "open_learner", "predict", "recalibrate", "save_export", "verify",
]  # fmt: skip

_MODULES = {
    "FitConfig": "config.fit_config",
    "check_data": "data.audit.check",
    "compare": "evaluation.compare",
    "dataloaders": "training.dataloaders",
    "evaluate": "evaluation.evaluate",
    "fit": "training.fit",
    "interpret": "evaluation.interpret",
    "learner": "training.dataloaders",
    "load_learner": "export.learner",
    "open_learner": "export.learner",
    "predict": "inference.predict",
    "recalibrate": "training.recalibrate",
    "save_export": "training.save_export",
    "verify": "export.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from xray_fastai.system.imports import without_fastais_warning
    from xray_fastai.system.threads import sleep_soon

    sleep_soon()
    with without_fastais_warning():
        module = import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
