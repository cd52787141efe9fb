"""Runs fits in forked children, on images and starting weights in one folder."""

from pathlib import Path

import torch
import torchvision

from tests.forked import Forked
from tests.small_network import NAME


class ForkedFits:
    """Runs fits in `root`, whose exports lie in `exports`; `weights.pth` has the weights of a backbone."""

    def __init__(self, root: Path, forked: Forked):
        self.root, self.exports, self.forked = root, root / "exports", forked
        torch.manual_seed(1)
        torch.save(torchvision.models.get_model(NAME).state_dict(), root / "weights.pth")

    def __call__(self, code: int = 0, do: dict | None = None, **settings) -> str:
        """Check the exit code of a fit, and return what it printed."""
        result = self.forked(cwd=str(self.root), fit=settings, **(do or {}))
        assert result["code"] == code, result["output"]
        return result["output"]
