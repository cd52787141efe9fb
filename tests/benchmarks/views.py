"""Estimates how each image is framed (stretch, zoom, shift, rotation) from its pixels alone.

    XRAY_DATA=chest_xray python -m tests.benchmarks.views [FOLDER OF ORIGINALS]

Images that were squeezed into squares have lost their shape. A small network learns to estimate by how much an image
was stretched, zoomed, shifted and rotated on purpose (as in Gidaris et al., Unsupervised representation learning by
predicting image rotations, ICLR 2018). Its estimate for an unchanged image of a patient it was not trained on says how
the image differs from the usual one. The output is how good the estimates are (R2 on new patients), and how well each
estimate alone separates the classes: a ROC AUC far from 0.5 is a shortcut. With the original files it also prints the
correlation of the stretch with log(width / height), which is negative if squeezing is visible.

`tests.benchmarks.shift` holds out the least usual images by this: HOLDOUTS=stretch,zoom.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from torch import nn
from torchvision.models import resnet18

from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.data.sources import phantom
from xray_fastai.model.preprocessing import equalize

# -----------------------------------------------------------------------------
SIDE, BATCH, EPOCHS = 64, 64, 14
MAX_CHANGES = {"stretch": 0.35, "zoom": 0.35, "left": 0.12, "up": 0.12, "rotation": 0.26}
"""The maximum change of an image: log ratios, fractions of half a side, radians."""
# -----------------------------------------------------------------------------


def changed(images: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Stretch, zoom, shift and rotate images (B, 1, S, S) `by` (B, 5), in the order of `MAX_CHANGES`."""
    stretch, zoom, left, up, angle = by.unbind(1)
    x, y = torch.exp(-zoom - stretch / 2), torch.exp(-zoom + stretch / 2)
    rows = [x * angle.cos(), -x * angle.sin(), left, y * angle.sin(), y * angle.cos(), up]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def drawn(count: int) -> torch.Tensor:
    """Draw changes (count, 5), each uniform up to its maximum."""
    return (2 * torch.rand(count, len(MAX_CHANGES)) - 1) * torch.tensor(list(MAX_CHANGES.values()))


def trained(images: torch.Tensor) -> nn.Module:
    """Train a network that estimates the changes of images (N, 1, S, S), divided by their maxima: (N, 5)."""
    net = resnet18(num_classes=len(MAX_CHANGES))
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * steps + 1)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            by = drawn(BATCH)
            batch = changed(images[chosen], by).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                estimates = net(batch)
            loss = F.mse_loss(estimates.float(), by / torch.tensor(list(MAX_CHANGES.values())))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def estimate(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the network's estimates of the changes (N, 5)."""
    return torch.cat([net(part) for part in images.split(256)]) * torch.tensor(list(MAX_CHANGES.values()))


def views(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Estimate how each image is framed, by a network not trained on its patient; also return R2 of the estimates."""
    torch.manual_seed(0)
    pixels = np.stack([np.asarray(open_image(path, SIDE)) for path in table.path])
    images = equalize(torch.from_numpy(pixels)[:, None]).float().div(255).sub(0.5).div(0.25)  # (N, 1, S, S)
    estimates, by, checked = (torch.zeros(len(table), len(MAX_CHANGES)) for _ in range(3))
    for train, rest in GroupKFold(2).split(table, groups=table.patient):
        net = trained(images[train])
        estimates[rest] = estimate(net, images[rest])
        estimates[rest] -= estimates[rest].mean(0)  # two networks: each relative to its own mean
        by[rest] = drawn(len(rest))
        checked[rest] = estimate(net, changed(images[rest], by[rest]))
    how_well = r2_score(by, checked, multioutput="raw_values")
    return pd.DataFrame(estimates.numpy(), columns=list(MAX_CHANGES), index=table.index), pd.Series(
        how_well, index=list(MAX_CHANGES)
    )


def main(originals: list[str]) -> None:
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    estimates, how_well = views(table)
    positive = table.label.eq("PNEUMONIA")
    rows = {
        name: {
            "R2": how_well[name],
            "normal": values[~positive].mean(),
            "pneumonia": values[positive].mean(),
            "spread": values.std(),
            "AUC": roc_auc_score(positive, values),
        }
        for name, values in estimates.items()
    }
    print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format))
    for folder in originals:
        shapes = {path.name: Image.open(path).size for path in Path(folder).rglob("*") if path.is_file()}
        rows = table.file.map(lambda file: Path(file).name)
        wide = np.log(rows.map({name: width / height for name, (width, height) in shapes.items()}).astype(float))
        print(f"{wide.notna().sum()} originals: correlation with the stretch {wide.corr(estimates.stretch):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
