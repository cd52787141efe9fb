"""The result of an evaluation: a table for people, JSON for programs, data frames for notebooks."""

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from xray_fastai import DISCLAIMER
from xray_fastai.evaluation.groups import lines_of, remarks_on
from xray_fastai.evaluation.plots import FILES
from xray_fastai.evaluation.subgroups import Group
from xray_fastai.metrics.table import title_at_prevalence, title_of
from xray_fastai.system.text import WIDTH, csv_text, data_uri, format_interval, shorten, wrap

CALLED_METRICS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "roc_auc")
"""The metrics that the terminal shows of the images that are called; `Evaluation.called` has all."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on one split. Prints as a table; shows table and plots in a notebook."""

    path: Path  # the folder that holds the files
    summary: dict[str, Any] = field(repr=False)  # metrics.json
    predictions: pd.DataFrame = field(repr=False)  # predictions.csv
    about: dict[str, str] = field(repr=False)  # what was evaluated on what, for people

    @property
    def operating_points(self) -> dict[str, pd.DataFrame]:
        """The metrics of each operating point (`0.5`, `chosen`), with the columns value, low and high."""
        return {name: _frame(point["metrics"]) for name, point in self.summary["operating_points"].items()}

    @property
    def metrics(self) -> pd.DataFrame:
        """All metrics by name, with the columns value, low and high; at the chosen threshold where they need one."""
        return pd.concat([self.operating_points["chosen"], _frame(self.summary["metrics"])])

    @property
    def groups(self) -> pd.DataFrame:
        """A row for each metric of each group, with the columns of the label table that were kept; may be empty."""
        rows = [
            {"column": column["column"], "group": group["name"], "images": group["images"], "metric": name, **interval}
            for column in self.summary["groups"]
            for group in column["groups"]
            for name, interval in group["metrics"].items()
        ]
        return pd.DataFrame(rows, columns=["column", "group", "images", "metric", "value", "low", "high"])

    @property
    def confusion(self) -> pd.DataFrame:
        """The confusion matrix at the chosen threshold: a row for each true class, a column for each predicted."""
        classes = list(self.summary["counts"])
        counts = self.summary["operating_points"]["chosen"]["confusion"]
        return pd.DataFrame(counts, pd.Index(classes, name="truth"), pd.Index(classes, name="prediction"))

    def to_json(self) -> str:
        """Return the content of `metrics.json`; an undefined value is null."""
        return json.dumps(self.summary, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [DISCLAIMER, ""]
        for name, text in self._facts:
            lines += wrap(text, f"{name:<15}")
        columns, rows = self._cells()
        lines += ["", f"{'':<28}" + "".join(f"{column:<26}" for column in columns).rstrip()]
        lines += [f"{title_of(name):<28}" + "".join(f"{cell:<26}" for cell in cells).rstrip() for name, cells in rows]
        lines += [
            "",
            f"{'confusion':<28}{columns[-1]}",
            *self._confusion_lines(),
            "",
            *self._called_lines(),
            *self._worst_group_lines(),
            *lines_of(self.summary["groups"]),
            *wrap(self.summary["intervals"]),
        ]
        lines += ["", *wrap(str(self.path), f"{'written':<15}"), DISCLAIMER]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns, rows = self._cells()
        width = len(columns)
        table = pd.DataFrame(
            [cells + [""] * (width - len(cells)) for _, cells in rows], [title_of(name) for name, _ in rows], columns
        )
        about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in self._facts)
        images = ""
        for file, alternative in FILES.items():
            if (self.path / file).is_file():
                uri = data_uri((self.path / file).read_bytes(), "image/png")
                images += f'<img src="{uri}" alt="{alternative}" style="max-width: 48%">'
        of_groups = [remark for column in self.summary["groups"] for remark in remarks_on(column)]
        intervals = escape(" ".join([*self._worst_group_lines(), *of_groups, self.summary["intervals"]]))
        groups = self.groups.to_html(index=False, float_format="{:.3f}".format) if len(self.groups) else ""
        tables = f"{table.to_html()}{groups}<p>{intervals}</p>{self.confusion.to_html()}"
        if self.summary["called"] is not None:
            tables += f"<p>called: {escape(self.summary['called']['text'])}</p>"
        if self.called is not None:
            tables += self.called.rename(index=title_of).to_html()
        return f"<p>{DISCLAIMER}</p><dl>{about}</dl>{tables}{images}"

    @property
    def _facts(self) -> list[tuple[str, str]]:
        """What was evaluated on what, and what the reader has to know; a term and a text for each line."""
        return [*self.about.items(), *(("note", note) for note in self.summary["notes"])]

    @property
    def _one_class(self) -> bool:
        """Whether all images are of one class."""
        return sum(count > 0 for count in self.summary["counts"].values()) == 1

    def _cells(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Return the titles of the columns, and each metric's name and cells: one cell where it needs no threshold."""
        points = self.summary["operating_points"]
        if points["chosen"]["threshold"] is None:
            columns, points = ["the most probable class"], [points["chosen"]]
        elif points["chosen"]["threshold"] == 0.5:
            columns, points = ["at threshold 0.5"], [points["chosen"]]
        else:
            columns = ["at threshold 0.5", f"at threshold {points['chosen']['threshold']:.4g}"]
            points = [points["0.5"], points["chosen"]]
        one_class = self._one_class
        rows = [
            (name, [_cell(name, point["metrics"][name], one_class) for point in points])
            for name in points[0]["metrics"]
        ]
        for name in points[0]["at_prevalence"] or ():
            title = title_at_prevalence(name, self.summary["prevalence"])
            rows.append((title, [_cell(name, point["at_prevalence"][name], one_class) for point in points]))
        return columns, rows + [(name, [_cell(name, i, one_class)]) for name, i in self.summary["metrics"].items()]

    @property
    def called(self) -> pd.DataFrame | None:
        """The metrics on the images that are called, at the chosen threshold: a row for each metric, with the columns
        value, low and high. None where all images are called, or none."""
        called = self.summary["called"]
        if called is None or called["metrics"] is None or not any(called["withheld"].values()):
            return None
        return _frame(called["metrics"])

    def _called_lines(self) -> list[str]:
        """Return which images are called, and the metrics on these; nothing without a gate or a band."""
        called = self.summary["called"]
        if called is None:
            return []
        lines = [*wrap(called["text"], f"{'called':<15}"), ""]
        if self.called is not None:
            lines.append(f"{'':<28}on the images called")
            one_class = sum(map(any, called["confusion"])) == 1
            cells = {name: _cell(name, interval, one_class) for name, interval in called["metrics"].items()}
            lines += [f"{title_of(name):<28}{cells[name]}" for name in CALLED_METRICS]
            lines.append("")
        return lines

    def _worst_group_lines(self) -> list[str]:
        """Return the unusual images on which the model is worst, and an empty line; nothing with too few images."""
        worst = self.summary["worst_group"]
        if worst is None:
            return []
        text = Group(**worst).describe(self.summary["metrics"]["roc_auc"]["value"])
        return [*wrap(text, f"{'worst group':<15}"), ""]

    def _confusion_lines(self) -> list[str]:
        """Return the confusion matrix; numbers replace the names of classes above it where these are too wide."""
        counts = self.confusion.to_numpy()
        names = [shorten(name, 24) for name in self.confusion.index]
        numbers = [str(i) for i in range(1, len(names) + 1)]
        true = [f"true {name}" for name in names]
        numbered = [f"{i} {name}" for i, name in zip(numbers, names, strict=True)]
        for rows, heads in ((true, [f"predicted {name}" for name in names]), (numbered, numbers)):
            first = max(map(len, rows))
            widths = [max(len(head), len(str(counts.max()))) + 2 for head in heads]
            if first + sum(widths) <= WIDTH:
                lines = zip(["", *rows], [heads, *counts.tolist()], strict=True)
                return [
                    f"{row:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
                    for row, cells in lines
                ]
        return ["the confusion matrix is in confusion.png"]


def _cell(name: str, interval: dict[str, float | None], one_class: bool) -> str:
    """Return a metric with its interval, or why it is undefined; `one_class`: the images are of one class."""
    if interval["value"] is None and not one_class:
        return "the classes are separated" if name == "calibration_slope" else "none predicted"
    if interval["value"] is None:
        return "one class only"
    return format_interval(**interval)


def _frame(intervals: dict[str, dict]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(intervals, orient="index", dtype=float).rename_axis("metric")


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a table as UTF-8 CSV, whose texts a spreadsheet takes for text (`csv_text`)."""
    safe = table.map(lambda value: csv_text(value) if isinstance(value, str) else value)
    safe.to_csv(file, index=False, encoding="utf-8")
