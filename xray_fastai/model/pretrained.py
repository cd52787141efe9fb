"""Reads pretrained weights of a torchvision network from torch hub's cache, the internet or a file; never unpickles."""

import pickle
import re
import socket
import sys
import urllib.parse
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file

from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import on_terminal

TIMEOUT = 20  # seconds without data after which a download counts as offline

# the published files of densenet name layers `norm.1`, torchvision's network `norm1` (torchvision/models/densenet.py)
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_\w+))$")


def pretrained_state(arch: str, weights: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read a network's pretrained tensors under torchvision's names.

    Args:
        arch: torchvision's name of the network.
        weights: `imagenet`, or a file: `.safetensors`, or `.pth` (read with `weights_only=True`).

    Returns:
        The tensors, and a short name of their origin.

    Raises:
        UserError: the weights are not cached and cannot be downloaded, or the file is missing or holds no weights.
    """
    return _imagenet(arch) if weights == "imagenet" else _from_file(Path(weights))


def load_backbone(network: torch.nn.Module, classifier: str, state: dict[str, torch.Tensor], origin: str) -> None:
    """Copy pretrained tensors into a torchvision network, without those of its classifier.

    Args:
        network: built by torchvision.
        classifier: prefix of the classifier's tensors.
        state: tensors under torchvision's names.
        origin: where they came from, for the error.

    Raises:
        UserError: tensors are missing, unknown to this network, of another shape, or not finite; the message names
            them.
    """
    prefix = f"{classifier}."
    state = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items() if not name.startswith(prefix)}
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(prefix)}
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # files from before torch 0.4.1 lack them
    faults = [
        ("missing", sorted(own.keys() - optional - state.keys())),
        ("unknown", sorted(state.keys() - own.keys())),
        (
            "of another shape",
            [
                f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
                for name in sorted(own.keys() & state.keys())
                if state[name].shape != own[name].shape
            ],
        ),
    ]
    if any(names for _, names in faults):
        details = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults if names)
        raise UserError(f"{origin}: not the weights of this arch= ({details})")
    if not_finite := [name for name, tensor in state.items() if not torch.isfinite(tensor.float()).all()]:
        raise UserError(f"{origin}: {not_finite[0]} holds values that are not finite; get the file again")
    network.load_state_dict(state, strict=False)


def _imagenet(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    enum = torchvision.models.get_model_weights(arch)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    choices = [enum.DEFAULT, *(choice for choice in enum if choice is not enum.DEFAULT)]
    for choice in choices:
        cached = cache / Path(urllib.parse.urlparse(choice.url).path).name
        if cached.exists():
            return _from_file(cached)[0], f"{choice} ({cached.name}, cached)"
    name = Path(urllib.parse.urlparse(enum.DEFAULT.url).path).name
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return enum.DEFAULT.get_state_dict(
            progress=on_terminal(sys.stderr), check_hash=True, weights_only=True
        ), f"{enum.DEFAULT} ({name})"
    except (OSError, RuntimeError) as error:
        reason = str(getattr(error, "reason", None) or error).splitlines()[0]
        raise UserError(
            f"{name} could not be downloaded ({reason}). On a computer with internet, download "
            f"{enum.DEFAULT.url}; put it into {cache}, or give it by weights=FILE. "
            'To train from scratch, give weights="none"',
            option="weights",
            value="imagenet",
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _from_file(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    if not path.is_file():
        raise UserError(
            "no such file or export; give imagenet, none, an export, or a .pth or .safetensors file",
            option="weights",
            value=path,
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            "holds more than tensors, so that loading it could run code, or is no weights file; "
            "save a state_dict, best as .safetensors",
            option="weights",
            value=path,
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, SafetensorError) as error:
        # torch reads any bytes as steps of a pickle: an error of a look-up says nothing to the user
        known = str(error) and not isinstance(error, LookupError)
        reason = str(error).splitlines()[0] if known else "it is damaged, or holds something else"
        raise UserError(f"not a readable weights file ({reason}); get it again", option="weights", value=path) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError("not a state_dict (names to tensors); save network.state_dict()", option="weights", value=path)
    prefix = "module."  # of torch's DataParallel
    if state and all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, path.name
