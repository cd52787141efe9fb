"""Finds the command or the option that somebody means who knows other tools' names, or mistypes one of ours.

The names are those of fastai, ultralytics, timm, torchvision's references and scikit-learn.
"""

from collections.abc import Collection
from difflib import get_close_matches

COMMANDS = {
    "fit": "train training finetune fine-tune learn fine_tune",
    "evaluate": "test eval val validate validation score metrics",
    "interpret": "explain gradcam grad-cam cam heatmap heatmaps errors top-losses top_losses plot_top_losses",
    "predict": "infer inference classify detect run",
    "serve": "web app ui gui server api deploy",
    "compare": "diff benchmark",
    "recalibrate": "calibrate adapt",
    "export": "onnx convert",
    "verify": "inspect validate-export",
    "runs": "list ls history experiments models",
    "default": "use pin select",
    "report": "html summary",
    "data check": "check lint audit",
    "data download": "download fetch get",
    "data phantom": "phantom generate demo synthetic",
    "data cache": "cache",
    "--help": "help h",
    "--version": "version v",
}
"""Other tools' names of commands, by ours."""

OPTIONS = {
    "--batch-size": "bs batch b batchsize",
    "--lr": "learning-rate lr0 base-lr lr-max max-lr base-learning-rate",
    "--lr find": "lr-find find-lr lr-finder auto-lr auto-lr-find",
    "--device cuda": "gpu gpus cuda use-gpu use-cuda",
    "--device cpu": "cpu no-cuda no-gpu force-cpu",
    "--device mps": "mps",
    "--size": "imgsz img-size image-size input-size resize img img-sz item-tfms",
    "--arch": "model backbone network architecture arch-name model-name encoder",
    "--weights": "pretrained initial-checkpoint checkpoint ckpt init finetune",
    "--weights none": "no-pretrained from-scratch",
    "--model": "weights export learner ckpt checkpoint run load",
    "--data": "path data-dir data-path dataset folder source input root train-dir dls",
    "--workers": "num-workers n-workers j jobs",
    "--epochs": "epoch n-epoch n-epochs num-epochs max-epochs",
    "--freeze-epochs": "freeze freeze-epoch",
    "--patience": "early-stopping early-stop",
    "--dropout": "drop drop-rate ps",
    "--augment": "aug augmentation batch-tfms aa auto-augment augs transforms",
    "--tta": "augment test-time-augmentation",
    "--schedule": "sched scheduler lr-scheduler cos-lr",
    "--seed": "random-state random-seed",
    "--valid": "val-split valid-pct validation-split val valid-split test-size split",
    "--positive": "pos-label positive-class pos",
    "--class-weights": "class-weight weighted pos-weight",
    "--threshold": "conf thresh cutoff thr",
    "--precision bf16": "amp half bf16 mixed-precision to-fp16",
    "--precision fp16": "fp16",
    "--precision fp32": "fp32 float32",
    "--name": "run-name experiment exp-name",
    "--exports": "project output output-dir out save-dir",
    "--output": "out csv o results-file save save-csv save-dir output-dir exports",
    "--help": "h",
    "--resume": "resume-from continue",
    "--split": "dataset-split subset",
    "--top": "k n n-top num",
    "--class": "label",
    "--heatmaps": "gradcam cam visualize",
}
"""Other tools' names of options, by ours, some with a value."""


def near_command(name: str, known: Collection[str]) -> str | None:
    """Return the command of `known` that `name` means, by meaning before spelling; None if there is none."""
    meant = [ours for ours, others in COMMANDS.items() if name.lower() in others.split()]
    meant += [ours.split()[-1] for ours in meant]  # inside a group its name is left out
    spelled = {ours.split()[-1]: ours for ours in known}
    near = _first(meant, known, name) or _first([], spelled, name)
    return spelled.get(near or "", near)


def near_option(name: str, known: Collection[str]) -> str | None:
    """Return the option of `known` that `name` means, such as `--device cuda` for `--gpu`; None if there is none.

    >>> near_option("--bs", ["--batch-size", "--seed"]), near_option("--sede", ["--size", "--seed"])
    ('--batch-size', '--seed')
    """
    plain = name.lstrip("-").lower().replace("_", "-")
    same = f"--{plain}"
    meant = [ours for ours, others in OPTIONS.items() if plain in others.split()]
    return same if same in known else _first(meant, known, name)


def _first(meant: list[str], known: Collection[str], name: str) -> str | None:
    found = [ours for ours in meant if ours in known or (ours[0] == "-" and ours.split()[0] in known)]
    return next(iter(found or get_close_matches(name, known, n=1, cutoff=0.6)), None)
