"""Write what a manuscript needs beside the report: methods and results from the facts, and two checklists.

An item of a checklist is answered from `model.json` and `metrics.json`, or it is open: only the authors know.
"""

import re
from collections.abc import Mapping
from typing import Any

from xray_fastai import DISCLAIMER
from xray_fastai.config.choices import ARCHITECTURES, FIND, TIMM, members_of
from xray_fastai.evaluation.checklists import CLAIM, REFERENCES, TRIPOD, checklist
from xray_fastai.metrics.table import METRICS, title_of
from xray_fastai.system.text import count_of, format_interval

FILE = "statement.md"

AUGMENTED = {
    "max_rotate": "rotation by up to {:g} degrees",
    "max_zoom": "zoom of up to {:g}",
    "max_stretch": "stretch of up to {:g}",
    "max_lighting": "lighting by up to {:g}",
    "max_blur": "blur of up to {:g} of the side",
    "max_noise": "noise of up to {:g} of the range",
}


def statement(model: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return the statement as Markdown.

    Args:
        model: the content of the export's `model.json`.
        summary: the content of `metrics.json`.
    """
    facts = {name: text for name, text in _facts(model, summary).items() if text}
    methods = ("data", "partitions", "disjoint", "preprocessing", "network", "weights", "training", "selection")
    methods += ("calibration", "output", "measures", "intervals", "software")
    results = ("test", "results", "calibrated", "errors", "worst_group", "groups")
    return "\n\n".join(
        [
            f"# Statement on {summary['model']}",
            f"{DISCLAIMER} Written by xray-fastai {model['versions']['xray-fastai']} from what it recorded. Check each "
            "sentence; what only the authors know is open.",
            "## Methods",
            " ".join(facts[name] for name in methods if name in facts),
            "## Results",
            " ".join(facts[name] for name in results if name in facts),
            *checklist("CLAIM 2024", CLAIM, facts),
            *checklist("TRIPOD+AI", TRIPOD, facts),
            "The topics are in our words, and those of CLAIM have no numbers: fill in the official lists.",
            REFERENCES,
        ]
    )


def _facts(model: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str | None]:
    """Return sentences by name; None where nothing was recorded."""
    return {**_on_data(model, summary), **_on_model(model), **_on_results(model, summary)}


def _on_data(model: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str | None]:
    data, settings = model["data"], model["settings"]
    parts = {
        part: f"{count_of(sum(data[key].values()), 'image')} ({_counts(data[key])}) of "
        f"{count_of(data['patients'][key], 'patient')}"
        for part, key in (("training", "train"), ("validation", "valid"))
    }
    seen = summary.get("seen_in_fit")
    same = summary["data"] == data["name"]
    whose = "the data of the fit" if same else "other data than that of the fit"
    overlap = ""
    if summary["split"] == "test" and seen is not None:
        used = sum(seen.values())
        overlap = (
            f" {used:,} of the images were used in the fit." if used else " None of the images was used in the fit."
        )
    if summary["split"] == "valid":
        overlap = " The fit chose epoch, calibration and threshold by these images, so the figures are too good."
    _, _, held_out = (settings.get("valid") or "").partition("group:")
    of_group = f" Validation is the group {held_out}, which was held out." if held_out else ""
    without = summary.get("images_without_patient", 0)
    alone = f" {count_of(without, 'image')} of unknown patients count as a patient each." if without else ""
    unreadable = "were left out" if settings.get("skip_bad") else "stop a fit, so there were none"
    listed = "Images were left out by a list that the authors gave." if settings.get("exclude") else None
    return {
        "data": "The images were drawn by the program from formulas; none shows a patient."
        if data["rehearsal"]
        else f"The images are those of {_folder(data['name'])} (add where and when they were taken).",
        "partitions": _partitions(model, parts) + of_group,
        "disjoint": "Training and validation share no patient and no identical file.",
        "left_out": listed,
        "missing": f"Images that cannot be read {unreadable}.{alone}",
        "test": f"The model was evaluated on the split {summary['split']} of {_folder(summary['data'])}, {whose}: "
        f"{count_of(summary['images'], 'image')} ({_counts(summary['counts'])}) of "
        f"{count_of(summary['patients'], 'patient')}.{overlap}",
    }


def _partitions(model: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """Say what the images were used for, given their counts in words."""
    ensemble = model.get("ensemble")
    if ensemble is not None and ensemble["outputs"] == "out of fold":
        outputs, trained = "all images", members_of(model)
        if trained < ensemble["planned"]:
            outputs = f"the {ensemble['images']:,} images that the {count_of(trained, 'network')} left out"
        return (
            f"{parts['training']} were divided into {ensemble['planned']} folds by patient. Each network was trained "
            f"on all folds but one, which chose its epoch. The outputs of {outputs}, each by the network that was not "
            "trained on it, chose the calibration and the threshold."
        )
    chosen = f"{parts['validation']} chose the epoch, the calibration and the threshold"
    return f"{parts['training']} were trained on; {chosen}."


def _on_model(model: Mapping[str, Any]) -> dict[str, str | None]:
    training, preprocessing = model["training"], model["preprocessing"]
    size = preprocessing["size"]
    equalized = ", histogram equalised" if preprocessing.get("contrast") == "equalize" else ""
    varied = _variation(model)
    phases = " and ".join(f"{count_of(phase['epochs'], 'epoch')} {phase['name']}" for phase in training["phases"])
    weights = model.get("class_weights")
    loss = "cross-entropy"
    if weights:
        pairs = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(model["classes"], weights, strict=True))
        loss += f", weighted by class ({pairs})"
    best = model["best"]
    members, architecture = members_of(model), model["architecture"]
    known = architecture in ARCHITECTURES or architecture.startswith(TIMM)
    author = "" if known else " (of the authors)"
    network, mapping = f"The network is a {architecture}{author}", "it maps"
    if members > 1:
        network, mapping = f"The model is {members} x {architecture}{author}, each", "the mean of their outputs maps"
    return {
        "preprocessing": f"Each whole image was resized to {size} x {size} pixels of grey{equalized}, and normalised "
        "with the mean and the standard deviation of ImageNet.",
        "predictors": "The only predictor is the image; no clinical value goes in.",
        "network": f"{network} with pooling, dropout of {model['dropout']:g} and one linear layer, "
        f"{training['parameters']['total']:,} parameters{'' if members == 1 else ' together'}; {mapping} an image to "
        f"the probabilities of {', '.join(model['classes'])}.",
        "weights": f"Initial weights: {training['weights']}.",
        "training": f"It was trained for {phases}{_hyperparameters(model)}, and with {loss} as loss. {varied}",
        "selection": _selection(model, best),
        "calibration": f"Probabilities and threshold: {model['calibration']}.",
        "ensemble": _on_ensemble(model),
        "imbalance": f"The loss was {loss}." if weights else None,
        "updating": _on_updating(model),
        "output": f"{model['positive']} is called from a probability of {model['threshold']:.4g} on."
        if model["positive"] and model["threshold"] is not None
        else "The most probable class is called.",
        "software": f"Software: {', '.join(f'{name} {version}' for name, version in model['versions'].items())}.",
        "availability": f"The weights have the SHA-256 {model['weights']['sha256']}; all settings are in model.json. "
        "The software is public (add where weights and data are).",
    }


def _on_updating(model: Mapping[str, Any]) -> str | None:
    """Say what `recalibrate` did; None of another export."""
    if (updated := model.get("recalibrated")) is None:
        return None
    day, images, unlabelled = updated["created"][:10], updated["images"], updated.get("unlabelled")
    if not images and unlabelled:
        return f"The model was adapted to another place on {day}, with {count_of(unlabelled, 'image')} without labels."
    return f"The probabilities were fitted to another place on {day}, with {count_of(images, 'image')}."


def _on_ensemble(model: Mapping[str, Any]) -> str:
    members, ensemble = members_of(model), model.get("ensemble")
    if members == 1:
        return "One network, no ensemble."
    text = f"An ensemble of {members} networks, of which the mean output is used."
    if ensemble is None:  # trained further by hand
        return text
    if ensemble["outputs"] == "out of fold":
        return f"{text} Each has another seed and left out another part of the images, by patient."
    return f"{text} Each has another seed; all have the same images."


def _selection(model: Mapping[str, Any], best: Mapping[str, Any] | None) -> str | None:
    """Say which epochs were exported; nothing where none was completed."""
    if members := model["training"].get("members"):
        epochs = ", ".join(f"{m['best']['epoch']} ({m['best']['phase']})" for m in members)
        return f"The weights are those of the epochs {epochs} of the networks, whose validation losses were lowest."
    where = best and f"epoch {best['epoch']} of the {best['phase']} phase"
    return where and f"The weights are those of {where}, whose validation loss was lowest."


def _hyperparameters(model: Mapping[str, Any]) -> str:
    """Return those that are known: an export that was trained by hand has not all."""
    texts = {"batch_size": "batches of {}", "lr": "a peak learning rate of {}", "schedule": "the schedule {}"}
    texts["seed"] = "the seed {}"
    settings = {**model["settings"], "lr": _rates(model)}
    known = [text.format(settings[name]) for name, text in texts.items() if settings.get(name) is not None]
    return f", with {', '.join(known)}" if known else ""


def _rates(model: Mapping[str, Any]) -> str | None:
    """Return the peak learning rate that was given, or those that a search found for the phases."""
    given = model["settings"].get("lr")
    if given != FIND:
        return given and f"{given:g}"
    phases = [phase for phase in model["training"]["phases"] if phase.get("lr") is not None]
    found = " and ".join(f"{phase['lr']:g} ({phase['name']})" for phase in phases)
    return f"{found}, by a learning rate range test" if found else None


def _variation(model: Mapping[str, Any]) -> str:
    """Say how training images were varied; an export of 0.1.0 has the name of its augmentation only."""
    values, settings = model.get("augmentation"), model["settings"]
    if values is None:
        return f"Augmentation of training images: {settings['augment']}."
    changes = [text.format(values[key]) for key, text in AUGMENTED.items() if values.get(key) not in (None, 0, 1)]
    if not changes:
        return "Training images were not varied."
    # an ensemble's phases are those of its networks, as in "frozen, member 1"; by hand, fastai's methods train
    frozen = any(phase["name"].startswith("frozen") for phase in model["training"]["phases"])
    frozen = frozen and not model.get("by_hand")
    but = ", but not in the frozen phase" if frozen and settings.get("frozen_views") == 1 else ""
    return f"Training images were varied by {', '.join(changes)}{but}."


def _on_results(model: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str | None]:
    chosen = summary["operating_points"]["chosen"]
    found = {**chosen["metrics"], **summary["metrics"]}

    def values(*names: str) -> str:
        known = [name for name in names if found.get(name) and found[name]["value"] is not None]
        return "; ".join(f"{title_of(name)} {format_interval(**found[name])}" for name in known)

    at = (
        "with the most probable class called"
        if chosen["threshold"] is None
        else f"at the threshold {chosen['threshold']:.4g}"
    )
    intervals = f"{summary['intervals'].rstrip('.')}."
    measures = ", ".join(METRICS[name].title for name in found if name in METRICS)
    rows = chosen["confusion"]
    wrong = [
        f"{rows[i][j]} of {sum(rows[i])} {true} called {called}"
        for i, true in enumerate(summary["counts"])
        for j, called in enumerate(summary["counts"])
        if i != j and sum(rows[i])
    ]
    calibration = values("calibration_slope", "calibration_intercept", "calibration_in_the_large", "brier_score")
    worst = summary.get("worst_group")
    return {
        "measures": f"Measures: {measures}.",
        "intervals": f"{intervals} Shares have Wilson's interval with the effective number of images, other "
        "metrics Student's t with the variance between patients.",
        "analysis": f"Probabilities and threshold: {model['calibration']}. Measures: {measures}. {intervals}",
        "results": f"Results {at}, with 95 % intervals: "
        f"{values('roc_auc', 'average_precision', 'sensitivity', 'specificity', 'ppv', 'npv', 'accuracy')}.",
        "calibrated": f"Calibration: {calibration}." if calibration else None,
        "errors": f"Errors {at}: {', '.join(wrong)}.",
        "worst_group": worst
        and f"Of {worst['groups']} groups of unusual images (brightness, contrast, sharpness, shape), the "
        f"{worst['name']} had the lowest AUC, {format_interval(worst['roc_auc'], worst['low'], worst['high'])}, with "
        "an interval that allows for all groups.",
        "groups": _on_groups(summary.get("groups") or []),
    }


def _on_groups(columns: list[dict[str, Any]]) -> str | None:
    """Return the gaps of each column, a sentence each; None without columns."""
    sentences = []
    for column in columns:
        for gap in column["gaps"]:
            interval = format_interval(gap["difference"], gap["low"], gap["high"])
            sentences.append(
                f"By {column['column']}, the {title_of(gap['metric'])} of {gap['best']} exceeds that of "
                f"{gap['worst']} by {interval}, the largest difference between {gap['groups']} groups."
            )
        if not column["gaps"]:
            why = "the groups are too small for a comparison" if len(column["groups"]) > 1 else "there is one group"
            sentences.append(f"By {column['column']}, {why}.")
    return " ".join(sentences) or None


def _folder(name: str) -> str:
    """Return the name of a data set without the folders above it, which say nothing to a reader."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
