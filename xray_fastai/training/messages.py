"""What a fit says on the terminal, but for its rows: what it found and chose, where it goes on, and how it ended."""

from pathlib import Path

from xray_fastai import DISCLAIMER
from xray_fastai.evaluation.subgroups import Group
from xray_fastai.export.run_folder import CHECKPOINT, Reservation, Unfinished, unfinished
from xray_fastai.system import distributed
from xray_fastai.system.text import format_interval
from xray_fastai.training.checkpoint import Saved
from xray_fastai.training.plan import Plan


def announce(plan: Plan) -> None:
    """Say what will be trained, on what."""
    config, data = plan.config, plan.data
    if data.rehearsal:
        print(
            "REHEARSAL on X-rays that this program draws itself: the model will know nothing of patients.\n"
            "For the real collection (1.2 GB, doi:10.17632/rscbjbr9sj): xray-fastai data download;\n"
            "for images of your own, give their folder by --data.\n"
        )
    print(f"data          {data.name}")
    for title, table in [("training", data.train), ("validation", data.valid)]:
        counts = ", ".join(f"{count:,} {label}" for label, count in table.label.value_counts().sort_index().items())
        print(f"{title:<14}{len(table):,} images of {table.patient.nunique():,} patients: {counts}")
    for note in (*data.notes, *data.skipped):
        print(f"              {note}")
    print(f"classes       {', '.join(data.classes)}" + (f"; to detect: {data.positive}" if data.positive else ""))
    total, head = plan.parameters
    print(f"network       {config.arch}, {config.size} x {config.size} px, weights {plan.origin}")
    print(f"parameters    {head:,} of {total:,} train in the frozen phase, all in the unfrozen")
    loading = f"{config.workers} loading processes" if config.workers else "images loaded in the same process"
    print(f"device        {plan.device_name}, precision {plan.precision}, {loading}")
    print(f"decoded       {plan.cache_note}")
    seen = "histogram equalised" if config.contrast == "equalize" else "grey values as they are"
    print(f"images        {seen}, augmentation {config.augment}, learning rate {config.lr:g}, {config.schedule}")
    weights = plan.class_weights or [1] * len(data.classes)
    weighed = ", ".join(f"{label} {weight:.3g}" for label, weight in zip(data.classes, weights, strict=True))
    print(f"loss weights  {weighed}")
    if (processes := distributed.world_size()) > 1:
        print(f"processes     {processes}, {plan.batch_size // processes} images each of a batch of {plan.batch_size}")
    if plan.batch_size < config.batch_size:
        print(f"batch size    {plan.batch_size}, all training images, instead of {config.batch_size}")
    if not plan.fine_tunes:
        print("frozen phase  skipped: without pretrained weights the backbone's features are random")


def place(plan: Plan, saved: Saved) -> str:
    """Where a checkpoint is, for people."""
    phase, epoch = saved.state["phase"], saved.state["epoch"]
    return f"{plan.phases[phase][0]} epoch {epoch}" if epoch else f"the {plan.phases[phase - 1][0]} phase"


def say_where(found: Unfinished, run: Reservation, plan: Plan, saved: Saved | None) -> None:
    """Say what is gone on with, from where."""
    where = f"after {place(plan, saved)}" if saved else "from the beginning: no epoch had been completed"
    renamed = "" if run.name == found.name else f", as {run.name}"
    print(f"going on      with {found.name} {where}{renamed}")


def name_leftovers(run: Reservation) -> None:
    """Name what crashed fits left in the same folder."""
    for old in unfinished(run.exports):
        if old.path.name.startswith("."):
            way = f"go on with it by '{Reservation(run.exports, old.name).resume_command}', or " if old.usable else ""
            print(f"unfinished    {old}; {way}delete it")


def conclude(path: Path, model: dict, run: Reservation) -> None:
    """Say how a fit ended; `model` is its `model.json`."""

    print()
    for phase in model["training"]["phases"]:
        epochs = f"{phase['epochs']} epoch{'' if phase['epochs'] == 1 else 's'}"
        print(f"{phase['name']} phase: {epochs}, the best {phase['best_epoch']}; ended by {phase['end']}")
    if best := model["best"]:
        print(
            f"best weights: {best['phase']} epoch {best['epoch']}, validation loss {best['valid_loss']:.4f}, "
            f"accuracy {best['accuracy']:.3f}, AUC {best['roc_auc']:.3f}"
        )
        if best["epoch"] not in [p["best_epoch"] for p in model["training"]["phases"] if p["name"] == best["phase"]]:
            print("  the last epoch whose loss is within a standard error of the lowest")
    else:
        print("no epoch was completed: the weights are those of the moment")
    if model["worst_group"]:
        worst = Group(**model["worst_group"])
        share = f"the {worst.name} tenth of each class, {worst.images} images"
        parted = worst.is_worse_than(best["roc_auc"])
        print(
            f"{'WARNING, ' if parted else ''}worst group: {share}: AUC "
            + format_interval(worst.roc_auc, worst.low, worst.high)
        )
        if parted:
            print("  images that were taken differently may fare as badly: test on some before you trust the model")
    threshold = "" if model["threshold"] is None else f", decision threshold {model['threshold']:.3f}"
    print(f"temperature {model['temperature']:.3f}{threshold} ({model['calibration']})")
    print(f"export: {path}")
    print(f"report: {path / 'report.html'}")
    if model["status"] == "interrupted":
        size = sum(file.stat().st_size for file in (path / CHECKPOINT).iterdir()) / 1e6
        print(f"go on:  {run.resume_command} (that needs {path / CHECKPOINT}, {size:,.0f} MB; delete it otherwise)")
    print(f"next: xray-fastai evaluate --model {path}\n      xray-fastai interpret --model {path}")
    print(DISCLAIMER)
