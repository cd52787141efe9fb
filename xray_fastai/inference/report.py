"""Writes the page of one run of `predict`: the pictures by their probability; `report.html.jinja` is its template.

Beyond `MAX_PICTURES` and `MAX_LINES` neither memory nor the page grows with the number of images. The page is one file
that loads nothing from elsewhere.
"""

import heapq
import io
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from xray_fastai import DISCLAIMER
from xray_fastai.data.images import open_image
from xray_fastai.inference.row_file import Row
from xray_fastai.inference.rows import RowBuilder, probability_column
from xray_fastai.inference.terminal_table import shown_digits
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.files import atomic_write
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import data_uri, printable, shown

MAX_PICTURES, MAX_LINES = 200, 1_000
"""Images of a part that the page shows with a picture, and further ones that it lists. Two parts have pictures, so
there are 400 at most. One takes 6.6 kB (24 real X-rays), so they take 2.7 MB."""
SIDE, QUALITY = 170, 80
"""Longest side of a picture in pixels, and its JPEG quality."""
MARK = "xray-fastai predict"
"""By which a page of this module is known: only such a file is replaced."""
HEAD = 4096


class Ranked:
    """Holds the items with the highest scores, and counts all."""

    def __init__(self, size: int):
        self.size, self.total = size, 0
        self._heap: list[tuple[float, int, Any]] = []
        self._order = count(0, -1)  # of equal scores the first comes first

    def add(self, score: float, item: Any) -> None:
        self.total += 1
        keep = heapq.heappush if len(self._heap) < self.size else heapq.heappushpop
        keep(self._heap, (score, next(self._order), item))

    def items(self) -> list[Any]:
        """Return the items, the highest score first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


class Report:
    """Collects rows, and writes the page."""

    def __init__(self, path: str | Path, builder: RowBuilder):
        self.path, self.builder = Path(path), builder
        self.called, self.uncertain = (Ranked(MAX_PICTURES + MAX_LINES) for _ in range(2))
        self.unreadable = Ranked(MAX_LINES)
        self.by_class: dict[str, int] = dict.fromkeys(builder.model.classes, 0)

    @staticmethod
    def check(path: Path) -> None:
        """Check that the page could be written. A page of an earlier run is replaced.

        Raises:
            UserError: it is another file, a folder, or its folder does not exist.
        """
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}; make it", option="report", value=path)
        try:
            with open(path, "rb") as stream:
                ours = f'content="{MARK}"'.encode() in stream.read(HEAD)
        except FileNotFoundError:
            return
        except OSError as error:
            message = f"cannot be replaced ({error.strerror}); give another name"
            raise UserError(message, option="report", value=path) from None
        if not ours:
            raise UserError("already exists, and is no page of predict; give another name", option="report", value=path)

    def add(self, rows: Iterable[Row]) -> None:
        """Note the rows of a batch."""
        for row in rows:
            if row["error"] is not None:
                self.unreadable.add(0, (row["path"], row["error"].removeprefix(f"{row['path']}: ")))
            elif (reason := self.builder.withheld(row)) is not None:
                self.uncertain.add(self._score(row), (row, self.builder.rule.why(reason)))
            else:
                self.called.add(self._score(row), (row, ""))
                self.by_class[row["prediction"]] += 1

    def write(self, output: str | None) -> None:
        """Write the page; `output` has the rows that it leaves out.

        Raises:
            UserError: it cannot be written.
        """
        model = self.builder.model
        uncertain, called = (self._part(part) for part in (self.uncertain, self.called))
        unreadable = self.unreadable.items()
        total = self.called.total + self.uncertain.total + self.unreadable.total
        facts = [
            ("Model", model.path.resolve().name),
            ("Images", f"{total:,}"),
            *((name, f"{number:,}") for name, number in self.by_class.items()),
            ("Uncertain", f"{self.uncertain.total:,}"),
            ("Could not be read", f"{self.unreadable.total:,}"),
        ]
        if self.builder.rule.threshold is not None:
            facts.append(("Threshold", f"{model.positive} from {self.builder.rule.threshold:.4g}"))
        text = _template().render(
            mark=MARK,
            disclaimer=DISCLAIMER,
            when=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z").lstrip("0"),
            facts=[(term, printable(value)) for term, value in facts],
            positive=model.positive,
            score="probability" if model.positive is None else f"probability of {model.positive}",
            column="probability" if model.positive is None else probability_column(model.positive),
            where="" if output is None else f"; {printable(output)} has them",
            uncertain=uncertain,
            called=called,
            unreadable={
                "total": self.unreadable.total,
                "listed": [(printable(path), printable(why)) for path, why in unreadable],
                "left_out": self.unreadable.total - len(unreadable),
            },
        )
        try:
            with atomic_write(self.path) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            message = f"cannot be written ({error.strerror}); give another name"
            raise UserError(message, option="report", value=self.path) from None

    def _score(self, row: Row) -> float:
        """Return the probability of the class to detect; of more than two classes that of the most probable one."""
        names = self.builder.model.classes if self.builder.model.positive is None else [self.builder.model.positive]
        return max(row[probability_column(name)] for name in names)

    def _part(self, ranked: Ranked) -> dict[str, Any]:
        digits = shown_digits(self.builder)
        images = [
            {
                "path": printable(row["path"]),
                "name": shown(Path(row["path"]).name),
                "called": row["prediction"],
                "shown": f"{self._score(row):.{digits}f}",
                "why": why,
                "source": row["path"],
            }
            for row, why in ranked.items()
        ]
        pictured = images[:MAX_PICTURES]
        with closing(map_in_threads(_picture, [image["source"] for image in pictured])) as pictures:
            pictured = [image | picture for image, picture in zip(pictured, pictures, strict=True)]
        return {
            "total": ranked.total,
            "pictured": pictured,
            "listed": images[MAX_PICTURES:],
            "left_out": ranked.total - len(images),
        }


def _picture(path: str) -> dict[str, Any]:
    """Return a small picture of a file as the template shows it; none if the file has gone in the meantime."""
    try:
        image = open_image(path)
    except ImageError:
        return {"uri": None}
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return {"uri": data_uri(content.getvalue(), "image/jpeg"), "width": image.width, "height": image.height}


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    number: Callable[[int], str] = "{:,}".format
    environment.filters["count"] = number
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
