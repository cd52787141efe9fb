"""Records the history of a fit, and prints one row an epoch."""

import shutil
import sys
import textwrap
import time

from fastai.vision.all import Callback, TrackerCallback

from xray_fastai.export.layout import HISTORY_COLUMNS
from xray_fastai.system.progress import epoch_bar, on_terminal
from xray_fastai.training.callbacks import OWN_METRICS
from xray_fastai.training.pace import Pace, short_duration
from xray_fastai.training.stopping import EarlyStopping

WIDTHS = {
    "phase": 9, "epoch": 9, "train loss": 12, "valid loss": 12, "accuracy": 10, "AUC": 8, "time": 8, "left": 12
}  # fmt: skip
"""The columns of the table, and their widths: 80 characters together."""
LEFT_OUT = ("accuracy", "train loss", "time", "left")
"""The columns that a narrow terminal does not show, the first one first; `history.csv` has them."""


def columns_for(width: int) -> list[str]:
    """Return the columns that fit into a terminal of this width.

    >>> columns_for(40)
    ['phase', 'epoch', 'valid loss', 'AUC']
    """
    shown = list(WIDTHS)
    for name in LEFT_OUT:
        if sum(WIDTHS[column] for column in shown) > width:
            shown.remove(name)
    return shown


def terminal_width() -> int:
    """Return the width of the terminal; 80 where standard output is a file or a notebook."""
    return shutil.get_terminal_size().columns if on_terminal(sys.stdout) else 80


class EpochLog(Callback):
    """Record the history, and print one row an epoch, with a progress bar on a terminal or in a notebook.

    After the first epoch that a process trains, a line tells what an epoch takes, and the longest that the rest of the
    fit can take. From the second epoch on, a row tells the time that the phase still takes, at the speed of the last
    epochs: at least (if no epoch improves on the lowest validation loss, early stopping ends it), and at most (all
    epochs).
    """

    order = TrackerCallback.order - 1

    def __init__(
        self,
        history: list[dict],  # gets one row an epoch, with the keys `HISTORY_COLUMNS`
        phase: str,  # "frozen" or "unfrozen"
        early: EarlyStopping,  # ends the phase
        pace: Pace,  # knows what an epoch takes
    ):
        self.history, self.phase, self.early, self.pace, self.bar = history, phase, early, pace, None

    def before_fit(self):
        self.width = terminal_width()
        self.columns = columns_for(self.width)
        added = "".join(f"{name[:14]:>16}" for name in self.metrics[len(OWN_METRICS) :].attrgot("name"))
        print(f"\n{self._line(dict(zip(WIDTHS, WIDTHS, strict=True)))}{added}")
        self.bar = epoch_bar(self.n_epoch)

    def _line(self, cells: dict[str, str]) -> str:
        return "".join(
            f"{cells[name]:<{WIDTHS[name]}}" if name == "phase" else f"{cells[name]:>{WIDTHS[name]}}"
            for name in self.columns
        )

    def before_epoch(self):
        self.start = time.perf_counter()

    def _start_bar(self, part: str):
        if self.bar is not None:
            self.bar.begin(self.epoch, part, len(self.dl))

    def before_train(self):
        self._start_bar("training")

    def before_validate(self):
        self._start_bar("validation")

    def after_batch(self):
        if self.bar is not None:
            self.bar.advance()

    def after_epoch(self):
        row = self.recorder.history[-1] | {"phase": self.phase, "epoch": self.epoch + 1}
        row["lr"] = float(f"{row['lr']:.12g}")  # 0.003, of which sums of the schedule make 0.0030000000000000005
        self.history.append({name: row[name] for name in (*HISTORY_COLUMNS, *row)})
        first = self.pace.count <= 1
        text = self._line(
            {
                "phase": self.phase,
                "epoch": f"{self.epoch + 1}/{self.pace.epochs}",
                "train loss": f"{row['train_loss']:.4f}",
                "valid loss": f"{row['valid_loss']:.4f}",
                "accuracy": f"{row['accuracy']:.3f}",
                "AUC": f"{row['roc_auc']:.3f}",
                "time": short_duration(time.perf_counter() - self.start),
                "left": "" if first else self.left(),
            }
        )
        added = [value for name, value in row.items() if name not in HISTORY_COLUMNS]
        print(text.rstrip() if not added else text + "".join(f"{value:>16.4f}" for value in added), flush=True)
        if self.pace.count == 1:
            print(textwrap.fill(self.pace.forecast(), self.width), flush=True)

    def left(self) -> str:
        "Return the least and the most time that the phase still takes, as `0:20-3:10`; one time if they are equal."
        losses = [row["valid_loss"] for row in self.history if row["phase"] == self.phase]
        most = self.pace.epochs - (self.epoch + 1)
        least = min(most, self.early.least(losses))
        times = [short_duration(epochs * self.pace.seconds) for epochs in (least, most)]
        return times[0] if least in (0, most) else "-".join(times)

    def close(self):
        "Remove the progress bar."
        if self.bar is not None:
            self.bar.close()
            self.bar = None
