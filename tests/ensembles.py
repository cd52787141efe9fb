"""Makes an export of an ensemble of an export, without training."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from xray_fastai.export.layout import WEIGHTS
from xray_fastai.export.learner import load_learner
from xray_fastai.export.network import load_export
from xray_fastai.export.weights_file import FACTS, GATE, facts_hash
from xray_fastai.model.ensemble import join
from xray_fastai.system.files import sha256

MEMBERS = 3


def joined(export: Path, folder: Path, members: int = MEMBERS, noise: float = 0.2) -> Path:
    """Write an export whose first member is the network of another, and whose others have noise on its weights.

    The gate stays, which is that of the first member; no image is for validation alone.
    """
    networks = []
    for member in range(members):
        model, network, tensors = load_export(export)
        if member:
            torch.manual_seed(member)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(1 + noise * torch.randn_like(parameter))
        networks.append(network)
    model["members"] = members
    model["data"]["valid_files"] = []
    state = {name: tensor.contiguous() for name, tensor in join(networks, model["dropout"]).state_dict().items()}
    state |= {name: torch.from_numpy(tensor) for name, tensor in tensors.items() if name.startswith(GATE)}
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("learner.pkl", "evaluation-*", "interpretation-*"))
    (folder / WEIGHTS).write_bytes(save(state, metadata={FACTS: facts_hash(model)}))
    model["weights"] |= {"tensors": len(state), "sha256": sha256(folder / WEIGHTS)}
    (folder / "model.json").write_text(json.dumps(model))
    load_learner(folder).export((folder / "learner.pkl").resolve())
    return folder
