"""Draw learning curves, and a batch as the network sees it."""

import math
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from xray_fastai.system.text import format_number

if TYPE_CHECKING:  # `xray-fastai report` draws curves without torch
    from torch import Tensor

FIRST, SECOND, FROZEN, UNFROZEN, GREY = "#7a8794", "#0b6e99", "#d98200", "#c8102e", "#667788"
THEME = {FIRST: "var(--first)", SECOND: "var(--second)", FROZEN: "var(--warn)", UNFROZEN: "var(--bad)"}
THEME |= {GREY: "var(--muted)", "#000000": "currentColor"}
"""The CSS variables that replace the colours of the curves in a report."""
LR_FIND = "lr_find.png"
"""The picture of the searches of the learning rate in an export."""


def kept_epochs(model: dict[str, Any]) -> list[dict]:
    """Return `phase` and `epoch` of the weights in an export, by its `model.json`; of an ensemble `member`, too."""
    if members := model["training"].get("members"):
        return [{"member": member["member"], **member["best"]} for member in members]
    return [model["best"]] if model["best"] else []


def plot_curves(history: list[dict], path: Path, kept: Sequence[dict] = ()) -> None:
    """Draw training and validation loss of all phases, and mark phase change, best epochs and the exported epochs.

    Args:
        history: a row for each epoch, with the keys `phase`, `epoch`, `train_loss`, `valid_loss`; of an ensemble
            `member`, too.
        path: the PNG to write.
        kept: from `kept_epochs`.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _draw_curves(figure.add_subplot(), history, {"train_loss": "training loss", "valid_loss": "validation loss"}, kept)
    figure.savefig(path, dpi=130)


def _draw_curves(axes: Axes, history: list[dict], columns: dict[str, str], kept: Sequence[dict]) -> None:
    """Draw columns of the history under their labels; on `valid_loss` mark the best epochs and the exported one."""
    if history and "member" in history[0]:
        _draw_members(axes, history, columns, kept)
        return
    table = pd.DataFrame(history, columns=["phase", "epoch", *columns])
    table["x"] = range(1, len(table) + 1)
    values = table[list(columns)].apply(pd.to_numeric, errors="coerce").astype(float)
    for (column, label), (colour, style) in zip(columns.items(), [(FIRST, "--"), (SECOND, "-")], strict=False):
        marker = "o" if len(table) <= 40 else None
        axes.plot(table.x, values[column], style, color=colour, marker=marker, markersize=3, label=label)
    phases = table.groupby("phase", sort=False)
    for phase, rows in phases:
        losses = values.loc[rows.index].get("valid_loss", pd.Series(dtype=float)).dropna()
        if len(losses):
            best = losses.idxmin()
            label = f"best {phase}: {rows.epoch[best]} ({losses[best]:.4f})"
            axes.plot(rows.x[best], losses[best], "o", markersize=10, fillstyle="none", markeredgewidth=1.8,
                      color=UNFROZEN if phase == "unfrozen" else FROZEN, label=label)  # fmt: skip
        if rows.x.iloc[0] > 1:
            axes.axvline(rows.x.iloc[0] - 0.5, color=GREY, linestyle=":", linewidth=1.2, label="backbone unfrozen")
    for best in kept if "valid_loss" in columns else ():
        rows = table[(table.phase == best["phase"]) & (table.epoch == best["epoch"])]
        for row in rows[:1].itertuples():
            axes.plot(row.x, values.valid_loss[row.Index], "D", markersize=5, color=UNFROZEN,
                      label=f"weights kept: {row.phase} {row.epoch}")  # fmt: skip
    _finish(axes, values, "valid_loss" in columns, len(phases))
    if len(table):
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, handlelength=1.6)


def _draw_members(axes: Axes, history: list[dict], columns: dict[str, str], kept: Sequence[dict]) -> None:
    """Draw a line of a colour for each network of an ensemble; the first of the columns is dashed."""
    table = pd.DataFrame(history, columns=["member", "phase", "epoch", *columns])
    table["x"] = table.groupby("member").cumcount() + 1
    values = table[list(columns)].apply(pd.to_numeric, errors="coerce").astype(float)
    members = table.groupby("member", sort=False)
    colours = matplotlib.colormaps["tab10" if len(members) <= 10 else "tab20"].colors
    for (member, rows), colour in zip(members, colours, strict=False):
        styles = dict(zip(columns, [("--", 0.8, 0.6), ("-", 1.5, 1.0)], strict=False))
        for column, (style, width, alpha) in styles.items():
            label = f"member {member}" if style == "-" else None
            axes.plot(
                rows.x, values[column][rows.index], style, color=colour, linewidth=width, alpha=alpha, label=label
            )
        for best in kept if "valid_loss" in columns else ():
            is_kept = (rows.member == best["member"]) & (rows.phase == best["phase"]) & (rows.epoch == best["epoch"])
            for row in rows[is_kept][:1].itertuples():
                axes.plot(row.x, values.valid_loss[row.Index], "D", markersize=5, color=colour)
    _finish(axes, values, "valid_loss" in columns, table.phase.nunique())
    dashed, solid = columns.values()
    axes.figure.legend(
        loc="outside upper left", ncols=min(5, len(members)), frameon=False, fontsize=9, handlelength=1.6,
        title=f"dashed {dashed}, solid {solid}" + ("; diamond: weights kept" if "valid_loss" in columns else ""),
        title_fontsize=9, alignment="left",
    )  # fmt: skip


def _finish(axes: Axes, values: pd.DataFrame, of_loss: bool, phases: int) -> None:
    """Label the axes, and cut off the losses of an epoch that diverged.

    Args:
        axes: with the curves.
        values: that are drawn.
        of_loss: whether they are losses.
        phases: how many there are.
    """
    axes.set(xlabel="epoch (both phases)" if phases > 1 else "epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    if of_loss:
        axes.set(ylabel="weighted cross-entropy")
        limit = 5 * values.median(axis=None)  # one diverged epoch would flatten the curve of all others
        cut = values.max(axis=None) > limit > 0
        axes.set_ylim(0, limit if cut else None)
        if cut:
            axes.set(ylabel="weighted cross-entropy\n(higher is cut off)")


def plot_searches(searches: Sequence[dict], path: Path) -> None:
    """Draw the losses of each search of the learning rate against the rate, and mark the rate that was found.

    As in fastai's own plot, the last five batches are left out, in which the loss explodes.

    Args:
        searches: `phase`, `rates`, `losses`, `peak` and `fault` of each, as `training.lr_find.search` returns them; of
            an ensemble also `member`, its number.
        path: the PNG to write.
    """
    phases = list(dict.fromkeys(search["phase"] for search in searches))
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for search in (search for search in searches if search["phase"] == phase):
            _draw_search(axes, search)
        axes.set_title(f"{phase} phase", fontsize=11)
        axes.set(xscale="log", xlabel="learning rate of the head")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="weighted cross-entropy, smoothed")
    figure.savefig(path, dpi=130)


def _draw_search(axes: Axes, search: dict) -> None:
    rates, losses = (np.array(search[name][:-5] or search[name]) for name in ("rates", "losses"))
    whose = f"member {search['member']}: " if "member" in search else ""
    (curve,) = axes.plot(rates, losses, label=search["fault"] and f"{whose}{search['fault']}")
    if search["fault"] is None:
        at = np.abs(np.log(rates / search["peak"])).argmin()
        label = f"{whose}found {search['peak']:g} (valley)"
        axes.plot(rates[at], losses[at], "o", markersize=8, color=curve.get_color(), label=label)


def plot_batch(images: "Tensor", labels: Sequence[str], path: Path, max_images: int = 24) -> None:
    """Draw a grid of images as the network sees them, each above its class.

    From fastai: `x, y = dls.one_batch(); plot_batch(x, [dls.vocab[i] for i in y], path)`.

    Args:
        images: (B, 3, H, W), normalised by ImageNet's statistics, or (B, 1, H, W) from 0 to 1; on any device.
        labels: (B,), the names of their classes.
        path: the PNG to write.
        max_images: how many to draw, from the first on.
    """
    pixels = images[:max_images].detach().float().cpu().numpy()  # (B, 3 or 1, H, W)
    if pixels.shape[1] == 3:
        mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
        pixels = pixels * deviation + mean
    pixels = (np.nan_to_num(pixels.mean(axis=1)).clip(0, 1) * 255).astype(np.uint8)  # (B, H, W)
    side, gap, text = 176, 8, 20
    columns = min(6, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 13)
    sheet = Image.new("L", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), 255)
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=False)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        while draw.textlength(label, font) > side:
            label = label[:-2] + "…"
        draw.text((x, y + side + 3), label, fill=0, font=font)
    sheet.save(path, optimize=True)


def svg_curves(history: list[dict], kept: Sequence[dict] = ()) -> list[dict[str, str]]:
    """Return the learning curves as SVG elements. Their colours are CSS variables, for a light and a dark theme."""
    plots = [
        ("Loss", {"train_loss": "training loss", "valid_loss": "validation loss"}),
        ("Validation metrics", {"accuracy": "accuracy", "roc_auc": "ROC AUC"}),
    ]
    curves = []
    for title, columns in plots if history else []:
        figure, stream = Figure(figsize=(4.5, 3.3), layout="constrained"), StringIO()
        _draw_curves(figure.add_subplot(), history, columns, kept)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        svg = stream.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole report
        for colour, variable in THEME.items():
            svg = svg.replace(colour, variable)
        first, last = history[0], history[-1]
        changes = "; ".join(
            f"{label} from {format_number(first.get(c))} to {format_number(last.get(c))}"
            for c, label in columns.items()
        )
        curves.append({"title": title, "svg": svg, "alt": f"{title} over {len(history)} epochs: {changes}."})
    return curves
