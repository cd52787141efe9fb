"""Writes an export as one ONNX file that runs without torch.

Input `images`: 8-bit grey values (N, 1, size, size), as `images.open_image(file, size)` gives them. Output
`probabilities`: (N, classes), float32. N is free. The graph does what `predict` does: histogram equalization if the
export has it, scaling, ImageNet's normalization to three channels, the network, temperature and intercepts, softmax.
The file's metadata holds what else a user of the model needs, as text, or as JSON for a list or an object.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xray_fastai import __version__
from xray_fastai.config.choices import members_of, network_of
from xray_fastai.data.sources.phantom import draw
from xray_fastai.export.reader import find_export
from xray_fastai.inference.model import Model, open_model
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.files import atomic_write, check_new
from xray_fastai.system.signals import sigterm_raises
from xray_fastai.system.text import shown

OPSET = 18
"""ONNX 1.13 of December 2022, which onnxruntime reads from 1.14 on. Equalization needs 16 (ScatterElements can add)."""
IMAGES, TOLERANCE = 32, 1e-4
"""The number of images that are compared, and the largest difference of a probability from torch's that is accepted.
With onnxruntime 1.32 the largest difference was 4e-6: each of the seven architectures at 64 px, ResNet50 and ConvNeXt
also at 224 px, with random weights."""

NO_GATE = "none: any picture gets probabilities; check elsewhere that it is an X-ray like the training images"
"""What the file and the terminal say of the gate, which compares more than the graph computes."""


@dataclass(frozen=True)
class Exported:
    """Describes a file that was written, and how it was checked."""

    path: Path
    model: Model
    difference: float  # the largest difference of a probability from torch's

    def __str__(self) -> str:
        model, size = self.model, self.model.size
        return "\n".join(
            [
                f"{'model':<14}{model.path}: {network_of(model.settings)}, {size} x {size} px",
                f"{'input':<14}images: 8-bit grey values (N, 1, {size}, {size}), decoded and resized, nothing else",
                f"{'output':<14}probabilities: (N, {len(model.classes)}): {', '.join(model.classes)}",
                f"{'':<14}{model.describe_probabilities()}",
                f"{'gate':<14}{NO_GATE}",
                f"{'checked':<14}{IMAGES} images in onnxruntime: probabilities within {self.difference:.1e} of torch's",
                f"{'written':<14}{self.path}, {self.path.stat().st_size / 1e6:.1f} MB",
            ]
        )


def export_onnx(export: str | Path | None = None, output: str | Path | None = None) -> Exported:
    """Write an export as an ONNX file, and check that it gives torch's probabilities; otherwise no file is left.

    Args:
        export: its folder; None takes the default (`export.reader.find_export`).
        output: a new file; None takes <run>.onnx in the current folder.

    Raises:
        UserError: the extra `onnx` is not installed, there is no export or a damaged one, the file exists or cannot be
            written, or its probabilities in onnxruntime differ from torch's.
    """
    if output is None and export is not None:
        output = f"{Path(export).resolve().name}.onnx"
    if output is not None:
        check_new(Path(output), "output")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime leaves an identifier in the user's cache
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f'{error.name} is not installed; pip install "xray-fastai[onnx]"') from None

    export = find_export(export)
    output = Path(f"{export.resolve().name}.onnx") if output is None else Path(output)
    check_new(output, "output")
    model = open_model(export, "cpu")
    with sigterm_raises():
        try:
            with atomic_write(output, sync=True) as file:
                _write(model, file, {"onnx": onnx.__version__})
                difference = _difference(model, file, onnxruntime)
                if not difference <= TOLERANCE:  # NaN is not accepted either
                    raise UserError(
                        f"{output}: not written: in onnxruntime {onnxruntime.__version__} a probability differs from "
                        f"torch's by {difference:.2g}, more than {TOLERANCE:g}; try another version of either"
                    )
        except OSError as error:
            raise UserError(
                f"cannot be written ({reason(error)}); free space, or give another name", option="output", value=output
            ) from None
    return Exported(output, model, difference)


def _write(model: Model, path: Path, versions: dict[str, str]) -> None:
    import onnx

    images = torch.zeros(2, 1, model.size, model.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        # torch warns that this is the older of its two exporters. The newer one needs onnxscript, too. A network of
        # convolutions without control flow needs nothing that the older one lacks, and the file is checked.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _graph(model),
            (images,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_axes={"images": {0: "N"}, "probabilities": {0: "N"}},
        )
    written = onnx.load(path)
    written.producer_name, written.producer_version = "xray-fastai", __version__
    written.doc_string = model.settings["disclaimer"]
    onnx.helper.set_model_props(written, _metadata(model, versions))
    onnx.checker.check_model(written, full_check=True)
    onnx.save(written, path)


def _graph(model: Model) -> torch.nn.Module:
    """Build the module that maps 8-bit images (N, 1, size, size) to probabilities (N, classes)."""

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model.network
            self.preprocessing = Preprocessing(model.settings["preprocessing"].get("contrast", "none"))
            self.temperature = model.scaling.temperature
            intercepts = model.scaling.intercepts or [0.0] * len(model.classes)
            self.register_buffer("intercepts", torch.tensor(intercepts))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs = self.network(self.preprocessing(images))  # (N, classes)
            return torch.softmax(outputs / self.temperature + self.intercepts, dim=1)

    return Graph().eval()


def _metadata(model: Model, versions: dict[str, str]) -> dict[str, str]:
    settings = model.settings
    values = {
        "export": model.path.resolve().name,
        "disclaimer": settings["disclaimer"],
        "architecture": settings["architecture"],
        "members": members_of(settings),
        "classes": model.classes,
        "positive": model.positive,
        "threshold": model.threshold,
        "temperature": model.scaling.temperature,
        "intercepts": model.scaling.intercepts,
        "calibration_kind": model.scaling.kind,
        "calibration": settings["calibration"],
        "size": model.size,
        "preprocessing": settings["preprocessing"],
        "rehearsal": settings["data"]["rehearsal"],
        "gate": NO_GATE,
        "created": settings["created"],
        "weights_sha256": settings["weights"]["sha256"],
        "versions": settings["versions"],  # of the fit
        "exported_by": {"xray-fastai": __version__, "torch": torch.__version__, **versions},
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
        if value is not None
    }


def _difference(model: Model, path: Path, onnxruntime) -> float:
    """Compare onnxruntime's probabilities with torch's, over batches of several sizes.

    Returns:
        The largest difference; NaN if one is not finite.

    Raises:
        UserError: onnxruntime does not run the file.
    """
    images = _test_images(model.size)  # (IMAGES, 1, size, size)
    batch_size = max(2, 8 * 224**2 // model.size**2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    largest = 0.0
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for batch in np.split(images, [1, *range(3, IMAGES, batch_size)]):
            (from_onnx,) = session.run(["probabilities"], {"images": batch})
            from_torch = model.probabilities(model.logits(torch.from_numpy(batch)).numpy())
            largest = np.maximum(largest, np.abs(from_onnx - from_torch).max())  # NaN stays NaN
    except Exception as error:  # onnxruntime's errors have no common base class
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        raise UserError(
            f"onnxruntime {onnxruntime.__version__}: cannot run the written file ({shown(error, 200)}); try another "
            "version of it"
        ) from None
    return float(largest)


def _test_images(size: int) -> np.ndarray:
    """Make images of many kinds (IMAGES, 1, size, size): synthetic X-rays, noise, gradients, blank ones, borders."""
    rng, side = np.random.default_rng(0), min(size, 256)
    drawn = [
        np.asarray(draw(rng, disease, side).resize((size, size), Image.Resampling.BILINEAR))
        for disease in 6 * [None, "bacteria", "virus"]
    ]
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    bordered = drawn[0].copy()
    bordered[:, : size // 4] = 0
    others = [
        *(np.full((size, size), grey, np.uint8) for grey in (0, 7, 8, 128, 255)),
        np.tile(ramp, (size, 1)),
        np.tile(ramp[:, None], (1, size)),
        bordered,
        *(
            rng.integers(low, high, (size, size), np.uint8, endpoint=True)
            for low, high in [(0, 255), (0, 15), (90, 95)]
        ),
        *(rng.normal(128, spread, (size, size)).clip(0, 255).astype(np.uint8) for spread in (5, 30, 80)),
    ]
    return np.stack([*drawn, *others])[:, None]
