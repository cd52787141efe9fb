"""Makes the torch network of an export; predicting, serving and ONNX need no more, and fastai stays out of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xray_fastai.config.choices import members_of
from xray_fastai.export.layout import WEIGHTS
from xray_fastai.export.reader import find_export, read
from xray_fastai.export.weights_file import network_part, read_weights
from xray_fastai.model.architectures import build_network, on_start
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown


def load_network(path: str | Path) -> tuple[dict[str, Any], nn.Sequential]:
    """Return the settings of an export (`model.json`), and its network on the CPU, in evaluation mode.

    The network maps (B, 3, size, size) to logits (B, classes). Its first part is the backbone, its second the head.

    Raises:
        UserError: the folder is no export, was written by a newer version, or is damaged.
    """
    model, network, _ = load_export(path)
    return model, network


def load_export(path: str | Path) -> tuple[dict[str, Any], nn.Sequential, dict[str, np.ndarray]]:
    """Return what `load_network` returns, and all tensors of the export: the gate's are among them.

    Raises:
        UserError: as `load_network`.
    """
    folder = find_export(path)
    model = read(folder)
    arch, size = model["architecture"], model["preprocessing"]["size"]
    with on_start(arch):
        network = build_network(arch, len(model["classes"]), model["dropout"], size, members_of(model))
    tensors = load_weights(network, folder, model)
    return model, network.eval(), tensors


def load_weights(network: nn.Module, folder: Path, model: dict[str, Any]) -> dict[str, np.ndarray]:
    """Load the weights in `folder` into a network that was built `on_start`; one on "meta" moves to the CPU.

    Returns:
        All tensors of the file.

    Raises:
        UserError: the weights are damaged, or not those of `model`, the settings; or the installed timm builds another
            network of that name.
    """
    tensors = read_weights(folder, WEIGHTS, model)
    state = {name: torch.from_numpy(tensor) for name, tensor in network_part(tensors).items()}
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in state.items()}:
        trained = model["versions"].get("timm", "another version")
        raise UserError(
            f"{folder}: the installed timm builds another {model['architecture']} than timm {shown(trained)}, with "
            "which it was trained; install that version"
        )
    if next(network.parameters()).is_meta:
        network.to_empty(device="cpu")
    network.load_state_dict(state)
    return tensors
