"""Prediction prepares images as training does, to the last digit."""

import numpy as np
import pytest
import torch
from fastai.vision.all import TensorImageBW, imagenet_stats

from xray_fastai.config.choices import CONTRASTS
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.model.preprocessing import MEAN, STD, Preprocessing


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_the_same_as_the_batch_transforms_of_a_learner(contrast):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32), dtype=np.uint8))
    (expected,) = empty_loaders(["A", "B"], 32, contrast).valid.after_batch((TensorImageBW(images),))
    assert torch.equal(Preprocessing(contrast)(images), expected.as_subclass(torch.Tensor))
    assert expected.shape == (3, 3, 32, 32)


def test_imagenets_values_are_fastais():
    assert (list(MEAN), list(STD)) == tuple(imagenet_stats)
