"""Measures how well heat maps find the opacities of drawn X-rays, whose places are known.

    python -m tests.benchmarks.heatmaps EXPORT [EXPORT ...]

It draws IMAGES pneumonias that no fit has seen, and maps the evidence for the class to detect. An opacity's box is the
bounding box of a connected region that is denser by DENSE than the lung. For each method:

    pointing    the share of images in which the map's maximum lies in a box (Zhang et al., Top-down neural attention
                by excitation backprop, IJCV 2018); a blank map misses
    energy      the share of the map's sum that lies in the boxes, over the share of the image that the boxes cover: 1
                is chance (Wang et al., Score-CAM, CVPR workshops 2020)
    cost        CPU time over that of Grad-CAM, the least of ROUNDS, all methods in turns

The row "chance" is a map without a maximum. The methods:

    Grad-CAM          Selvaraju et al., ICCV 2017; last block. The head is pooling and one linear layer, so HiResCAM
                      (Draelos & Carin, arXiv:2011.08891) of this block is the same map, and so is CAM
    of the log-odds   the same of log p / (1 - p), where Grad-CAM takes the logit of the class alone
    enlarged          Grad-CAM of the image enlarged twice
    shifted           Grad-CAM of 16 copies of the image, shifted by a quarter of a cell each: the cells lie
                      between each other (shift-and-stitch; Long et al., Fully convolutional networks, CVPR 2015)
    HiResCAM, LayerCAM    of the last block with 2 or 4 times as many cells a side (Jiang et al., LayerCAM, IEEE TIP
                      2021)
    smoothed          HiResCAM, each cell the mean of the 3 x 3 around it
    integrated        HiResCAM with the mean of the gradients of 8 images between a grey one and the image, times the
                      change of the activations (Sundararajan et al., Axiomatic attribution, ICML 2017)
    occlusion         what the log-odds lose where a patch of a quarter of the side is grey, in steps of an eighth
                      (Zeiler & Fergus, ECCV 2014)
"""

import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import find_objects, label
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from tests.benchmarks.measuring import whole_number
from xray_fastai.data.sources.phantom import draw_with_opacities
from xray_fastai.inference.model import Model, open_model

# -----------------------------------------------------------------------------
IMAGES = whole_number("IMAGES", 100)
ROUNDS = whole_number("ROUNDS", 3)
SIDE = 224  # px, at which images are drawn and maps are compared
BATCH = 20
DENSE = 0.1  # soft tissue has about 0.5
SMALLEST = 0.002  # of the image: smaller regions get no box
# -----------------------------------------------------------------------------

Method = Callable[[Model, torch.Tensor, int], torch.Tensor]
"""A model, 8-bit images (B, 1, S, S) and a class -> maps (B, h, w), 0 or more."""


def drawn(seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Draw a pneumonia: the image (1, SIDE, SIDE), 8-bit, and where its boxes are, boolean (SIDE, SIDE)."""
    rng = np.random.default_rng([2026, seed])
    image, density = draw_with_opacities(rng, "bacteria" if rng.random() < 0.6 else "virus", SIDE)
    regions, _ = label(density > DENSE)
    boxes = np.zeros(density.shape, bool)
    for number, place in enumerate(find_objects(regions), 1):
        if (regions == number).mean() >= SMALLEST:
            boxes[place] = True
    return torch.from_numpy(np.array(image))[None], boxes


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    small = interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8)


def log_odds(logits: torch.Tensor, target: int) -> torch.Tensor:
    others = [k for k in range(logits.shape[1]) if k != target]
    return logits[:, target] - logits[:, others].logsumexp(1)


def of_logit(logits: torch.Tensor, target: int) -> torch.Tensor:
    return logits[:, target]


def layers_of(network: nn.Sequential) -> list[nn.Module]:
    backbone = network[0]
    return [*backbone[0], *backbone[1:]] if isinstance(backbone[0], nn.Sequential) else list(backbone)


def activations_and_gradients(model: Model, x: torch.Tensor, target: int, finer: int, score: Callable) -> tuple:
    """Run the network, and return the last layer's output with `finer` times the cells, and the score's gradient."""
    layers, outputs = layers_of(model.network), []
    with torch.no_grad():
        for layer in layers:
            x = layer(x)
            outputs.append(x.clone())
    side = outputs[-1].shape[-1] * finer
    at = max(i for i, output in enumerate(outputs) if output.shape[-1] >= side)
    a = outputs[at].clone().requires_grad_()
    x = a
    for layer in layers[at + 1 :]:
        x = layer(x.clone())
    (gradients,) = torch.autograd.grad(score(model.network[1](x), target).sum(), a)
    return a.detach(), gradients


def grad_cam(score: Callable = log_odds, finer: int = 1) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        a, g = activations_and_gradients(model, model._prepared(images), target, finer, score)
        return (g.mean((2, 3), keepdim=True) * a).sum(1).relu()

    return method


def hires_cam(finer: int) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        a, g = activations_and_gradients(model, model._prepared(images), target, finer, log_odds)
        return (g * a).sum(1).relu()

    return method


def layer_cam(finer: int) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        a, g = activations_and_gradients(model, model._prepared(images), target, finer, log_odds)
        return (g.relu() * a).sum(1).relu()

    return method


def enlarged(times: int) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        return grad_cam()(model, resized(images, times * model.size), target)

    return method


def shifted(steps: int) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        x = model._prepared(images)
        side = x.shape[-1]
        cells = activations_and_gradients(model, x[:1], target, 1, log_odds)[0].shape[-1]
        cell = side // cells
        offsets = [round((k + 0.5) * cell / steps - cell / 2) for k in range(steps)]
        padded = pad(x, [cell] * 4, mode="replicate")
        fine = x.new_zeros(len(x), cells, steps, cells, steps)
        for i, down in enumerate(offsets):
            for j, right in enumerate(offsets):
                copy = padded[:, :, cell + down :, cell + right :][:, :, :side, :side]
                a, g = activations_and_gradients(model, copy, target, 1, log_odds)
                fine[:, :, i, :, j] = (g.mean((2, 3), keepdim=True) * a).sum(1).relu()
        return fine.reshape(len(x), cells * steps, cells * steps)

    return method


def smoothed(method: Method) -> Method:
    return lambda *args: avg_pool2d(method(*args)[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def integrated(finer: int, steps: int) -> Method:
    def method(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
        x = model._prepared(images)
        grey = x.mean((2, 3), keepdim=True).expand_as(x)
        found = [
            activations_and_gradients(model, grey + (k + 0.5) / steps * (x - grey), target, finer, log_odds)[1]
            for k in range(steps)
        ]
        first, last = (activations_and_gradients(model, y, target, finer, log_odds)[0] for y in (grey, x))
        return (torch.stack(found).mean(0) * (last - first)).sum(1).relu()

    return method


def occlusion(model: Model, images: torch.Tensor, target: int) -> torch.Tensor:
    x = model._prepared(images)
    side, patch, step = x.shape[-1], x.shape[-1] // 4, x.shape[-1] // 8
    lost, times = x.new_zeros(len(x), side, side), x.new_zeros(side, side)
    grey = x.mean((2, 3), keepdim=True)
    with torch.no_grad():
        whole = log_odds(model.network(x), target)
        for top in range(0, side - patch + 1, step):
            for left in range(0, side - patch + 1, step):
                at = (..., slice(top, top + patch), slice(left, left + patch))
                copy = x.clone()
                copy[at] = grey
                lost[at] += (whole - log_odds(model.network(copy), target))[:, None, None]
                times[at] += 1
    return (lost / times).relu()


METHODS: dict[str, Method] = {
    "Grad-CAM": grad_cam(of_logit),
    "of the log-odds": grad_cam(),
    "enlarged twice": enlarged(2),
    "shifted": shifted(4),
    "Grad-CAM, 2 times the cells": grad_cam(finer=2),
    "Grad-CAM, 4 times": grad_cam(finer=4),
    "Grad-CAM, 8 times": grad_cam(finer=8),
    "HiResCAM, 2 times": hires_cam(2),
    "HiResCAM, 4 times": hires_cam(4),
    "HiResCAM, 8 times": hires_cam(8),
    "smoothed, 4 times": smoothed(hires_cam(4)),
    "smoothed, 8 times": smoothed(hires_cam(8)),
    "LayerCAM, 2 times": layer_cam(2),
    "LayerCAM, 4 times": layer_cam(4),
    "integrated, 4 times": integrated(4, 8),
    "occlusion": occlusion,
}
if os.environ.get("ONLY"):
    METHODS = {name: METHODS[name] for name in ("Grad-CAM", *os.environ["ONLY"].split(";"))}


def measured(maps: torch.Tensor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each maximum lies in a box, and the energy there over that of chance, (B,) each."""
    fine = interpolate(maps[:, None], boxes.shape[1:], mode="bilinear", align_corners=False)[:, 0].numpy()
    flat, inside = fine.reshape(len(fine), -1), boxes.reshape(len(fine), -1)
    total = flat.sum(1)
    hit = inside[np.arange(len(flat)), flat.argmax(1)] & (total > 0)
    energy = (flat * inside).sum(1) / np.maximum(total, 1e-12)
    return hit, energy / inside.mean(1)


def main(exports: list[str]) -> None:
    torch.manual_seed(0)
    pictures, boxes = zip(*(drawn(i) for i in range(IMAGES)), strict=True)
    images, inside = torch.stack(pictures), np.stack(boxes)
    for export in exports:
        model = open_model(export, "cpu", "fp32")
        target = model.classes.index(model.positive)
        small = resized(images, model.size)
        called = model.decide(model.probabilities(model.logits(small).numpy())) == target
        print(f"\n{export}: {called.sum()} of {IMAGES} called {model.positive}, boxes cover {inside.mean():.3f}")
        print(f"{'':<30}{'cells':<10}{'pointing':<10}{'energy':<9}cost")
        print(f"{'chance':<30}{'':<10}{inside.mean():<10.2f}{1:<9.2f}")
        found = {name: [] for name in METHODS}
        cells = {}
        for start in range(0, IMAGES, BATCH):
            for name, method in METHODS.items():
                maps = method(model, small[start : start + BATCH], target)
                cells[name] = maps.shape[-1]
                found[name].append(measured(maps, inside[start : start + BATCH]))
        seconds = {name: [] for name in METHODS}
        for _ in range(ROUNDS):
            for name, method in METHODS.items():
                began = time.process_time()
                method(model, small[:BATCH], target)
                seconds[name].append(time.process_time() - began)
        for name, parts in found.items():
            hit, energy = (np.concatenate(part) for part in zip(*parts, strict=True))
            cost = min(seconds[name]) / min(seconds["Grad-CAM"])
            print(f"{name:<30}{cells[name]:<10}{hit.mean():<10.2f}{energy.mean():<9.2f}{cost:.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
