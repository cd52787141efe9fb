"""Prints what a fit chose, where it resumes, and how it ended. (`callbacks.EpochLog` prints the row of each epoch.)"""

import math
from pathlib import Path

from xray_fastai import DISCLAIMER
from xray_fastai.config.choices import FIND
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.classes import only_class, positive_note
from xray_fastai.data.folders import lacks_test
from xray_fastai.data.patients import unknown
from xray_fastai.evaluation.learning_curves import LR_FIND
from xray_fastai.evaluation.subgroups import Group
from xray_fastai.export.run_folder import CHECKPOINT, Reservation, Unfinished, unfinished
from xray_fastai.metrics.table import title_of
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, format_interval
from xray_fastai.training.checkpoint import Saved, kept_settings
from xray_fastai.training.disk_space import folder_size
from xray_fastai.training.pace import FROZEN_SHARE, in_words
from xray_fastai.training.plan import Plan

OF_THE_RUN = ("name", "exports", "device", "workers", "cache", "quiet")
"""The settings that two fits of the same model may have different."""


def announce(plan: Plan, parameters: tuple[int, int]) -> None:
    """Print the data, the network and the settings.

    Args:
        plan: the fit.
        parameters: how many there are, and how many of them train in the frozen phase.
    """
    config, data = plan.config, plan.data
    if data.rehearsal:
        print(
            "REHEARSAL on X-rays that this program draws itself: the model learns nothing about patients.\n"
            "For the real collection (1.2 GB, doi:10.17632/rscbjbr9sj): xray-fastai data download.\n"
            "For your own images, give their folder by --data.\n"
        )
    print(f"data          {data.name}")
    tables = [("training", data.train), *([] if data.has_folds else [("validation", data.valid)])]
    for title, table in tables:
        counts = ", ".join(f"{count:,} {label}" for label, count in table.label.value_counts().sort_index().items())
        of_patients = "" if unknown(table).all() else f" of {count_of(table.patient.nunique(), 'patient')}"
        print(f"{title:<14}{count_of(len(table), 'image')}{of_patients}: {counts}")
    for i, note in enumerate((*data.notes, *data.skipped)):
        print(f"{'validation' if data.has_folds and i == 0 else '':<14}{note}")
    print(f"classes       {', '.join(data.classes)}")
    if note := positive_note(data.classes, config.positive):
        print(f"              {note}")
    total, head = parameters
    if plan.members > 1:
        seeds = f"seeds {config.seed} to {config.seed + plan.members - 1}"
        print(f"members       {plan.members} networks, {seeds}; the export gives the mean of their outputs")
        if data.has_folds:
            print("              each validates on one fold, and trains on the others")
    print(f"network       {config.arch}, {config.size} x {config.size} px, weights {plan.origin.name}")
    each = "" if plan.members == 1 else " of each network"
    print(f"parameters    {head:,} of {total:,}{each} train in the frozen phase, all in the unfrozen")
    if plan.members > 1:  # the joined network has one bias, the mean of theirs
        whole = plan.members * total - (plan.members - 1) * len(data.classes)
        print(f"              {whole:,} in the export")
    loading = "images loaded in the same process"
    if config.workers and plan.cache is None:
        loading = f"{config.workers} loading processes"
    print(f"device        {plan.device_name}, precision {plan.precision}, {loading}")
    print(f"decoded       {plan.cache_note}")
    rate = "searched in each phase" if config.lr == FIND else f"{config.lr:g}"
    contrast = "histogram equalised" if config.contrast == "equalize" else "grey values unchanged"
    print(f"images        {contrast}, augmentation {config.augment}, learning rate {rate}, {config.schedule}")
    weights = plan.class_weights or [1] * len(data.classes)
    listed = ", ".join(f"{label} {weight:.3g}" for label, weight in zip(data.classes, weights, strict=True))
    print(f"loss weights  {listed}")
    if (processes := distributed.world_size()) > 1:
        print(f"processes     {processes}, {plan.batch_size // processes} images each of a batch of {plan.batch_size}")
    if plan.batch_size < config.batch_size:
        print(f"batch size    {plan.batch_size}, all training images, instead of {config.batch_size}")
    as_they_are = ", images not augmented" if plan.frozen_plain and config.augment != "none" else ""
    phases = ", ".join(
        f"{name} (at most {count_of(epochs, 'epoch')}{as_they_are if name == 'frozen' else ''})"
        for name, epochs in plan.phases
    )
    print(f"phases        {phases}")
    by = f", lower by {config.min_delta:g}" if config.min_delta else ""
    print(f"              each ends after {count_of(config.patience, 'epoch')} without a lower validation loss{by}")
    if (limit := config.seconds_allowed) is not None:
        parts = f", {in_words(FROZEN_SHARE * limit)} for the frozen phase" if len(plan.phases) > 1 else ""
        if plan.members > 1:
            parts = ", shared by the networks that are left"
        print(f"time limit    {in_words(limit)} for the whole fit{parts}; the first epoch tells how many fit")
    if not plan.origin.pretrained:
        shown = len(plan.phases) > 1
        what = "only to show it: the head trains on random features" if shown else "skipped: the features are random"
        print(f"frozen phase  {what} without pretrained weights")


def checkpoint_position(plan: Plan, saved: Saved) -> str:
    """Return the last epoch or phase that a checkpoint contains, for people."""
    phase, epoch = saved.state["phase"], saved.state["epoch"]
    return f"{plan.phases[phase][0]} epoch {epoch}" if epoch else f"the {plan.phases[phase - 1][0]} phase"


def report_resume(found: Unfinished, run: Reservation, plan: Plan, saved: dict[int, Saved]) -> None:
    """Print which run is resumed, and from where: of each network, `saved` has the checkpoint."""
    if not saved:
        where = "from the beginning: no epoch was completed"
    elif plan.members == 1:
        where = f"after {checkpoint_position(plan, saved[0])}"
    else:
        done = sum(one.is_done(plan.phases) for one in saved.values())
        where = f"with {done} of {plan.members} networks done"
    renamed = "" if run.name == found.name else f", as {run.name}"
    print(f"resuming      {found.name} {where}{renamed}")


def announce_member(plan: Plan, member: int, members: int, saved: Saved | None) -> None:
    """Print which network of an ensemble trains next.

    Args:
        plan: its own.
        member: its number, from 0 on.
        members: how many there are.
        saved: the checkpoint that it resumes from.
    """
    train, valid = (count_of(len(images), "image") for images in (plan.data.train, plan.data.valid))
    limit = "" if plan.config.seconds_allowed is None else f", {in_words(plan.config.seconds_allowed)}"
    where = f"; resuming after {checkpoint_position(plan, saved)}" if saved else ""
    text = f"{train} to train on, {valid} to validate on, seed {plan.config.seed}{limit}{where}"
    print(f"\nmember {member + 1} of {members}: {text}", flush=True)


def report_smaller_batch(plan: Plan, part: str, before: int, after: int, saved: Saved | None) -> None:
    """Print that memory ran out, the new batch size, and where training resumes.

    Args:
        plan: the fit.
        part: "train" or "valid".
        before: images in a batch that did not fit.
        after: images in a batch from now on.
        saved: the checkpoint that training resumes from, if there is one.
    """
    what = "training" if part == "train" else "validation"
    summed = f", gradients summed over {plan.batch_size} images for each step" if part == "train" else ""
    where = f"after {checkpoint_position(plan, saved)}" if saved else "from the beginning"
    print(
        f"\nout of memory in {what}: batches of {after} instead of {before} images{summed}; resuming {where}",
        flush=True,
    )


HIGH, HIGH_IF_FEW, FEW_STEPS = 5.0, 2.0, 20
"""A found rate may be too high above `HIGH` times the default, which is among the rates that fits were measured with.

An epoch of fewer than `FEW_STEPS` steps is gone through more than five times in the 100 steps of a search, which then
measures how fast the same images are learned by heart. There `HIGH_IF_FEW` times the default is enough.
"""
BY_CHANCE = 0.6
"""A validation AUC below this, after a search, is near that of guessing."""


def report_search(search: dict, default: float, steps: float) -> None:
    """Print the learning rate that a search found for the head; or why it found none, and the rate that is taken.

    Args:
        search: what `lr_find.search` returns.
        default: the rate of the phase by default.
        steps: of an epoch.
    """
    if search["fault"] is not None:
        why = f"none found: {search['fault']} (plot in {LR_FIND})"
        print(f"learning rate  {why}; {search['peak']:g} is taken, the default", flush=True)
        return
    times = search["peak"] / default
    print(f"learning rate  found {search['peak']:g} (valley; plot in {LR_FIND})", flush=True)
    if times > (HIGH_IF_FEW if steps < FEW_STEPS else HIGH):
        few = f", found in epochs of {count_of(math.ceil(steps), 'step')}" if steps < FEW_STEPS else ""
        print(
            f"  it may be too high: {times:.1f} times the default{few}; if the fit ends badly, give --lr {default:g}",
            flush=True,
        )


def name_leftovers(run: Reservation) -> None:
    """Print the unfinished runs in the same folder."""
    for old in unfinished(run.exports):
        if old.path.name.startswith("."):
            resume = f"resume it with '{Reservation(run.exports, old.name).resume_command}', or " if old.usable else ""
            print(f"unfinished    {old}; {resume}delete it")


def name_same(run: Reservation, config: FitConfig) -> None:
    """Print the newest interrupted fit of the same settings, which the user may want to resume instead.

    Args:
        run: of this fit.
        config: with the choices by recipe and data, as a checkpoint keeps it.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in OF_THE_RUN}
    for old in unfinished(run.exports):
        if old.path.name.startswith(".") or not old.usable:
            continue  # `name_leftovers` names it
        try:
            kept = kept_settings(old.checkpoint)["settings"]
        except UserError:
            continue  # damaged, or of another version: it cannot be resumed
        if {name: kept.get(name) for name in settings} == settings:
            command = Reservation(run.exports, old.name).resume_command
            print(f"unfinished    {old} had the same settings and was interrupted; to continue it, {command}")
            return


def _intercepts(model: dict) -> str:
    """Return the intercepts by class, where there are any."""
    if model["intercepts"] is None:
        return ""
    listed = ", ".join(f"{k} {v:.3f}" for k, v in zip(model["classes"], model["intercepts"], strict=True))
    return f", intercepts {listed}"


def conclude(path: Path, model: dict, run: Reservation) -> None:
    """Print how a fit ended.

    Args:
        path: the export.
        model: the content of its `model.json`.
        run: the run's folder and name.
    """
    print()
    if (ensemble := model.get("ensemble")) is not None:
        _conclude_members(model, ensemble)
    else:
        _conclude_phases(model)
    if (name := only_class(model["called"] or {})) is not None:
        print(
            f"WARNING, every validation image is called {name}: no difference was learned; train for more epochs "
            "(--epochs), or give evaluate another --threshold"
        )
    _conclude_search(model)
    if model["worst_group"]:
        roc_auc = ensemble["metrics"]["roc_auc"][0] if ensemble else model["best"]["roc_auc"]
        _conclude_worst(Group(**model["worst_group"]), roc_auc)
    threshold = "" if model["threshold"] is None else f", decision threshold {model['threshold']:.3f}"
    print(f"temperature {model['temperature']:.3f}{_intercepts(model)}{threshold} ({model['calibration']})")
    if (gate := model["gate"]) is not None:
        print(f"gate: images unlike the training images are not called (settled by {gate['images']:,} of them)")
    else:
        whose = " of the first network" if ensemble else ""
        need = f"100 training images of 5 patients{whose}"
        print(f"no gate, which needs {need}: pictures that are no X-rays are called, too")
    print(f"export: {path}")
    print(f"report: {path / 'report.html'}")
    if model["status"] == "interrupted":
        size = folder_size(path / CHECKPOINT) / 1e6
        print(
            f"resume: {run.resume_command} (needs {path / CHECKPOINT}, {size:,.0f} MB; delete that folder if you will "
            "not resume)"
        )
    print(f"next: xray-fastai {'interpret' if lacks_test(model['settings']['data']) else 'evaluate'} {path}")
    print(DISCLAIMER)


def _conclude_search(model: dict) -> None:
    """Print a lower learning rate to try where the fit learned nothing at a rate that was searched."""
    found = [phase["lr"] for phase in model["training"]["phases"] if "lr" in phase]
    ensemble, best = model.get("ensemble"), model["best"]
    roc_auc = ensemble["metrics"]["roc_auc"][0] if ensemble else best and best["roc_auc"]
    if found and roc_auc is not None and roc_auc < BY_CHANCE:
        print(
            f"WARNING, the validation AUC is {roc_auc:.3f}, little better than chance: the learning rate that was "
            f"found, {max(found):g}, may be too high; try a lower one, --lr {max(found) / 10:.1g}"
        )


def _conclude_phases(model: dict) -> None:
    """Print what ended the phases of a fit of one network, and which epoch is exported."""
    phases, best = model["training"]["phases"], model["best"]
    for phase in phases:
        print(
            f"{phase['name']} phase: {count_of(phase['epochs'], 'epoch')}"
            + (f", best epoch {phase['best_epoch']}" if phase["best_epoch"] else "")
            + f"; ended by {phase['end']}"
        )
    if best:
        print(f"{'weights' if model['by_hand'] else 'best weights'}: {_epoch_words(best)}, AUC {best['roc_auc']:.3f}")
        phases_best = [phase["best_epoch"] for phase in phases if phase["name"] == best["phase"]]
        if model["by_hand"]:
            print("  those of the last epoch, as they are")
        elif best["epoch"] not in phases_best:
            print("  the last epoch whose loss is within a standard error of the lowest")
        print("  chosen on these images, so the figures are too good: see evaluate for those of the test images")
    elif model["by_hand"]:
        print("not trained: the weights are those that the learner started with")
    else:
        print("no epoch was completed: the export has the weights at the time of the stop")


def _epoch_words(best: dict) -> str:
    return (
        f"{best['phase']} epoch {best['epoch']}, validation loss {best['valid_loss']:.4f}, "
        f"accuracy {best['accuracy']:.3f}"
    )


def _conclude_members(model: dict, ensemble: dict) -> None:
    """Print which epoch of each network is exported, and what all outputs together show."""
    members, planned = model["training"]["members"], ensemble["planned"]
    for member in members:
        auc = format_interval(*member["roc_auc"])
        end = member["phases"][-1]["end"]
        print(f"member {member['member']} of {planned}: {_epoch_words(member['best'])}, AUC {auc}; ended by {end}")
    if len(members) < planned:
        print(f"{len(members)} of {planned} networks are in the export: the others have no epoch yet")
    print(measured_words(ensemble))
    print(
        "  epochs, calibration and threshold were chosen on these images: evaluate has the figures of the test images"
    )
    if ensemble["weakest"] is not None:
        print(f"WARNING, {ensemble['weakest']} (see curves.png)")


def measured_words(ensemble: dict) -> str:
    """Say what the outputs of several networks show, of the content of `ensemble` in `model.json`."""
    names = ("roc_auc", "balanced_accuracy", "sensitivity", "specificity")
    found = [(title_of(name), ensemble["metrics"].get(name)) for name in names]
    known = [(title, values) for title, values in found if values is not None and values[0] is not None]
    metrics = ", ".join(f"{title} {format_interval(*values)}" for title, values in known)
    what = "out of fold" if ensemble["outputs"] == "out of fold" else "validation, by the mean of all networks"
    of = f"{count_of(ensemble['images'], 'image')} of {count_of(ensemble['patients'], 'patient')}"
    return f"{what}, {of}: {metrics}"


def _conclude_worst(worst: Group, roc_auc: float) -> None:
    """Print the worst group, and whether it is clearly worse than all images, which have this AUC."""
    differs = worst.is_worse_than(roc_auc)
    print(
        f"{'WARNING, ' if differs else ''}worst group: the {worst.name} tenth of each class, "
        f"{worst.images} images: AUC {format_interval(worst.roc_auc, worst.low, worst.high)}"
    )
    print(f"  the least of {worst.groups} groups, so partly by chance: expect {worst.expected:.3f}")
    if differs:
        print("  images taken in another way may do as badly: test on some before you trust the model")
