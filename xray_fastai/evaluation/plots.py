"""Draw the plots of an evaluation: confusion matrix, ROC, precision-recall and decision curve, reliability, scores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from xray_fastai.metrics.decision import THRESHOLDS, decision_curve
from xray_fastai.metrics.intervals import FALSE_POSITIVE_RATES, Curve, Measured
from xray_fastai.metrics.predictive_values import predictive_values
from xray_fastai.metrics.scored import Scored
from xray_fastai.system.text import count_of, format_interval, percent, shorten

FILES = {
    "confusion.png": "Confusion matrix",
    "roc.png": "ROC curve",
    "precision_recall.png": "Precision-recall curve",
    "reliability.png": "Reliability diagram",
    "decision_curve.png": "Decision curve",
    "scores.png": "Distribution of the probabilities by outcome",
    "predictive_values.png": "PPV and NPV by prevalence",
}
"""The files, each with its alternative text; the last one is for two classes only."""

PREVALENCES = (0.001, 0.9)
"""The ends of the axis of prevalences."""
COLOURS = ("#0b6e99", "#c8102e", "#d98200", "#4b8b3b", "#7a4f9a", "#7a8794")


def plot_evaluation(folder: Path, summary: dict[str, Any], scored: Scored, measured: Measured) -> None:
    """Draw all of `FILES`.

    Args:
        folder: to write them into.
        summary: the content of `metrics.json`.
        scored: the images.
        measured: their metrics.
    """
    figures = [
        _confusion(summary),
        _roc(summary, scored, measured),
        _precision_recall(summary, scored, measured),
        _reliability(summary, scored, measured),
        _decision_curve(summary, scored, measured),
        _scores(summary, scored),
    ]
    if scored.positive is not None:
        figures.append(_predictive_values(summary, scored, measured))
    for name, figure in zip(FILES, figures, strict=False):
        figure.savefig(folder / name, dpi=130)


def _confusion(summary: dict[str, Any]) -> Figure:
    chosen = summary["operating_points"]["chosen"]
    names = _names(summary)
    counts = np.array(chosen["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.6 + 0.75 * len(names) if len(names) < 4 else 4 + 0.55 * len(names)
    figure = Figure(figsize=(side, side - 0.3), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.55 else "#222"
        share = f"{shares[row, column]:.1%}" if counts[row].any() else "no image"
        large = 15 if len(names) < 4 else 9
        axes.text(column, row - 0.08, f"{count:,}", ha="center", va="center", color=colour, fontsize=large)
        axes.text(
            column, row + 0.2, share, ha="center", va="center", color=colour, fontsize=10 if len(names) < 4 else 7
        )
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 4 else 45)
    axes.set_yticks(range(len(names)), names, rotation=90 if len(names) < 4 else 0, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    at = "the most probable class" if chosen["threshold"] is None else f"threshold {chosen['threshold']:.4g}"
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class", labelpad=8)
    _title(axes, f"Confusion at {at}" if chosen["threshold"] is not None else f"Confusion, {at}", summary)
    return figure


def _roc(summary: dict[str, Any], scored: Scored, measured: Measured) -> Figure:
    figure, axes = _square(measured)
    axes.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1)
    for curve, style, name in _curves(summary, scored, measured):
        false_positive_rate, sensitivity, _ = roc_curve(curve.positives, curve.scores, drop_intermediate=True)
        axes.plot(false_positive_rate, sensitivity, **style, label=f"{name or 'AUC'} {format_interval(*curve.auc)}")
        if len(measured.curves) <= len(COLOURS):
            band = None if scored.positive is None else "95 % intervals, pointwise"
            axes.fill_between(
                FALSE_POSITIVE_RATES, *curve.band, color=style["color"], alpha=0.15, linewidth=0, label=band
            )
    for style, metrics in _points(summary, measured):
        axes.plot(1 - metrics["specificity"]["value"], metrics["sensitivity"]["value"], **style)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    _finish(axes, "ROC and its AUC" if scored.positive is None else "ROC", summary, measured, "lower right")
    return figure


def _precision_recall(summary: dict[str, Any], scored: Scored, measured: Measured) -> Figure:
    figure, axes = _square(measured)
    for curve, style, name in _curves(summary, scored, measured):
        precision, recall, _ = precision_recall_curve(curve.positives, curve.scores, drop_intermediate=True)
        # average precision is the area under a step curve: precision cannot be interpolated between two thresholds
        label = f"{name or 'average precision'} {format_interval(*curve.average_precision)}"
        axes.step(recall, precision, where="post", **style, label=label)
        share = curve.positives.mean()
        axes.axhline(share, color=style["color"] if scored.positive is None else "#999", linestyle=":", linewidth=1)
        if scored.positive is not None:
            axes.annotate(
                f"chance: {share:.2f}", (0.01, share), (0, 3), textcoords="offset points", color="#666", fontsize=8
            )
    for style, metrics in _points(summary, measured):
        if metrics["ppv"]["value"] is not None:  # None: no image is predicted positive
            axes.plot(metrics["sensitivity"]["value"], metrics["ppv"]["value"], **style)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    title = "Average precision" if scored.positive is None else "Precision and recall"
    _finish(axes, title, summary, measured, "lower left")
    return figure


def _reliability(summary: dict[str, Any], scored: Scored, measured: Measured) -> Figure:
    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    mean = np.array([of_bin.probability for of_bin in measured.reliability])
    share, low, high = np.array([of_bin.share for of_bin in measured.reliability]).T
    axes.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1, label="perfectly calibrated")
    axes.vlines(mean, low, high, color=COLOURS[0], alpha=0.45, linewidth=2, label="95 % interval of a share")
    images = f"{scored.y_true.size / mean.size:,.0f}" if mean.size > 1 else "all"
    axes.plot(mean, share, "o-", color=COLOURS[0], linewidth=1, label=f"bins of about {images} images")
    counts, edges = np.histogram(scored.confidence[0], bins=20, range=(0, 1))
    below.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=COLOURS[0], alpha=0.75)
    of = "the predicted class" if scored.positive is None else short(summary["positive"])
    axes.set(ylabel="share predicted correctly" if scored.positive is None else f"share that is {of}")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.set(xlabel=f"predicted probability of {of}", ylabel="images")
    for part in (axes, below):
        part.grid(alpha=0.25)
        part.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="none")
    _title(axes, f"Reliability: calibration error {measured.free['expected_calibration_error'].value:.3f}", summary)
    return figure


def _predictive_values(summary: dict[str, Any], scored: Scored, measured: Measured) -> Figure:
    """Draw PPV and NPV at the chosen threshold against the prevalence, from 0.1 % to 90 %."""
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    threshold, prevalence = summary["operating_points"]["chosen"]["threshold"], summary.get("prevalence")
    y_pred = np.where(scored.y_prob[:, scored.positive] >= threshold, scored.positive, 1 - scored.positive)
    share = (scored.y_true == scored.positive).mean()
    limits = [limit for limit in (*PREVALENCES, share, prevalence) if limit and limit < 1]
    shares = np.geomspace(min(limits), max(limits), 201)
    for name, values, colour in zip(
        ("PPV", "NPV"), predictive_values(scored, y_pred, shares), (COLOURS[0], COLOURS[2]), strict=True
    ):
        if not np.isnan(values.value).all():
            axes.plot(shares, values.value, color=colour, linewidth=1.8, label=f"{name}, with its 95 % interval")
            axes.fill_between(shares, values.low, values.high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(share, color="#666", linestyle=":", linewidth=1.2, label=f"these images: {percent(share)}")
    if prevalence is not None:
        axes.axvline(prevalence, color="#c8102e", linewidth=1.2, label=f"prevalence: {percent(prevalence)}")
    axes.set(xscale="log", ylim=(-0.02, 1.02), ylabel="PPV, NPV")
    ticks = [tick for tick in (1e-6, 1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9) if tick >= min(limits)]
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"prevalence of {short(summary['positive'])}, log scale")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _finish(axes, f"Predictive values at threshold {threshold:.4g}", summary, measured, "center left")
    return figure


def _decision_curve(summary: dict[str, Any], scored: Scored, measured: Measured) -> Figure:
    figure = Figure(figsize=(5.4 if len(measured.curves) <= len(COLOURS) else 9.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="#444", linewidth=1.2, label="act on none")
    highest = 0.0
    for curve, style, name in _curves(summary, scored, measured):
        found = decision_curve(scored, curve.label)
        value, low, high = np.array(found.model).T
        highest = max(highest, 1.2 * curve.positives.mean())
        axes.plot(THRESHOLDS, value, **style, label=name or "the model")
        of_all = {"color": "#666" if scored.positive is not None else style["color"], "linewidth": 1, "linestyle": ":"}
        axes.plot(THRESHOLDS, found.all, **of_all, label=None if name else "act on all")
        if scored.positive is not None:
            axes.fill_between(
                THRESHOLDS, low, high, color=style["color"], alpha=0.15, linewidth=0, label="95 % intervals, pointwise"
            )
            chosen = summary["operating_points"]["chosen"]["threshold"]
            axes.axvline(chosen, color="#c8102e", linewidth=1, linestyle="--", label=f"threshold {chosen:.4g}")
    highest = highest or 1.0
    axes.set(xlim=(0, 1), ylim=(-0.25 * highest, 1.08 * highest))
    axes.set(xlabel="threshold probability", ylabel="net benefit, in true positives an image")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _finish(axes, "Net benefit", summary, measured, "best")
    return figure


def _scores(summary: dict[str, Any], scored: Scored) -> Figure:
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    probability, _, outcome = scored.confidence
    if scored.positive is None:
        names, of = ("predicted wrongly", "predicted correctly"), "the predicted class"
    else:
        of = short(summary["positive"])
        names = (next(name for name in _names(summary) if name != of), of)
    for side, name, colour in zip((False, True), names, COLOURS, strict=False):
        within = probability[outcome == side]
        if len(within):
            weights = np.full(len(within), 1 / len(within))
            style = {"bins": 25, "range": (0, 1), "color": colour}
            axes.hist(within, **style, weights=weights, alpha=0.3)
            axes.hist(
                within, **style, weights=weights, histtype="step", linewidth=1.6, label=f"{name}: {len(within):,}"
            )
    chosen = summary["operating_points"]["chosen"]["threshold"]
    if chosen is not None:
        axes.axvline(chosen, color="#444", linewidth=1, linestyle="--", label=f"threshold {chosen:.4g}")
    axes.set(xlim=(-0.02, 1.02), xlabel=f"predicted probability of {of}", ylabel="share of the images of the outcome")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="none")
    _title(axes, "Probabilities by outcome", summary)
    return figure


def _square(measured: Measured) -> tuple[Figure, Axes]:
    """Return axes from 0 to 1, with room beside them for the legend of many curves."""
    figure = Figure(figsize=(5.4 if len(measured.curves) <= len(COLOURS) else 9.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(summary: dict[str, Any], scored: Scored, measured: Measured) -> Iterator[tuple[Curve, dict[str, Any], str]]:
    """Yield each curve that is defined, the style of its line, and its name (empty where there is one curve)."""
    names = _names(summary)
    for i, curve in enumerate(measured.curves):
        if not np.isnan(curve.auc.value):
            dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "linewidth": 1.8}
            yield curve, style, names[curve.label] if scored.positive is None else ""


def _points(summary: dict[str, Any], measured: Measured) -> Iterator[tuple[dict[str, Any], dict[str, dict]]]:
    """Yield the style of each threshold's mark, and the metrics there; nothing where there is no curve."""
    points = summary["operating_points"]
    for name, point in points.items():
        duplicate = name == "0.5" and points["chosen"]["threshold"] == 0.5
        if point["threshold"] is None or duplicate or np.isnan(measured.curves[0].auc.value):
            continue
        style = {"marker": "o", "color": "#c8102e"} if name == "chosen" else {"marker": "s", "color": "#444"}
        label = f"threshold {point['threshold']:.4g}" + (" (chosen)" if name == "chosen" else "")
        line = {"linestyle": "none", "markersize": 8, "fillstyle": "none", "markeredgewidth": 1.8}
        yield {**style, **line, "label": label}, point["metrics"]


def short(name: str) -> str:
    r"""Return a name that fits into a title, with `\$` for `$`, which begins a formula in matplotlib."""
    return shorten(name, 30).replace("$", r"\$")


def _names(summary: dict[str, Any]) -> list[str]:
    return [short(name) for name in summary["counts"]]


def _finish(axes: Axes, title: str, summary: dict[str, Any], measured: Measured, corner: str) -> None:
    if all(np.isnan(curve.auc.value) for curve in measured.curves):
        around = {"facecolor": "white", "edgecolor": "none"}
        axes.text(0.5, 0.5, "undefined: the split has one class only", ha="center", va="center", bbox=around)
    elif len(measured.curves) <= len(COLOURS):
        axes.legend(frameon=False, loc=corner, fontsize=8)
    else:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    positive = summary["positive"]
    subject = "each class against the rest" if positive is None else f"detection of {short(positive)}"
    _title(axes, f"{title}: {subject}", summary)


def _title(axes: Axes, title: str, summary: dict[str, Any]) -> None:
    axes.set_title(title, fontsize=11, loc="left", pad=22)
    source = f"{short(summary['model'])} on {summary['split']}: {count_of(summary['images'], 'image')}"
    if summary.get("images_without_patient") != summary["images"]:
        source += f", {count_of(summary['patients'], 'patient')}"
    source += "" if summary["calibrated"] else "; not calibrated"
    source += "; test-time augmentation" if summary.get("tta") else ""
    axes.annotate(
        source, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8, color="#666"
    )
