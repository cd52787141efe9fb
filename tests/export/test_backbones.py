"""`backbones.json`, by which weights are checked without torch, has the tensors of torchvision's networks.

python -m tests.export.test_backbones      # writes it again, for instance after an architecture was added
"""

import json
from pathlib import Path

import pytest
import torch

import xray_fastai.export
from tests.small_network import TORCHVISIONS
from xray_fastai.export.weights_file import BACKBONES, layout_of, size_of
from xray_fastai.model.architectures import build_network
from xray_fastai.model.learner import build_learner
from xray_fastai.model.loaders import empty_loaders

TYPES = {torch.float32: "F32", torch.int64: "I64"}


def tensors_of(network):
    return {name: (TYPES[tensor.dtype], list(tensor.shape)) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_the_table_has_the_tensors_of_the_network(arch):
    with torch.device("meta"):
        network = build_network(arch, 3, 0.5)
    assert layout_of(arch, 3) == tensors_of(network), "write the table again: python -m tests.export.test_backbones"
    assert size_of(layout_of(arch, 3)) == sum(tensor.nbytes for tensor in network.state_dict().values())


@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_the_network_is_the_one_that_fastai_trains(arch):
    dls = empty_loaders(["A", "B"], 32)
    with torch.device("meta"):
        network = build_network(arch, 2, 0.25)
        learn = build_learner(dls, arch, dropout=0.25)
    assert repr(network) == repr(learn.model)  # each layer with its settings
    assert tensors_of(network) == tensors_of(learn.model)


def main():
    lines = []
    for arch in TORCHVISIONS:
        with torch.device("meta"):
            backbone = build_network(arch, 2, 0.5)[0]
        shapes = {f"0.{name}": list(tensor.shape) for name, tensor in backbone.state_dict().items()}
        lines.append(f'"{arch}": {json.dumps(shapes, separators=(",", ":"))}')
    path = Path(xray_fastai.export.__file__).with_name(BACKBONES)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
