"""Turns 8-bit images into the network's input: histogram equalization, scaling, ImageNet's normalization.

Plain torch: `Preprocessing` serves prediction, ONNX and heat maps, which run without fastai. Training and
`load_learner` take the same `equalize`, `MEAN` and `STD` through fastai's transforms (`loaders.xray_block`), with the
augmentation between them.
"""

import torch
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of each channel, if white is 1: what torchvision's pretrained weights were trained with."""
BLACK = 8
"""Grey values below this one belong to a border or to the air beside the body, and are not counted."""


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Spread the grey values of each image evenly over 0 to 255 (Gonzalez & Woods, Digital Image Processing, 3.3.1).

    A change of exposure, window or gamma then has no effect, in training and in use, as long as no two grey values
    become one and none becomes black. Black pixels are not counted, so a black border does not change the rest of the
    image. Input and output are 8-bit (B, 1, S, S). An ONNX file has this function in its graph, for any B.
    """
    values = images.flatten(1).long()  # (B, S * S)
    counts = torch.zeros(images.shape[0], 256, device=images.device).scatter_add_(
        1, values, torch.ones_like(values, dtype=torch.float32)
    )
    counts[:, :BLACK] = 0
    below = counts.cumsum(1)  # (B, 256)
    table = (255 * below / below[:, -1:].clamp_min(1)).round()
    return table.gather(1, values).view(images.shape).to(torch.uint8)


class Preprocessing(nn.Module):
    """Maps 8-bit images (B, 1, S, S) to the network's input (B, 3, S, S), on the device that it was moved to."""

    def __init__(self, contrast: str):
        """Take `contrast` as `model.json` has it: equalize or none."""
        super().__init__()
        self.equalizes = contrast == "equalize"
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.equalizes:
            images = equalize(images)
        return (images.float() / 255 - self.mean) / self.std  # (B, 3, S, S)
