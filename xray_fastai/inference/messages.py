"""Prints what `predict` says, less of it with `--quiet`, and writes all of it with times to `--log`."""

import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import fields

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.row_file import Row
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("model", *(field.name for field in fields(PredictConfig)))}
"""The options as they are typed, by Python's names."""


class Messages:
    """Prints lines and logs them. A user's error that leaves the `with` block is logged, too."""

    def __init__(self, quiet: bool, log: str | None):
        """Open the log, which is added to.

        Raises:
            UserError: it cannot be written to.
        """
        self.quiet = quiet
        self._logger = logging.Logger("xray-fastai predict")  # of its own: other loggers do not get these lines
        if log is not None:
            try:
                handler = logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                message = f"cannot be written to ({error.strerror}); give another file"
                raise UserError(message, option="log", value=log) from None
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
            handler.formatter.converter = time.gmtime
            self._logger.addHandler(handler)

    def __enter__(self) -> "Messages":
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if isinstance(error, UserError):
            self.log(f"Error: {error.on_command_line(OPTIONS)}")
        elif isinstance(error, Exception):
            self.log(f"Error: unexpected {type(error).__name__}")
        for handler in self._logger.handlers:
            handler.close()

    def say(self, text: str) -> None:
        """Print a text, which may have several lines, but not with `--quiet`."""
        if not self.quiet:
            print(text, flush=True)
        self.log(text)

    def say_last(self, text: str) -> None:
        """Print the one line that `--quiet` leaves, and only then: the others have said it."""
        if self.quiet:
            print(text, flush=True)

    def tell_error(self, text: str) -> None:
        """Print a line on standard error."""
        print(text, file=sys.stderr)
        self.log(text)

    def log(self, text: str) -> None:
        """Write a text to the log alone."""
        for line in filter(str.strip, text.splitlines()):
            self._logger.info("%s", shown(line, 4096))

    def add(self, rows: Iterable[Row]) -> None:
        """Write to the log which files of a batch could not be read."""
        for row in rows:
            if row["error"] is not None:
                self.log(f"Error: {row['error']}")
