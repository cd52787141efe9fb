"""Runs all checks that need a GPU, in at most 8 minutes, and prints a table with a verdict a line.

    python -m tests.gpu                            on a machine with a GPU
    python -m tests.gpu --device cpu --quick       the same script with tiny sizes, to see that it works

It needs the package and its extra `test`, nothing else: no network, no data. The head and the table are Markdown, for
tests/benchmarks/README.md. Exit codes:

    0    every check passed
    1    a check failed, or there is no GPU
    3    no check failed, but a speed is below its goal

Each check runs in a process of its own with a time limit. `--only NAME ...` runs those, and what they need.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.gpu.runner import Check, Place, Run, exit_code, markdown
from xray_fastai.system.signals import sigterm_raises

CHECKS_OF, SPEED_OF = "tests.gpu.checks", "tests.gpu.speed"
MINUTES = 8.0


def all_checks(place: Place) -> list[Check]:
    """Return the checks in the order of the table; those that make an export for others come first."""
    data = ("data",)
    checks = [
        Check("data", "drawn X-rays", f"{CHECKS_OF}:drawn"),
        *(
            Check(name, f"fit of both phases, {name}", f"{CHECKS_OF}:fits", needs=data, arguments={"precision": name})
            for name in ("fp32", "bf16", "fp16")
        ),
        Check("interrupted", "Ctrl-C in a terminal, `--resume`", f"{CHECKS_OF}:interrupted", needs=data),
        *(
            Check(
                f"resumed-{name}", f"histories after a resume, {name}", f"{CHECKS_OF}:resumed", needs=data,
                arguments={"precision": name}, settings={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            )
            for name in ("fp32", "fp16")
        ),
        Check("memory", "out of memory", f"{CHECKS_OF}:out_of_memory", needs=data),
        Check("predict", "predict beside the CPU", f"{CHECKS_OF}:predicted", needs=("fp32", "bf16")),
        Check("evaluate", "evaluate, interpret beside the CPU", f"{CHECKS_OF}:evaluated", needs=("fp32",)),
        Check("serve", "serve beside the CPU", f"{CHECKS_OF}:served", needs=("fp32",)),
        Check("load", "load_learner, learner.pkl beside the CPU", f"{CHECKS_OF}:loaded", needs=("fp32",)),
        Check("onnx", "ONNX beside torch", f"{CHECKS_OF}:onnx", needs=("fp32",)),
        Check("torchrun", "torchrun", f"{CHECKS_OF}:together", needs=data),
    ]  # fmt: skip
    speed = {
        "unfrozen": ("unfrozen", {}, {"STEPS": "60", "SKIP": "20", "BATCH": "80", "REPEATS": "3"}),
        "frozen": ("frozen", {"goal": 2.0}, {"IMAGES": "2048", "BATCH": "80", "REPEATS": "2"}),
        "frozen-large": ("frozen", {"goal": 1.2}, {"IMAGES": "20480", "BATCH": "80", "REPEATS": "1", "PLAIN": "0"}),
        "epoch": ("epoch", {}, {"BATCH": "80", "REPEATS": "1"}),
        "predict-speed": ("predict", {}, {"IMAGES": "16384", "REPEATS": "2"}),
    }
    sizes = {"ARCH": "resnet50", "SIZE": "224"}
    if place.quick:
        sizes = {"ARCH": "resnet18", "SIZE": "32"}
        tiny = {"STEPS": "2", "SKIP": "1", "BATCH": "8", "REPEATS": "1", "IMAGES": "32", "EPOCHS": "2", "TRAIN": "24"}
        tiny |= {"VALID": "8", "PLAIN": "1"}
        speed = {name: (function, given, tiny) for name, (function, given, _) in speed.items()}
    common = sizes | {"DEVICE": place.device, "XRAY_DATA": str(place.folder / "data")}
    return checks + [
        Check(
            name, f"speed: {name.removesuffix('-speed')}", f"{SPEED_OF}:{function}", needs=data, alone=True,
            arguments=given, settings=common | own,
        )
        for name, (function, given, own) in speed.items()
    ]  # fmt: skip


def chosen(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    """Return the checks of these names, and those that they need; all if there are no names."""
    wanted = set(names) if names else {check.name for check in checks}
    for check in reversed(checks):
        if check.name in wanted:
            wanted |= set(check.needs)
    return [check for check in checks if check.name in wanted]


def head(device: str) -> str:
    """Return what was tested and on what: card, torch, CUDA, driver, cores, date."""
    import platform

    import torch

    from xray_fastai import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}", f"{cores} cores"]
    if device == "cuda":
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        versions = [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}", f"driver {driver()}"]
        parts = [names, *versions, *parts]
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"xray-fastai {__version__}, {today}: {', '.join(parts)}"


def driver() -> str:
    """Return the version of the kernel's NVIDIA driver; "unknown" where the kernel does not say it."""
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.is_file() else "unknown"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no goals, no time limits")
    parser.add_argument("--minutes", type=float, default=None, help=f"time of the whole run [default: {MINUTES:g}]")
    parser.add_argument("--jobs", type=int, default=None, help="checks at once [default: by cores]")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these checks, and what they need")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for exports and logs, which is kept")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here; --device cpu --quick tries the script itself", file=sys.stderr)
        return 1
    if given.keep is not None:
        given.keep.mkdir(parents=True)
    folder = Path(tempfile.mkdtemp(prefix="xray-gpu-")) if given.keep is None else given.keep.resolve()
    place = Place(folder, given.device, given.quick)
    checks = chosen(all_checks(place), given.only)
    unknown = set(given.only) - {check.name for check in checks}
    if unknown:
        print(f"--only: no check is named {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # as on a new machine; the user's own stays as it is
    jobs = given.jobs or max(1, min(4, (os.cpu_count() or 1) // 4))
    minutes = given.minutes or (120 if given.quick else MINUTES)
    run = Run(place, jobs, minutes, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        with sigterm_raises():  # then, as at Ctrl-C, the checks that run are ended
            run.all(checks)
        print(f"\n{head(given.device)}\n\n{markdown(run, checks)}\n")
        verdicts = Counter(outcome.verdict for outcome in run.outcomes.values())
        print(", ".join(f"{number} {verdict}" for verdict, number in verdicts.items()))
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return exit_code(run.outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
