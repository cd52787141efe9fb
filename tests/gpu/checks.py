"""The checks of what is computed: fits, interruptions, memory, and the GPU's results beside the CPU's.

Each runs in a process of its own. Tolerances are stated here, once.
"""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import requests
import torch
from fastai.vision.all import Callback
from fastai.vision.all import load_learner as load_pickled

from tests.benchmarks.measuring import random_weights
from tests.gpu.runner import NOT_RUN, PASS, ROOT, Outcome, Place, last_line
from xray_fastai import evaluate, fit, interpret, load_learner, predict, verify
from xray_fastai.data.images import open_image
from xray_fastai.data.sources import phantom
from xray_fastai.inference.gradcam import grad_cam
from xray_fastai.inference.model import open_model
from xray_fastai.inference.onnx_export import export_onnx
from xray_fastai.model.preprocessing import equalize

SAME = {"fp32": 1e-3, "bf16": 0.05}
"""The largest difference of a probability from the CPU's in fp32; `predict --resume` takes the same for one model."""
SAME_TF32 = 0.02
"""As `SAME`, for fastai's own `learn.predict`, which computes convolutions in TF32: 10 bits of mantissa."""
SAME_MAP = 0.05
"""The largest difference in a heat map, which is scaled from 0 to 1."""
SAME_HISTORY = 1e-3
"""The largest difference of a loss, relative to it, between a resumed fit and one without an interruption; or three
times the difference of two fits without one, if that is more. cuDNN is told to be deterministic."""


def drawn(place: Place) -> Outcome:
    """Draw the X-rays that all checks use."""
    images, size = (64, 64) if place.quick else (600, 224)
    phantom.write(place.folder / "data", images, size=size)
    return Outcome(PASS, f"{images} drawn X-rays of {size} px")


def options(place: Place, **others) -> dict:
    """Return the settings of a fit from random weights in a file, so that it has a frozen phase."""
    arch = "resnet18" if place.quick else "resnet50"
    weights = place.folder / f"weights-{os.getpid()}"
    weights.mkdir(exist_ok=True)
    return {
        "data": str(place.folder / "data"), "valid": "0.25", "exports": str(place.folder / "exports"), "arch": arch,
        "size": 64 if place.quick else 224, "batch_size": 16 if place.quick else 80, "device": place.device,
        "weights": str(random_weights(weights, arch)), "freeze_epochs": 2, "epochs": 2,
    } | others  # fmt: skip


def fits(place: Place, precision: str) -> Outcome:
    """Fit both phases in a precision."""
    if place.device == "cpu" and precision == "fp16":
        return Outcome(NOT_RUN, "fp16 needs CUDA")
    result = fit(**options(place, precision=precision, name=precision))
    assert result.status == "complete", result
    history = pd.DataFrame(result.history)
    assert list(history.phase) == ["frozen"] * 2 + ["unfrozen"] * 2, history
    assert np.isfinite(history[["train_loss", "valid_loss", "roc_auc"]].to_numpy()).all(), history
    training = json.loads((result.path / "model.json").read_text())["training"]
    assert training["precision"] == precision and training["device"].startswith(place.device), training
    report = verify(result.path)
    assert report.ok, report
    last = history.iloc[-1]
    text = f"2 + 2 epochs in {training['seconds']:.0f} s; valid loss {last.valid_loss:.3f}, AUC {last.roc_auc:.3f}"
    return Outcome(PASS, f"{training['device']}: {text}")


class CtrlC(Callback):
    "Sends this process what a terminal sends at Ctrl-C, in the middle of an epoch."

    order = 50

    def __init__(self, frozen: bool, epoch: int):
        self.frozen, self.at = frozen, epoch

    def after_batch(self):
        frozen = not next(self.model.parameters()).requires_grad
        if self.training and frozen == self.frozen and self.epoch == self.at and self.iter == 1:
            os.kill(os.getpid(), signal.SIGINT)


def resumed(place: Place, precision: str) -> Outcome:
    """Interrupt a fit in both phases, resume it twice, and compare its history with that of fits left alone."""
    if place.device == "cpu" and precision == "fp16":
        return Outcome(NOT_RUN, "fp16 needs CUDA")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    size = {"size": 32, "batch_size": 8} if place.quick else {"size": 64, "batch_size": 40}
    settings = options(place, arch="resnet18", precision=precision, freeze_epochs=3, epochs=3, **size)
    whole, again = (fit(**settings, name=f"{word}-{precision}").history for word in ("whole", "again"))
    part = fit(**settings, name=f"cut-{precision}", callbacks=[CtrlC(True, 1)])
    for more in ([CtrlC(False, 1)], []):
        assert part.status == "interrupted" and part.signal == signal.SIGINT, part
        part = fit(resume=part.path.name, exports=settings["exports"], callbacks=more)
    assert part.status == "complete", part
    noise, difference = differs(whole, again), differs(whole, part.history)
    allowed = max(SAME_HISTORY, 3 * noise)
    text = f"losses differ by {difference:.1e}, those of two whole fits by {noise:.1e}; allowed {allowed:.1e}"
    assert difference <= allowed, text
    return Outcome(PASS, f"interrupted in both phases: {text}")


def differs(one: list[dict], other: list[dict]) -> float:
    """Return the largest relative difference of a loss between two histories of the same epochs."""
    one, other = pd.DataFrame(one), pd.DataFrame(other)
    assert one[["phase", "epoch"]].equals(other[["phase", "epoch"]]), f"{one}\n{other}"
    a, b = (table[["train_loss", "valid_loss"]].to_numpy(float) for table in (one, other))
    return float((np.abs(a - b) / np.abs(a)).max())


def command(*args, **kwargs) -> subprocess.Popen:
    """Start the command line in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "xray_fastai", *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        process_group=0, **kwargs,
    )  # fmt: skip


def check_code(process: subprocess.Popen, allowed: Sequence[int], log: Path) -> None:
    """Check how a command ended; where it was wrong, the last line in the log says why."""
    code = process.wait()
    assert code in allowed, f"exit code {code}: {last_line(log)}"


def interrupted(place: Place) -> Outcome:
    """Press Ctrl-C in a terminal: all processes of the command get it, also those that load images without a cache."""
    given = options(place, name="terminal", weights="none", freeze_epochs=0, epochs=6, patience=6, workers=2)
    process = command("fit", "--no-cache", *(f"--{key.replace('_', '-')}={value}" for key, value in given.items()))
    for line in process.stdout:
        print(line, end="")
        if re.match(r"unfrozen\s+2/6", line):
            os.killpg(process.pid, signal.SIGINT)
    check_code(process, [128 + signal.SIGINT], place.folder / "interrupted.log")
    export = Path(given["exports"]) / given["name"]
    before = pd.read_csv(export / "history.csv")
    assert 2 <= len(before) < 6 and (export / "checkpoint").is_dir(), before
    process = command("fit", "--resume", given["name"], "--exports", given["exports"])
    printed = process.communicate()[0]
    print(printed)
    check_code(process, [0], place.folder / "interrupted.log")
    export = Path(re.search(r"^export: (.*)$", printed, re.MULTILINE)[1])  # a run of another name
    after = pd.read_csv(export / "history.csv")
    # the first epoch has a checkpoint; a later one that ended within a second is trained again, which a GPU rounds anew
    assert list(after.epoch) == [1, 2, 3, 4, 5, 6] and after[:1].equals(before[:1]), after
    return Outcome(PASS, f"exit code 130 after {len(before)} of 6 epochs; the rest after --resume")


class Sizes(Callback):
    "Remembers the sizes of training batches; on a CPU, raises what a GPU raises, above a size."

    order = 50

    def __init__(self, most: int | None = None):
        self.sizes, self.most = set(), most

    def before_batch(self):
        if self.training:
            self.sizes.add(len(self.xb[0]))

    def after_pred(self):
        if self.training and self.most is not None and len(self.xb[0]) > self.most:
            raise torch.OutOfMemoryError("simulated")


def out_of_memory(place: Place) -> Outcome:
    """Give a fit three quarters of the memory that it needs; it has to halve its batches, and to end."""
    batch = 16 if place.quick else 128
    given = options(place, batch_size=batch, weights="none", freeze_epochs=0, epochs=1)
    if place.device == "cpu":
        watch, how = Sizes(batch // 2), "simulated"
    else:
        watch = Sizes()
        torch.cuda.reset_peak_memory_stats()
        fit(**given, name="much-memory", callbacks=[watch])
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        assert watch.sizes == {batch}, f"with all memory batches had {watch.sizes} images"
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.75 * peak / total)
        watch, how = Sizes(), f"{0.75 * peak / 1e9:.1f} of {peak / 1e9:.1f} GB"
    result = fit(**given, name="little-memory", callbacks=[watch])
    assert result.status == "complete" and np.isfinite(result.history[-1]["valid_loss"]), result
    assert max(watch.sizes) == batch and min(watch.sizes) < batch, f"batches had {watch.sizes} images"
    return Outcome(PASS, f"{how}: batches of {batch}, then of {min(watch.sizes)} images")


def held_out(place: Place, count: int = 48) -> list[str]:
    return sorted(str(path) for path in (place.folder / "data" / "test").rglob("*.jpeg"))[:count]


def table_of(paths: list[str], export: Path, device: str, precision: str, **more) -> np.ndarray:
    """Return the probabilities (N, classes) that `predict` gives."""
    rows = predict(paths, export, device=device, precision=precision, **more)
    assert rows.error.isna().all(), rows
    return rows.filter(like="p_").to_numpy()


def compare(largest: float, allowed: float, what: str) -> str:
    text = f"{what} {largest:.1e}"
    assert largest <= allowed, f"{text}, more than {allowed:g}"
    return text


def predicted(place: Place) -> Outcome:
    """Predict images on both devices."""
    paths, parts = held_out(place), []
    pixels = torch.stack([torch.from_numpy(np.array(open_image(path, 224)))[None] for path in paths])  # (N, 1, S, S)
    assert equalize(pixels.to(place.device)).cpu().equal(equalize(pixels)), "equalized pixels differ"
    for precision, tta in (("fp32", False), ("bf16", False), ("fp32", True)):
        export = place.folder / "exports" / precision
        there = table_of(paths, export, place.device, precision, tta=tta)
        here = table_of(paths, export, "cpu", "fp32", tta=tta)
        name = precision + (", tta" if tta else "")
        parts.append(compare(np.abs(there - here).max(), SAME[precision], name))
    confident = (np.abs(here[:, 0] - 0.5) > 0.499).mean()
    assert confident < 1, "all probabilities are 0 or 1, which shows nothing"
    return Outcome(PASS, f"{len(paths)} images, largest difference from the CPU in fp32: {'; '.join(parts)}")


def evaluated(place: Place) -> Outcome:
    """Evaluate and interpret on both devices; compare tables, metrics and heat maps."""
    export = place.folder / "exports" / "fp32"
    found = {}
    for device in (place.device, "cpu"):
        given = {"device": device, "precision": "fp32", "output": place.folder / f"output-{device}"}
        one = evaluate(export, split="test", **given)
        two = interpret(export, split="test", top=4, **given)
        assert list(two.path.glob("*.png")), f"no picture in {two.path}"
        tables = [table.sort_values("path").filter(like="p_").to_numpy() for table in (one.predictions, two.table)]
        model, paths = open_model(export, device, "fp32"), held_out(place, 16)
        images = torch.stack([torch.from_numpy(np.array(open_image(path, model.size)))[None] for path in paths])
        found[device] = (*tables, one.metrics.value["roc_auc"], grad_cam(model, images, [1] * len(images)))
    there, here = found[place.device], found["cpu"]
    parts = [
        compare(np.abs(there[0] - here[0]).max(), SAME["fp32"], "evaluate"),
        compare(np.abs(there[1] - here[1]).max(), SAME["fp32"], "interpret"),
        compare(abs(there[2] - here[2]), 0.01, "AUC"),
        compare(np.abs(there[3] - here[3]).max(), SAME_MAP, "heat maps"),
    ]
    return Outcome(PASS, f"largest difference from the CPU: {'; '.join(parts)}")


def served(place: Place) -> Outcome:
    """Ask the server for predictions with heat maps, and stop it by Ctrl-C."""
    export, paths = place.folder / "exports" / "fp32", held_out(place, 8)
    process = command("serve", "--model", export, "--port", 0, "--device", place.device)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("page"):
            break
    else:
        check_code(process, [], place.folder / "serve.log")
    assert any(line.startswith("device") and place.device in line for line in lines), lines
    files = [("file", (Path(path).name, Path(path).read_bytes())) for path in paths]
    answer = requests.post(f"{lines[-1].split()[1]}/predict", files=files, timeout=60)
    assert answer.ok, answer.text
    rows = answer.json()["predictions"]
    assert all(row["image"] and (row["heatmap"] or row["note"]) for row in rows), [row["error"] for row in rows]
    there = pd.DataFrame([row["probabilities"] for row in rows]).to_numpy()
    process.send_signal(signal.SIGINT)
    process.communicate()
    check_code(process, [0, 130], place.folder / "serve.log")
    text = compare(np.abs(there - table_of(paths, export, "cpu", "fp32")).max(), SAME["fp32"], "differs by")
    return Outcome(PASS, f"{len(paths)} files; {text} from the CPU")


def loaded(place: Place) -> Outcome:
    """Load the export by `load_learner`, and learner.pkl by fastai's own, and predict on the device."""
    export, paths, parts = place.folder / "exports" / "fp32", held_out(place, 8), []
    here = table_of(paths, export, "cpu", "fp32")
    ways = {"load_learner": lambda: load_learner(export), "learner.pkl": lambda: load_pickled(export / "learner.pkl")}
    for name, way in ways.items():
        learn = way()
        learn.dls.to(torch.device(place.device))
        learn.model.to(place.device)
        with learn.no_bar(), learn.no_logging():
            there = np.stack([learn.predict(path)[2].cpu().numpy() for path in paths])
        parts.append(compare(np.abs(there - here).max(), SAME_TF32, name))
    return Outcome(PASS, f"largest difference from the CPU: {'; '.join(parts)}")


def onnx(place: Place) -> Outcome:
    """Write the export as ONNX, and compare onnxruntime's probabilities with those of torch on the device."""
    import onnxruntime

    export, paths = place.folder / "exports" / "fp32", held_out(place, 16)
    written = export_onnx(export, place.folder / "fp32.onnx")
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    images = np.stack([np.array(open_image(path, written.model.size))[None] for path in paths])
    (other,) = session.run(["probabilities"], {"images": images})
    largest = np.abs(other - table_of(paths, export, place.device, "fp32")).max()
    text = compare(largest, SAME["fp32"], f"from torch on {place.device}")
    return Outcome(PASS, f"differs by {written.difference:.1e} from torch on the CPU; {text}")


def together(place: Place) -> Outcome:
    """Train and predict in several processes: NCCL on several cards, gloo on a CPU."""
    cards = torch.cuda.device_count() if place.device == "cuda" else 2
    if cards < 2:
        return Outcome(NOT_RUN, "one card: torchrun with NCCL needs two")
    count = min(cards, 4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    given = options(place, name="together", batch_size=(8 if place.quick else 40) * count)
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    subprocess.run([*launch, "-m", "xray_fastai", "fit", *settings], cwd=ROOT, check=True)
    export, rows = Path(given["exports"]) / "together", place.folder / "together.csv"
    ask = ["predict", str(place.folder / "data" / "test"), "--recursive", "--model", str(export)]
    ask += ["--output", str(rows), "--device", place.device, "--precision", "fp32"]
    subprocess.run([*launch, "-m", "xray_fastai", *ask], cwd=ROOT, check=True)
    table = pd.read_csv(rows)
    here = table_of(list(table.path), export, "cpu", "fp32")
    text = compare(np.abs(table.filter(like="p_").to_numpy() - here).max(), SAME["fp32"], "predict differs by")
    backend = "NCCL" if place.device == "cuda" else "gloo"
    return Outcome(PASS, f"{count} processes, {backend}: both phases; {text} from the CPU")
