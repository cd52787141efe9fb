"""Notes about each file what a row of predictions is joined by: the model, the time, a digest, identifiers of DICOM.

`Facts` reads a file before it is predicted. If the file changes in between, the row has the earlier digest, so that
`--append` predicts the file again.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.dicom.reader import IDENTIFIERS, identifiers_of
from xray_fastai.data.images import check_file
from xray_fastai.export.layout import SETTINGS
from xray_fastai.inference.model import Model
from xray_fastai.inference.stream import Source
from xray_fastai.system.errors import ImageError
from xray_fastai.system.files import sha256
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import shown

DIGEST, MODEL, MODEL_DIGEST, OPTIONS, TIME = "sha256", "model", "model_sha256", "options", "predicted_at"
"""Columns: the SHA-256 of the file; the name of the export, and the SHA-256 of its `model.json`, which holds that of
the weights; `options_of`; and when the row was made."""
DECIDING = ("threshold", "gate", "abstain", "uncalibrated", "prevalence", "tta")
"""The options that change a row of the same model."""


def fact_columns(config: PredictConfig) -> list[str]:
    """Return the names of the columns that `Facts` fills; all of them hold text."""
    provenance = [DIGEST, MODEL, MODEL_DIGEST, OPTIONS, TIME] if config.provenance or config.append else []
    return [*provenance, *(IDENTIFIERS if config.identifiers else ())]


def options_of(config: PredictConfig) -> str:
    """Return the options that change a row as they are typed, without those that have their defaults.

    >>> options_of(PredictConfig(threshold=0.3, gate=False))
    '--threshold 0.3 --no-gate'
    """
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    typed = []
    for name in (name for name in DECIDING if name in given):
        value = given[name]
        typed.append(f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}")
    return " ".join(typed)


class Facts:
    """Reads the facts of files on their way to the network, and gives them to the rows in the same order."""

    def __init__(self, model: Model, config: PredictConfig):
        self._columns, self._identifiers = fact_columns(config), config.identifiers
        self.of_run: dict[str, str | None] = {}  # the same in each row
        if DIGEST in self._columns:
            self.of_run = {
                MODEL: shown(model.path.resolve().name, 255),
                MODEL_DIGEST: sha256(model.path / SETTINGS),
                OPTIONS: options_of(config) or None,
            }
        self._waiting: deque[dict[str, str | None]] = deque()

    def noted(
        self,
        sources: Iterator[Source],
        wanted: Callable[[Source, dict[str, str | None]], bool] = lambda source, facts: True,
    ) -> Iterator[Source]:
        """Yield the sources that are wanted by their facts; threads read the next files meanwhile."""
        if not self._columns:
            yield from sources
            return
        with closing(map_in_threads(lambda source: (source, self._of_file(source)), sources)) as read:
            for source, facts in read:
                if wanted(source, facts):
                    self._waiting.append(facts)
                    yield source

    def next(self) -> dict[str, str | None]:
        """Return the facts of the next source that `noted` yielded; the time is now."""
        if not self._columns:
            return {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {**self.of_run, TIME: now, **self._waiting.popleft()}

    def _of_file(self, source: Source) -> dict[str, str | None]:
        if not isinstance(source, (str, os.PathLike)):
            return {}
        facts: dict[str, str | None] = {}
        if DIGEST in self._columns:
            facts[DIGEST] = _digest(source)
        return facts | (identifiers_of(source) if self._identifiers else {})


def _digest(path: str | os.PathLike) -> str | None:
    """Return the SHA-256 of a file; None for one that cannot be read, whose row says why."""
    try:
        check_file(path)  # a pipe would block
        return sha256(Path(path))
    except (ImageError, OSError):
        return None
