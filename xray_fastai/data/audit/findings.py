"""Hold the findings about a data set; write them as text, as JSON, and as a list of files for `fit --exclude`."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from xray_fastai.data.audit.shortcuts import Shortcut
from xray_fastai.data.exclusions import LEAVE_OUT, write_list
from xray_fastai.system.text import WIDTH, count_of, printable, wrap

FORMAT = 1
"""Version of the JSON layout; it changes if a program that reads the JSON must change."""

SPLITS = ("train", "val", "test", "")  # "": class folders without splits
SEVERITIES = ("error", "warning", "remark")
MAX_SHOWN = 3  # files of a finding on the terminal


@dataclass(frozen=True)
class File:
    """A file that a finding is about."""

    name: str  # relative to the root
    detail: str = ""
    leave_out: bool = False  # `--fix` lists it for `fit --exclude`


@dataclass(frozen=True)
class Finding:
    """One problem or oddity of a data set."""

    severity: str  # error: it would spoil a result; warning: look at it; remark: good to know
    kind: str  # a stable name for programs
    text: str
    advice: str
    files: list[File] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        files = [{"file": f.name, "detail": f.detail, "action": LEAVE_OUT if f.leave_out else None} for f in self.files]
        return {
            "severity": self.severity,
            "kind": self.kind,
            "text": self.text,
            "advice": self.advice,
            "count": len(files),
            "files": files,
        }

    def __str__(self) -> str:
        lines = wrap(self.text, f"{self.severity:<9}")
        for file in self.files[:MAX_SHOWN]:
            lines.append(f"{'':11}{printable(file.name)}" + (f": {file.detail}" if file.detail else ""))
        if len(self.files) > MAX_SHOWN:
            lines.append(f"{'':11}... and {len(self.files) - MAX_SHOWN:,} more (--json names all)")
        return "\n".join([*lines, *wrap(self.advice, f"{'':9}-> ")])


@dataclass(frozen=True)
class Audit:
    """The result of `check_data`.

    `images` has one row for each readable image. Its columns are path, file, label, split, patient, the fields of
    `image_facts.Facts`, and image (a number, equal for files that show the same image).
    """

    name: str
    root: Path
    images: pd.DataFrame = field(repr=False)
    findings: list[Finding] = field(repr=False)
    shortcuts: dict[str, Shortcut] = field(repr=False)
    seconds: float

    def of(self, severity: str) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def ok(self) -> bool:
        """True if no finding is an error."""
        return not self.of("error")

    @property
    def left_out(self) -> list[dict[str, str]]:
        """The rows of the list for `fit --exclude`: each file once, with the first finding that leaves it out."""
        rows = {}
        for finding in self.findings:
            for file in finding.files:
                if file.leave_out:
                    row = {"file": file.name, "finding": finding.kind, "action": LEAVE_OUT, "detail": file.detail}
                    rows.setdefault(file.name, row)
        return list(rows.values())

    def write_fix(self, path: str | Path) -> None:
        """Write the list of files to leave out, for `fit --exclude`.

        Raises:
            UserError: the file already exists, or cannot be written.
        """
        write_list(Path(path), self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """Return all results as data for JSON; `format` is the version of the layout."""
        splits = []
        for (split, label), rows in _by_class(self.images):
            spans = {"width": rows.width, "height": rows.height, "aspect": rows.width / rows.height}
            splits.append(
                {"split": split, "label": label, "images": len(rows), "patients": int(rows.patient.nunique())}
                | {name: _span(values) for name, values in (spans | {"bytes": rows.bytes}).items()}
                | {"modes": _counts(rows["mode"]), "formats": _counts(rows.format)}
            )
        return {
            "format": FORMAT,
            "data": self.name,
            "root": str(self.root),
            "images": len(self.images),
            "ok": self.ok,
            "counts": {severity: len(self.of(severity)) for severity in SEVERITIES},
            "splits": splits,
            "shortcuts": {
                name: {
                    "auc": shortcut.auc.value,
                    "low": shortcut.auc.low,
                    "high": shortcut.auc.high,
                    "images": shortcut.images,
                    "alarming": shortcut.alarming,
                    "single": shortcut.single,
                }
                for name, shortcut in self.shortcuts.items()
            },
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [
            f"{'data':<9}{self.name}",
            f"{'images':<9}{len(self.images):,} readable, checked in {self.seconds:.1f} s",
            "",
            _tables(self.images),
        ]
        for severity in SEVERITIES:
            for finding in self.of(severity):
                lines += ["", str(finding)]
        counts = [count_of(len(self.of(severity)), severity) for severity in SEVERITIES]
        verdict = "nothing found that would spoil a result" if self.ok else "correct the errors before a fit"
        return "\n".join([*lines, "", f"{'verdict':<9}{', '.join(counts)}: {verdict}"])


def _tables(images: pd.DataFrame) -> str:
    """Return two tables by split and class: the numbers of images and patients and the formats; and the sizes."""
    if images.empty:
        return "no readable image"
    counts = Table("split", "class", "images", "patients", "kinds")
    sizes = Table("split", "class", "width (min/median/max)", "height", "aspect ratio")
    for column in (2, 3):
        counts.columns[column].justify = "right"
    for (split, label), rows in _by_class(images):
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in _counts(rows.format + " " + rows["mode"]).items())
        counts.add_row(split or "-", label, f"{len(rows):,}", f"{rows.patient.nunique():,}", kinds)
        aspect = rows.width / rows.height
        spans = [_spanned(values, digits) for values, digits in ((rows.width, 0), (rows.height, 0), (aspect, 2))]
        sizes.add_row(split or "-", label, *spans)
    return f"{_plain(counts)}\n\n{_plain(sizes)}"


def _plain(table: Table) -> str:
    """Return a table as text of `WIDTH` columns, without lines and colours."""
    table.box, table.pad_edge, table.padding = None, False, (0, 2, 0, 0)
    for column in table.columns:
        column.overflow = "fold"  # a long name continues on the next line
    console = Console(
        file=io.StringIO(), width=WIDTH, color_system=None, markup=False, emoji=False, force_jupyter=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _by_class(images: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    groups = list(images.groupby(["split", "label"]))
    return sorted(groups, key=lambda group: (SPLITS.index(group[0][0]), group[0][1]))


def _spanned(values: pd.Series, digits: int) -> str:
    if values.min() == values.max():
        return f"{values.min():.{digits}f}"
    return "/".join(f"{value:.{digits}f}" for value in (values.min(), values.median(), values.max()))


def _span(values: pd.Series) -> dict[str, float]:
    return {"min": values.min().item(), "median": values.median().item(), "max": values.max().item()}


def _counts(values: pd.Series) -> dict[str, int]:
    return values.value_counts().to_dict()
