"""Draw a comparison of two models: both ROC curves, and the differences with their intervals as a forest plot."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from xray_fastai.evaluation.plots import COLOURS, short
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS, title_of
from xray_fastai.system.text import count_of

_BETWEEN_0_AND_1 = ("share", "unit", "curve")
"""The scales of the metrics whose differences fit on one axis."""


def plot_comparison(file: Path, summary: dict[str, Any], a: Scored, b: Scored) -> None:
    """Draw the picture.

    Args:
        file: to write.
        summary: the content of `comparison.json`.
        a: the images as the first model scored them.
        b: the same of the second.
    """
    comparison_figure(summary, a, b).savefig(file, dpi=130)


def comparison_figure(summary: dict[str, Any], a: Scored, b: Scored) -> Figure:
    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _curves(left, summary, {"a": a, "b": b})
    _forest(right, summary["metrics"])
    over = f"{summary['split']}: {count_of(summary['images'], 'image')}, {count_of(summary['patients'], 'patient')}"
    names = " and ".join(f"{key.upper()} {short(summary[key]['model'])}" for key in "ab")
    figure.suptitle(f"{names}, on {over}", fontsize=11, x=0.01, ha="left")
    return figure


def _curves(axes: Axes, summary: dict[str, Any], scored: dict[str, Scored]) -> None:
    axes.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1)
    auc = summary["metrics"]["roc_auc"]
    for i, (key, one) in enumerate(scored.items()):
        for label in one.measured if auc[key] is not None else []:
            rates = roc_curve(one.y_true == label, one.y_prob[:, label])[:2]
            name = f"{key.upper()}: AUC {auc[key]:.3f}" if label == one.measured[0] else None
            axes.plot(*rates, color=COLOURS[i], linestyle="-" if key == "a" else "--", linewidth=1.6, label=name)
        if one.positive is not None and auc[key] is not None:
            point = [summary["metrics"][name][key] for name in ("specificity", "sensitivity")]
            axes.plot(
                1 - point[0], point[1], "o", color=COLOURS[i], fillstyle="none", markersize=8, markeredgewidth=1.8
            )
    if auc["a"] is None:
        axes.text(0.5, 0.5, "undefined: the split has one class only", ha="center", va="center")
    else:
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title("ROC; circles: each at its own threshold", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _forest(axes: Axes, metrics: dict[str, dict[str, Any]]) -> None:
    names = [name for name in metrics if METRICS[name].scale in _BETWEEN_0_AND_1]
    for row, name in enumerate(names):
        metric = metrics[name]
        if metric["difference"] is None:
            continue
        if metric["low"] is not None:
            axes.hlines(row, metric["low"], metric["high"], color="#444", linewidth=2)
        axes.plot(metric["difference"], row, "o", color="#222", markersize=6)
    axes.axvline(0, color="#999", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), [title_of(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("B less A: to the right B is better")
    axes.set_title("Paired differences with 95 % intervals", fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
