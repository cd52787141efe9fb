"""Reads pretrained weights of a backbone from torch hub's cache, the internet or a file; never unpickles."""

import pickle
import re
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file

from xray_fastai.config.checks import range_of
from xray_fastai.config.choices import TIMM
from xray_fastai.model.architectures import build_whole
from xray_fastai.model.checkpoint import Match, backbone_of, tensors_of
from xray_fastai.model.input_range import fold_input, of_range
from xray_fastai.model.preprocessing import MEAN, STD
from xray_fastai.model.timm_networks import check_first_layer, config_of, published
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import on_terminal
from xray_fastai.system.text import shown

TIMEOUT = 20  # seconds without data after which a download counts as offline
XRV_URL = (
    "https://github.com/mlmed/torchxrayvision/releases/download/v1/pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
)
"""torchxrayvision's `resnet50-res512-all` (Cohen et al., TorchXRayVision: A library of chest X-ray datasets and models,
MIDL 2022; torchxrayvision/models.py): trained at 512 px on five public collections of chest X-rays, for 18 findings."""
XRV_ARCH, XRV_RANGE = "resnet50", (-1024.0, 1024.0)
"""Its architecture, and what black and white are in its one channel (torchxrayvision/utils.py: `normalize`)."""
HASH = re.compile(r"-([0-9a-f]{8})\.")
"""The first digits of the SHA-256 in the name of a file of torchvision."""


def pretrained_state(arch: str, weights: str, weights_range: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """Read the pretrained tensors of a backbone, for the input that this package gives it.

    Args:
        arch: a name in `ARCHITECTURES`.
        weights: `imagenet`, `xrv`, or a file: `.safetensors`, or of `torch.save` (read with `weights_only=True`).
        weights_range: what black and white are in the input that a file's network was trained on (`FitConfig`); None
            is ImageNet's normalization.

    Returns:
        The tensors under torchvision's names, and for people where they come from and what was not taken.

    Raises:
        UserError: the weights are not cached and cannot be downloaded, or the file is missing, holds no weights, or
            those of another network; or its network takes one channel, and the range is missing.
    """
    if weights == "imagenet" and arch.startswith(TIMM):
        tensors, name = published(arch)
        return _for_our_input(backbone_of(arch, tensors, name), *_normalization(arch)), name
    if weights == "imagenet":
        tensors, name = _imagenet(arch)
        return backbone_of(arch, tensors, name).state(), name
    if weights == "xrv":
        return _xrv(arch)
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            "no such file or export; give imagenet, none, an export, or a .pth or .safetensors file",
            option="weights",
            value=path,
        )
    found, black_white = backbone_of(arch, _read(path), path.name), range_of(weights_range)
    if black_white is None and found.channels == 1:
        raise UserError(
            f'{path.name} is of a network for one channel; give what black and white are in its input, such as "0,1"',
            option="weights_range",
        )
    taken = "" if black_white is None else f", for an input of {black_white[0]:g} to {black_white[1]:g}"
    mean, std = _normalization(arch) if black_white is None else of_range(*black_white)
    return _for_our_input(found, mean, std), f"{path.name}: {found.describe()}{taken}"


def _normalization(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the channels that published weights of an architecture expect."""
    if not arch.startswith(TIMM):
        return MEAN, STD
    config = config_of(arch)
    return tuple(config.mean), tuple(config.std)


def _for_our_input(found: Match, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors with a first layer that takes images as `Preprocessing` gives them.

    Args:
        found: the tensors of a network that was trained on another input.
        mean: of its channels, or of one for all of them.
        std: as `mean`.

    Raises:
        UserError: the first layer of one of timm's networks cannot be rewritten.
    """
    state = found.state()
    if (mean, std) == (MEAN, STD):
        return state
    if found.arch.startswith(TIMM):
        check_first_layer(build_whole(found.arch), found.first_layer, found.arch)
    mean, std = (values * found.channels if len(values) == 1 else values for values in (mean, std))
    return state | {found.first_layer: fold_input(state[found.first_layer], mean, std)}


def _xrv(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    if arch != XRV_ARCH:
        raise UserError(
            f'are those of {XRV_ARCH}, and arch= is {arch}; give arch="{XRV_ARCH}", or other weights',
            option="weights",
            value="xrv",
        )
    file = _in_cache(XRV_URL)
    file = file if file.exists() else _download(XRV_URL, "xrv")
    found = backbone_of(arch, _read(file), file.name)
    name = f"torchxrayvision resnet50-res512-all ({file.name}: {found.describe()})"
    return _for_our_input(found, *of_range(*XRV_RANGE)), name


def _imagenet(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    enum = torchvision.models.get_model_weights(arch)
    choices = [enum.DEFAULT, *(choice for choice in enum if choice is not enum.DEFAULT)]
    for choice in choices:
        if (cached := _in_cache(choice.url)).exists():
            return _read(cached), f"{choice} ({cached.name}, cached)"
    file = _download(enum.DEFAULT.url, "imagenet")
    return _read(file), f"{enum.DEFAULT} ({file.name})"


def _in_cache(url: str) -> Path:
    """Return where torch hub keeps the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlparse(url).path).name


def _download(url: str, weights: str) -> Path:
    """Download a file into torch hub's cache.

    Args:
        url: the address. Where the file's name has digits of its SHA-256, they are checked.
        weights: the value of `weights` that asks for it.

    Raises:
        UserError: it cannot be downloaded.
    """
    file, digits = _in_cache(url), HASH.search(url)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), digits and digits[1], progress=on_terminal(sys.stderr))
    except (OSError, RuntimeError) as error:
        reason = str(getattr(error, "reason", None) or error).splitlines()[0]
        raise UserError(
            f"{file.name} could not be downloaded ({reason}). On a computer with internet, download "
            f"{url}; put it into {file.parent}, or give it by weights=FILE. "
            'To train from scratch, give weights="none"',
            option="weights",
            value=weights,
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a file by their dotted names.

    Raises:
        UserError: it is damaged, no weights file, or holds more than tensors.
    """
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise UserError(_conversion(path, str(error)), option="weights", value=path) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, SafetensorError) as error:
        if "TorchScript" in str(error):
            fault = "a TorchScript archive, which holds code besides tensors; save network.state_dict()"
            raise UserError(fault, option="weights", value=path) from None
        # torch reads any bytes as steps of a pickle: an error of a look-up says nothing to the user
        known = str(error) and not isinstance(error, LookupError)
        reason = str(error).splitlines()[0] if known else "it is damaged, or holds something else"
        raise UserError(
            f"not a readable weights file ({shown(reason, 120)}); get it again", option="weights", value=path
        ) from None
    tensors = tensors_of(content)
    if tensors is None:
        raise UserError("holds no tensors by name; save network.state_dict()", option="weights", value=path)
    return tensors


def _conversion(path: Path, error: str) -> str:
    """Return what to do about a file that torch refuses to read, which says so in `error`."""
    match = re.search(r"GLOBAL (\S+)", error)
    if match is None:
        return "no weights file, or holds more than tensors, so that loading it could run code; save a state_dict"
    new = path.with_name(f"{path.stem}-tensors.pth")
    # the blanks around = keep `system.text.as_typed` from taking it for one of this package's options
    return (
        f"holds {shown(match[1])} besides tensors, so that loading it could run code. If you trust who made it, these "
        "two lines of Python keep its tensors:\n"
        f"import torch; c = torch.load({str(path)!r}, 'cpu', weights_only = False)\n"
        "torch.save({k: v for k, v in (c if isinstance(c, dict) else c.state_dict()).items() if torch.is_tensor(v) or "
        f"isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}}, {str(new)!r})"
    )
