"""Measures an epoch where cores are shared: a fit alone, each of two at the same time, and one beside a busy loop.

    python -m tests.benchmarks.busy

"torch's way" has a thread for each core, and OpenMP's own 300,000 rounds of spinning; "here" has what
`xray_fastai.system.threads` chooses. Both run in turns. Nothing else should compute meanwhile.
"""

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time

EPOCHS = 4  # the median of all but the first
SETTINGS = {"arch": "resnet18", "size": 64, "batch_size": 80, "freeze_epochs": 0, "device": "cpu"}
WAYS = {"torch's way": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(os.cpu_count())}, "here": {}}
SITUATIONS = {"alone": (1, 0), "two at the same time": (2, 0), "beside a busy loop": (1, 1)}  # fits, busy loops


def measure_fit() -> None:
    """Fit in this process; print the threads, and the median time of an epoch in seconds."""
    from xray_fastai.system.threads import sleep_soon

    sleep_soon()  # before torch is loaded, as the command line does it
    from fastai.vision.all import Callback

    from xray_fastai import fit

    class Clock(Callback):
        def before_fit(self):
            self.times = []

        def before_epoch(self):
            self.start = time.perf_counter()

        def after_epoch(self):
            self.times.append(time.perf_counter() - self.start)

    clock, printed = Clock(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        fit(**SETTINGS, epochs=EPOCHS, patience=EPOCHS, exports=folder, callbacks=[clock])
    device = next(line for line in printed.getvalue().splitlines() if line.startswith("device"))
    print(f"{statistics.median(clock.times[1:])};{device.split('cpu ')[1].split(', precision')[0]}")


def measure(fits: int, loops: int, variables: dict[str, str]) -> tuple[float, str]:
    """Return the mean over fits at the same time of an epoch's seconds, and the threads of the last."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(loops)]
    try:
        command = [sys.executable, "-m", "tests.benchmarks.busy", "fit"]
        running = [
            subprocess.Popen(command, env=environment | variables, stdout=subprocess.PIPE, text=True)
            for _ in range(fits)
        ]
        answers = [process.communicate()[0].strip().splitlines()[-1].split(";") for process in running]
    finally:
        for process in busy:
            process.kill()
    return statistics.mean(float(seconds) for seconds, _ in answers), answers[-1][1]


def main() -> None:
    """Print a table: seconds an epoch by situation and way."""
    print(f"{'':<24}{'way':<14}{'s an epoch':>12}   threads", flush=True)
    for situation, (fits, loops) in SITUATIONS.items():
        for way, variables in WAYS.items():
            seconds, threads = measure(fits, loops, variables)
            print(f"{situation:<24}{way:<14}{seconds:>12.2f}   {threads}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["fit"]:
        measure_fit()
    else:
        main()
