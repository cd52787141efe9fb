"""Plots of a fit."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def plot_curves(history: list[dict], path: Path) -> None:
    """Training and validation loss of all phases in one picture, the phase change and the best epochs marked.

    Args:
        history: a row an epoch, with the keys `phase`, `epoch`, `train_loss`, `valid_loss`.
        path: of the PNG.
    """
    table = pd.DataFrame(history, columns=["phase", "epoch", "train_loss", "valid_loss"])
    table["x"] = range(1, len(table) + 1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(table) <= 40 else None
    axes.plot(table.x, table.train_loss, color="#7a8794", marker=marker, markersize=3, label="training loss")
    axes.plot(table.x, table.valid_loss, color="#0b6e99", marker=marker, markersize=3, label="validation loss")
    phases = table.groupby("phase", sort=False)
    for phase, rows in phases:
        best = rows.loc[rows.valid_loss.idxmin()]
        label = f"best {phase} epoch: {best.epoch} ({best.valid_loss:.4f})"
        axes.plot(best.x, best.valid_loss, "o", markersize=10, fillstyle="none", markeredgewidth=1.8,
                  color="#c8102e" if phase == "unfrozen" else "#d98200", label=label)  # fmt: skip
        if rows.x.iloc[0] > 1:
            axes.axvline(rows.x.iloc[0] - 0.5, color="#444", linestyle="--", linewidth=1, label="backbone unfrozen")
    axes.set(xlabel="epoch (both phases)" if len(phases) > 1 else "epoch", ylabel="weighted cross-entropy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(table):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
