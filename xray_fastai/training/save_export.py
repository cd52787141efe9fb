"""Writes an export of a learner that was trained by fastai's own methods: the public function `save_export`."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fastai.vision.all import GatherPredsCallback

from xray_fastai.config.choices import FIND, members_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.layout import HISTORY_COLUMNS
from xray_fastai.export.reader import lineage_of, read
from xray_fastai.export.run_folder import reserve
from xray_fastai.model.architectures import on_start
from xray_fastai.model.learner import build_learner, parameter_counts, set_scaling
from xray_fastai.model.loaders import XrayDataLoaders
from xray_fastai.model.xray_learner import About, XrayLearner
from xray_fastai.system.errors import UserError
from xray_fastai.training.callbacks import OWN_METRICS
from xray_fastai.training.dataloaders import about_of, dataloaders
from xray_fastai.training.judgement import Outputs, gate_of, judge
from xray_fastai.training.origin import Origin
from xray_fastai.training.plan import Plan
from xray_fastai.training.write_export import Outcome, export, phase_records

OF_THE_MODEL = ("arch", "dropout", "size", "contrast", "weights", "calibration", "target_sensitivity", "lr")
"""The settings that come from the learner; the others are those of its loaders."""


def save_export(learn: XrayLearner, folder: str | Path, *, data: str | Path | None = None) -> Path:
    """Write an export of a learner that was trained by fastai's own methods; every command takes it.

    Calibration and threshold are chosen anew, on the validation images of `learn.dls`, and the learner gets them.
    `history.csv` has its epochs since it was made or opened. `model.json` says that it was trained by hand, and
    `lineage` names the export that it continues from.

    Args:
        learn: a learner of `open_learner` or `learner`.
        folder: the new export, such as exports/second_hospital.
        data: the folder of the images, where `learn.dls` was not made by `dataloaders`.

    Returns:
        The export's folder.

    Raises:
        UserError: the folder exists or cannot be written to, the images are not known, the network was replaced, or
            has weights that are not finite.

    Examples:
        >>> learn = open_learner("exports/rehearsal")
        >>> learn.dls = dataloaders("chest_xray", learn, valid="0.25", batch_size=8)
        >>> path = save_export(learn, "exports/mine")
        >>> verify(path).ok
        True
    """
    about, folder = about_of(learn), Path(os.path.expanduser(folder))
    FitConfig(name=folder.name)  # a wrong name is found before the images are read
    dls = learn.dls if data is None else dataloaders(data, learn)
    if getattr(dls, "plan", None) is None:
        raise UserError(
            "learn.dls was not made by xray_fastai.dataloaders; give the folder of the images", option="data"
        )
    plan = _plan(learn, about, dls.plan, folder)
    device, copied = dls.device, _copied(learn, dls, plan)
    logits, targets, measured = _validated(copied)
    outcome = _outcome(learn, copied, measured)
    judgement = judge(plan, Outputs(plan.data.valid, logits, targets), gate_of(copied.model, plan))
    try:
        with reserve(folder.parent, folder.name) as run:
            path = export(copied, plan, outcome, judgement, run)
    finally:
        dls.to(device)  # the export has everything on the CPU
    set_scaling(learn, judgement.calibration.scaling.temperature, judgement.calibration.scaling.intercepts)
    learn.xray = About(read(path), os.fspath(path))
    return path


def _plan(learn: XrayLearner, about: About, plan: Plan, folder: Path) -> Plan:
    """Return the plan of the loaders, with what the learner itself settled."""
    model, preprocessing = about.settings, about.settings["preprocessing"]
    settings = model["settings"] | {
        "arch": model["architecture"],
        "dropout": model["dropout"],
        "size": preprocessing["size"],
        "contrast": preprocessing.get("contrast", "none"),
        "weights": about.path or model["settings"]["weights"],
    }
    given = {name: settings[name] for name in OF_THE_MODEL if settings.get(name) is not None}
    if given.get("lr") == FIND:  # of the parent's fit; here no rate was searched
        given["lr"] = None
    if about.path is None:
        origin = Origin(model["training"]["weights"], False, model["lineage"])
    else:
        parent = Path(about.path)
        origin = Origin(f"of the export {parent.resolve().name}", True, lineage_of(parent, model))
    weight = learn.loss_func.func.weight if hasattr(learn.loss_func, "func") else None
    members = members_of(model)
    return replace(
        plan,
        config=replace(plan.config, **given, members=members, exports=os.fspath(folder.parent), name=folder.name),
        members=members,
        class_weights=None if weight is None else weight.tolist(),
        origin=origin,
        precision="fp32",
    )


def _copied(learn: XrayLearner, dls: XrayDataLoaders, plan: Plan) -> XrayLearner:
    """Return a learner of the package's own parts with the weights of `learn`, whose callbacks and metrics stay out.

    Raises:
        UserError: the network is another one, or has weights that are not finite.
    """
    state = {name: tensor.detach().cpu() for name, tensor in learn.model.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError("its weights are not finite; train it with a lower rate", option="learn")
    with on_start(learn.arch):
        copied = build_learner(
            dls, learn.arch, dropout=plan.config.dropout, class_weights=plan.class_weights, size=plan.config.size,
            members=plan.members,
        )  # fmt: skip
    if next(copied.model.parameters()).is_meta:
        copied.model.to_empty(device="cpu")
    try:
        copied.model.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"its network is not the {learn.arch} that it was made with", option="learn") from None
    return copied


def _validated(copied: XrayLearner) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Return the outputs on the validation images (N, classes), their classes (N,), and the columns of the history."""
    gathered = GatherPredsCallback()
    with copied.no_bar():
        values = copied.validate(cbs=gathered)
    logits, targets = (part.float().cpu().numpy() for part in gathered.all_tensors()[:2])
    return logits, targets.astype(int), dict(zip(("valid_loss", *OWN_METRICS), map(float, values), strict=True))


def _outcome(learn: XrayLearner, copied: XrayLearner, measured: dict[str, float]) -> Outcome:
    """Return what the training came to.

    Args:
        learn: the user's.
        copied: of the package's own parts.
        measured: columns of the history, of the weights as they are.
    """
    history = [dict.fromkeys(HISTORY_COLUMNS, math.nan) | row for row in learn.recorder.history]
    names = list(dict.fromkeys(row["phase"] for row in history))
    return Outcome(
        status="complete",
        history=history,
        best=_exported(history, measured),
        phases=phase_records(history, [(name, 0) for name in names], ["hand"] * len(names)),
        seconds=0.0,
        parameters=(parameter_counts(copied)[0], sum(p.numel() for p in copied.model[1].parameters())),
        by_hand=True,
    )


def _exported(history: list[dict], measured: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the epoch whose weights are exported, with what was measured; None if none was trained.

    A callback such as `SaveModelCallback` may have restored those of an earlier epoch than the last.
    """
    if not history:
        return None
    distances = [abs(row["valid_loss"] - measured["valid_loss"]) for row in history]
    nearest = int(np.nanargmin([*distances[:-1], np.nan_to_num(distances[-1], nan=0.0)]))
    return history[nearest] | measured
