"""Times whole epochs of the unfrozen phase, training and validation: ours, and what raw steps on a batch would take.

    XRAY_DATA=chest_xray python -m tests.benchmarks.epoch

The numbers of images are those of the Kaggle collection: 4,694 to train on, 538 to validate on. The first epoch decodes
the files, the second finds them decoded. The limit is training and forward passes with one batch in memory, as in
`unfrozen` and `frozen`.
"""

import tempfile
from pathlib import Path

from fastai.vision.all import Callback

from tests.benchmarks import frozen, unfrozen
from tests.benchmarks.measuring import (
    DEVICE,
    Enough,
    about_the_machine,
    medians,
    now,
    real_fit,
    rounds,
    some_images,
    whole_number,
)

# -----------------------------------------------------------------------------
TRAIN = whole_number("TRAIN", 4694 if DEVICE.type == "cuda" else 128)
VALID = whole_number("VALID", 538 if DEVICE.type == "cuda" else 32)
REPEATS = whole_number("REPEATS", 1)
# -----------------------------------------------------------------------------


class Epochs(Callback):
    "Times the first two epochs, then ends the fit."

    order = 100

    def before_fit(self):
        self.ends = [now()]

    def after_epoch(self):
        self.ends.append(now())
        if len(self.ends) == 3:
            raise Enough("two epochs were timed")  # fastai needs an exception with a message


def measure() -> dict[str, float]:
    """Return the medians of seconds: first epoch, second epoch, limit."""
    times = {"first epoch": [], "second epoch": [], "limit": []}
    for _ in rounds(REPEATS):
        with tempfile.TemporaryDirectory() as temporary:  # other files each time, which no cache has
            data, epochs = some_images(Path(temporary), TRAIN, VALID), Epochs()
            real_fit(data, epochs, **unfrozen.settings() | {"epochs": 3})
        start, first, second = epochs.ends
        times["first epoch"].append(first - start)
        times["second epoch"].append(second - first)
        times["limit"].append(TRAIN / unfrozen.limit() + VALID / frozen.forward_rate())
    return medians(times)


def main() -> None:
    print(
        f"{unfrozen.ARCH}, {unfrozen.SIZE} px, batch {unfrozen.BATCH}, {TRAIN} + {VALID} images; {about_the_machine()}"
    )
    seconds = measure()
    print(f"\nmedians of {REPEATS}\n{'':<14}{'seconds':>9}{'it / limit':>12}")
    for name, value in seconds.items():
        print(f"{name:<14}{value:>9.2f}{value / seconds['limit']:>12.2f}")


if __name__ == "__main__":
    main()
