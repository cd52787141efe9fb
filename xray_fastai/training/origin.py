"""Says where the weights come from that a fit starts with, and reads those of an export: `fit --weights EXPORT`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xray_fastai.config.choices import members_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.layout import WEIGHTS
from xray_fastai.export.model_json import read_settings
from xray_fastai.export.reader import export_in_weights, lineage_of, read
from xray_fastai.export.weights_file import network_part, read_weights, split_tensors
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown

HEAD = "1."
"""The names of the head's tensors begin with this."""
NAMED = 4
"""Classes of the parent that its origin lists; of more it gives the number."""


@dataclass(frozen=True)
class Origin:
    """Says where the weights came from that training starts with."""

    name: str  # for people
    pretrained: bool  # False: random weights, trained from scratch
    lineage: list[dict[str, str]] = field(default_factory=list)  # exports that training continues from (`model.json`)


@dataclass(frozen=True)
class Parent:
    """Describes the export that a fit continues from."""

    folder: Path
    settings: dict[str, Any]  # model.json

    def weights(self, classes: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of each of its networks, by their names in the `model.safetensors` of one network.

        The head is left out if its classes are others.

        Args:
            classes: of the new model, in the order of its outputs.

        Raises:
            UserError: the file is damaged.
        """
        tensors = network_part(read_weights(self.folder, WEIGHTS, self.settings))
        keeps_head = self._has(classes)
        whole = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        states = split_tensors(whole, members_of(self.settings))
        return [{k: t for k, t in state.items() if keeps_head or not k.startswith(HEAD)} for state in states]

    def origin(self, classes: Sequence[str]) -> Origin:
        """Return where the weights come from, and whether the head is among them."""
        name, own = shown(self.folder.resolve().name), self.settings["classes"]
        listed = ", ".join(own) if len(own) <= NAMED else count_of(len(own), "other")
        head = "" if self._has(classes) else f", but a new head: its classes are {listed}"
        return Origin(f"of the export {name}{head}", True, lineage_of(self.folder, self.settings))

    def _has(self, classes: Sequence[str]) -> bool:
        return self.settings["classes"] == list(classes)


def origin_of(kept: dict[str, Any], config: FitConfig) -> Origin:
    """Return the origin of the weights in a checkpoint, of what was kept beside it."""
    # settings written by version 0.1.0 lack "pretrained", those of 0.2.0 "lineage"
    pretrained = kept.get("pretrained", config.weights != "none")
    return Origin(kept["origin"], pretrained, kept.get("lineage", []))


def parent_of(config: FitConfig) -> Parent | None:
    """Return the export in `weights`, or None.

    Raises:
        UserError: it is a folder, but no export or a damaged one.
    """
    folder = export_in_weights(config.weights)
    return None if folder is None else Parent(folder, read(folder))


def with_parents_choices(config: FitConfig) -> FitConfig:
    """Return a copy with network, size and contrast of the export in `weights`, where the user gave none.

    Raises:
        UserError: as `parent_of`; or the user gave another network, or an input range, which an export has itself.
    """
    folder = export_in_weights(config.weights)
    if folder is None:
        return config
    if config.weights_range is not None:
        raise UserError("is for a file in weights=; leave it out", option="weights_range", value=config.weights_range)
    model = read_settings(folder)
    arch, preprocessing = model["architecture"], model["preprocessing"]
    if config.arch not in (None, arch):
        raise UserError(f"{folder} is a {arch}; leave it out, or give other weights", option="arch", value=config.arch)
    if (members := members_of(model)) not in (1, config.members):
        if config.members == 1:  # the default, which nobody typed
            fault = f"it holds {members} networks, which cannot go on as one; give members={members} to train each on"
            raise UserError(fault, option="weights", value=config.weights)
        fault = f"{folder} holds {members} networks; give {members}, so that each is trained on"
        raise UserError(fault, option="members", value=config.members)
    contrast = preprocessing.get("contrast", "none")
    return config.with_choices(arch=arch, size=preprocessing["size"], contrast=contrast)
