"""Writes the export of a fit; `model.json` records what is needed to rebuild the model and to trust it."""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path, PurePath
from typing import Any

import cloudpickle
import pandas as pd
import torch
from fastai.vision.all import Learner
from safetensors.torch import save

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.config.choices import TIMM
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.dataset import Collection
from xray_fastai.data.image_keys import contents_of, file_key
from xray_fastai.data.patients import images_by_source, unknown
from xray_fastai.evaluation.learning_curves import LR_FIND, kept_epochs, plot_batch, plot_curves, plot_searches
from xray_fastai.evaluation.report import write_report
from xray_fastai.export.layout import FORMAT, HISTORY_COLUMNS, OUT_OF_FOLD, PICKLE, SETTINGS, WEIGHTS
from xray_fastai.export.run_folder import LOG, Reservation
from xray_fastai.export.weights_file import FACTS, facts_hash
from xray_fastai.model.learner import set_scaling
from xray_fastai.system.errors import ImageError, UserError, is_write_error, reason
from xray_fastai.system.files import sha256
from xray_fastai.system.text import data_uri, format_number
from xray_fastai.training.calibration import Calibration
from xray_fastai.training.judgement import Judgement, Outputs, gate_of, judge, positive_of
from xray_fastai.training.loop import Trainer
from xray_fastai.training.messages import conclude
from xray_fastai.training.plan import Plan
from xray_fastai.training.provenance import LIBRARIES

CURVES = "curves.png"


class AnySystem:
    """Stands for the module that `learn.export` pickles with: cloudpickle, fastai's own choice, but for paths.

    A `PosixPath` in a pickle cannot be opened on Windows, nor a `WindowsPath` elsewhere. So each path is pickled as a
    call of `Path`.
    """

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            return (Path, obj.parts) if isinstance(obj, PurePath) else super().reducer_override(obj)


@dataclass(frozen=True)
class Outcome:
    """Holds what training came to, before anything is chosen on the validation images."""

    status: str  # complete, interrupted or diverged
    history: list[dict]  # one row an epoch
    best: dict | None  # the row of the exported epoch
    phases: list[dict]  # as in `model.json`
    seconds: float
    parameters: tuple[int, int]  # all, and those that train in the frozen phase
    by_hand: bool = False  # whether `fit` did not train it
    searches: list[dict] = field(default_factory=list)  # of the learning rate, as in `state.Progress`


def model_record(plan: Plan, outcome: Outcome, judgement: Judgement) -> dict[str, Any]:
    """Return the content of `model.json`, except what `write_export` adds."""
    calibration, ensemble, best = judgement.calibration, judgement.ensemble, outcome.best
    total, in_frozen_phase = outcome.parameters
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": outcome.status,
        "disclaimer": DISCLAIMER,
        **plan.record(),
        "temperature": calibration.scaling.temperature,
        "intercepts": calibration.scaling.intercepts,
        "prior": judgement.prior,
        "threshold": calibration.threshold,
        "calibration": calibration.note,
        "calibrated": calibration.scaling.kind != "none",
        "calibration_kind": calibration.scaling.kind,
        "data": _summary(plan.data),
        "training": {
            "device": plan.device_name,
            "precision": plan.precision,
            "weights": plan.origin.name,
            "parameters": {"total": total, "frozen_phase": in_frozen_phase},
            "seconds": round(outcome.seconds, 1),
            "phases": outcome.phases,
            **({} if ensemble is None else {"members": ensemble.members}),
        },
        **({} if ensemble is None else {"ensemble": ensemble.record}),
        "best": best and {name: best[name] for name in HISTORY_COLUMNS},
        "worst_group": None if judgement.worst is None else asdict(judgement.worst),
        "called": judgement.called,
        "gate": judgement.gate and judgement.gate.numbers(),
        "scores": judgement.scores,
        "by_hand": outcome.by_hand,
        "versions": _versions(plan.config.arch),
    }


def _versions(arch: str) -> dict[str, str]:
    """Return the versions of this package, Python and the libraries; that of timm where the network is timm's."""
    libraries = (*LIBRARIES, "timm") if arch.startswith(TIMM) else LIBRARIES
    own = {"xray-fastai": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in libraries}


def phase_records(
    history: list[dict], phases: list[tuple[str, int]], ends: list[str], searches: Sequence[dict] = ()
) -> list[dict]:
    """Return `training.phases` of `model.json`; `lr` is the peak rate of the head where it was searched."""
    phases_trained = []
    for (name, _), end in zip(phases, ends, strict=False):
        rows = [row for row in history if row["phase"] == name]
        best = min(rows, key=lambda row: row["valid_loss"])["epoch"] if rows else None
        phases_trained.append({"name": name, "epochs": len(rows), "best_epoch": best, "end": end})
        if (search := next((search for search in searches if search["phase"] == name), None)) is not None:
            phases_trained[-1]["lr"] = search["peak"]
    return phases_trained


def _summary(data: Collection) -> dict:
    """Return what `model.json` records about the images."""
    return {
        "name": data.name,
        "rehearsal": data.rehearsal,
        "train": data.train.label.value_counts().sort_index().to_dict(),
        "valid": data.valid.label.value_counts().sort_index().to_dict(),
        "patients": {
            "train": int(data.train.patient.nunique()),
            "valid": int(data.valid.patient.nunique()),
            "images_without": int(unknown(data.table).sum()),
            "known_by": images_by_source(data.table),  # images by what names their patient
        },
        "notes": data.notes,
        "valid_files": sorted(file_key(file) for file in data.valid.file),
        "contents": contents_of(data),
    }


def write_export(
    run: Reservation, learn: Learner, model: dict[str, Any], outcome: Outcome, judgement: Judgement
) -> Path:
    """Write all files of an export, then rename the folder to its final name.

    Args:
        run: from `run_folder.reserve`.
        learn: on any device; it is moved to the CPU.
        model: the content of `model.json`; format and weights are added here.
        outcome: what training came to.
        judgement: the tensors of its gate stand beside the network's, and the predictions of an ensemble in a file of
            their own; `model` has the other numbers.

    Returns:
        The export's folder.

    Raises:
        UserError: the disk is full or the folder is not writable; the files are deleted, a checkpoint is kept.
    """
    folder, gate, ensemble = run.partial, judgement.gate, judgement.ensemble
    try:
        _move_to_cpu(learn)
        state = {name: tensor.detach().contiguous() for name, tensor in learn.model.state_dict().items()}
        state |= {name: torch.from_numpy(tensor) for name, tensor in (gate.tensors() if gate else {}).items()}
        # `save_file` would make the file readable by its owner only
        (folder / WEIGHTS).write_bytes(
            save(state, metadata={FACTS: facts_hash(model)})
        )  # one key: safetensors writes several in any order
        weights = {"file": WEIGHTS, "sha256": sha256(folder / WEIGHTS), "tensors": len(state)}
        text = json.dumps({"format": FORMAT, **model, "weights": weights}, indent=2, allow_nan=False)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
        pd.DataFrame(outcome.history).to_csv(folder / "history.csv", index=False)
        if ensemble is not None and ensemble.predictions is not None:
            ensemble.predictions.to_csv(folder / OUT_OF_FOLD, index=False)
        plot_curves(outcome.history, folder / CURVES, kept_epochs(model))
        if outcome.searches:
            plot_searches(outcome.searches, folder / LR_FIND)
        with contextlib.suppress(ImageError):  # the images may have been deleted; the export is written without them
            images, targets = learn.dls.one_batch()
            plot_batch(images, [learn.dls.vocab[i] for i in targets], folder / "batch.png")
        write_report(folder, name=run.final.name)
        learn.export(folder.resolve() / PICKLE, pickle_module=AnySystem)
        for file in filter(Path.is_file, folder.iterdir()):
            with file.open("rb+") as stream:  # Windows writes no file to the disk that is open for reading only
                os.fsync(stream.fileno())
        return run.publish(keep_checkpoint=model["status"] == "interrupted")
    except Exception as error:
        with contextlib.suppress(OSError):  # checkpoint and log are kept
            for file in filter(Path.is_file, folder.iterdir()):
                if file.name != LOG:
                    file.unlink()
        # the report's own message is for an export that was given, not for one that is being written
        cause = (error.__context__ or error) if isinstance(error, UserError) else error
        if not is_write_error(cause):
            raise cause from None
        raise UserError(
            f"{run.final}: the export could not be written ({reason(cause)}); "
            "free space, or check that the folder exists and is writable"
        ) from None


def _move_to_cpu(learn: Learner) -> None:
    """Move all tensors that `learner.pkl` will hold; `learn.export` leaves out the optimizer and the last batch."""
    learn.model.to("cpu", memory_format=torch.contiguous_format)
    learn.dls.to("cpu")
    learn.loss_func.to("cpu")
    learn.loss_grad = learn.smooth_loss = None  # the last batch's
    for metric in (*learn.metrics, learn.recorder.loss, learn.recorder.smooth_loss):
        metric.reset()  # sums of the last epoch


SHOWN = {"phase": "phase", "epoch": "epoch", "valid_loss": "validation loss", "accuracy": "accuracy", "roc_auc": "AUC"}
"""The columns of the history that a notebook shows of the exported epoch, with their titles."""


@dataclass
class Result:
    """Holds the result of a fit. A notebook shows the exported epoch and the learning curves."""

    path: Path  # the export
    status: str  # complete, interrupted or diverged
    history: list[dict] = field(repr=False)
    config: FitConfig = field(repr=False)
    signal: int | None = None  # the signal that interrupted it
    error: str | None = None  # why it diverged, or None
    best: dict | None = field(default=None, repr=False)  # the row of the history whose weights were exported
    lr: float | None = None  # the peak learning rate of the last phase, given or found
    measured: str | None = field(default=None, repr=False)  # what all outputs of several networks show, in words

    def _repr_html_(self) -> str:
        facts = {"export": str(self.path), "fit": self.status if self.error is None else f"{self.status}: {self.error}"}
        if self.best is not None:
            values = {title: format_number(self.best[key]) for key, title in SHOWN.items()}
            facts["best weights"] = ", ".join(f"{title} {value}" for title, value in values.items())
            facts[""] = "chosen on the validation images, so these figures are too good: see evaluate"
        if self.measured is not None:
            facts["networks"] = self.measured
        rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts.items())
        picture = ""
        if (self.path / CURVES).is_file():
            uri = data_uri((self.path / CURVES).read_bytes(), "image/png")
            picture = f'<img src="{uri}" alt="losses and metrics by epoch" style="max-width: 100%">'
        return f"<p>{DISCLAIMER}</p><dl>{rows}</dl>{picture}"


class FitInterrupted(KeyboardInterrupt):
    """Says that Ctrl-C, SIGTERM or an interrupt of the kernel ended a fit, after its export was written.

    So "run all cells" ends there. In a notebook, `sys.last_value.result` is the result.
    """

    def __init__(self, result: Result):
        kept = "the best weights so far were exported" if result.history else "no epoch was completed"
        super().__init__(f"{kept}: {result.path}; to continue, fit(resume={str(result.path)!r})")
        self.result = result


def export_learner(trainer: Trainer, run: Reservation) -> Result:
    """Calibrate the trained model, write its export, and print how the fit ended.

    Raises:
        UserError: the loss was not finite before the first epoch ended, or the export cannot be written.
    """
    plan, best, progress = trainer.plan, trainer.best, trainer.progress
    if trainer.error and best.row is None:
        raise UserError(
            f"{trainer.error}; no epoch was completed, so nothing is exported; try a lower lr= than {trainer.lr:g}"
        )
    judgement = Judgement(Calibration(threshold=None if positive_of(plan.data) is None else 0.5))
    if best.row is not None:
        outputs = Outputs(plan.data.valid, best.logits.float().cpu().numpy(), best.targets.cpu().numpy())
        judgement = judge(plan, outputs, gate_of(trainer.learn.model, plan))
    received = trainer.stop.received
    outcome = Outcome(
        status="diverged" if trainer.error else "interrupted" if received is not None else "complete",
        history=progress.history,
        best=best.row,
        phases=phase_records(progress.history, plan.phases, progress.ends, progress.searches),
        seconds=progress.elapsed,
        parameters=trainer.parameters,
        searches=progress.searches,
    )
    path = export(trainer.learn, plan, outcome, judgement, run)
    return Result(path, outcome.status, outcome.history, plan.config, received, trainer.error, best.row, lr=trainer.lr)


def export(learn: Learner, plan: Plan, outcome: Outcome, judgement: Judgement, run: Reservation) -> Path:
    """Write an export, print how the fit ended, and return the export's folder.

    Raises:
        UserError: it cannot be written.
    """
    scaling = judgement.calibration.scaling
    set_scaling(learn, scaling.temperature, scaling.intercepts)
    model = model_record(plan, outcome, judgement)
    path = write_export(run, learn, model, outcome, judgement)
    conclude(path, model, run)
    return path
