"""Folds the input that a network was trained on into its first convolution, so that it takes this package's input."""

import torch

from xray_fastai.model.preprocessing import MEAN, STD


def fold_input(weight: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Rewrite a first convolution for grey images in this package's normalization; its outputs stay the same.

    A grey value g enters the source as (g - mean_c) / std_c, and this package's networks as (g - MEAN_c) / STD_c. A
    tap of the source with the weights w_c adds a g - b to the output, with a = sum w_c / std_c and b = sum w_c mean_c /
    std_c. The new weights v_c add the same if sum v_c / STD_c = a and sum v_c MEAN_c / STD_c = b. The three means
    differ, so there are solutions, and the smallest is taken. No bias is needed. So the borders are right, too: a tap
    on the zeros around an image adds nothing, in the source and here.

    Args:
        weight: (outputs, channels, h, w), of one channel or three.
        mean: of each channel, if black is 0 and white is 1.
        std: as `mean`.

    Returns:
        (outputs, 3, h, w).
    """
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    taps = weight.double() / std
    target = torch.stack([taps.sum(1), (taps * mean).sum(1)], dim=1)  # a and b: (outputs, 2, h, w)
    ours, scale = torch.tensor(MEAN, dtype=torch.float64), 1 / torch.tensor(STD, dtype=torch.float64)
    smallest = torch.linalg.pinv(torch.stack([scale, ours * scale]))  # (3, 2)
    return torch.einsum("ct,othw->ochw", smallest, target).to(weight.dtype)


def of_range(black: float, white: float) -> tuple[tuple[float], tuple[float]]:
    """Return what `fold_input` takes, mean and standard deviation, of a channel whose input is `black` to `white`."""
    return (-black / (white - black),), (1 / (white - black),)
