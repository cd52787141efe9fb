"""Batch norm is adapted to images without labels."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from xray_fastai.model.architectures import build_network
from xray_fastai.model.batch_norm import adapting, layers_of


@pytest.fixture
def network():
    """Two batch norms in a row, with statistics of other images."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.9)
    )
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 8, 8))
    return network.eval()


@pytest.fixture
def images():
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2


def statistics(network: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for layer in layers_of(network) for tensor in (layer.running_mean, layer.running_var)]


def adapted(network: nn.Module, share: float, *batches: torch.Tensor) -> list[torch.Tensor]:
    with adapting(network, share), torch.inference_mode():
        for batch in batches:
            network(batch)
    return statistics(network)


def test_without_the_trained_statistics_it_is_torchs_own_update(network, images):
    """`update_bn` has no blend, and takes dropout and stochastic depth along; it normalises by the biased variance."""
    ours = adapted(network, 1, images)
    update_bn([images], network)
    for one, other in zip(ours, statistics(network), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=1e-3)


def test_the_statistics_are_a_blend(network, images):
    """In the first layer, whose input does not depend on other statistics."""
    before = statistics(network)[:2]
    local = adapted(network, 1, images)[:2]
    with torch.no_grad():
        layers_of(network)[0].running_mean.copy_(before[0])
        layers_of(network)[0].running_var.copy_(before[1])
    blended = adapted(network, 0.25, images)[:2]
    for trained, new, one in zip(before, local, blended, strict=True):
        torch.testing.assert_close(one, 0.75 * trained + 0.25 * new, rtol=1e-5, atol=1e-5)


def test_batches_of_any_size_count_by_their_images(network, images):
    """The first layer's statistics are those of all images at once."""
    whole = adapted(network, 1, images)[:2]
    parts = adapted(network, 1, images[:16], images[16:23], images[23:])[:2]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_each_layer_is_adapted_before_the_next(network, images):
    """What leaves a layer while it is adapted is what leaves it afterwards."""
    with adapting(network, 0.5), torch.inference_mode():
        during = network(images)
    with torch.inference_mode():
        torch.testing.assert_close(during, network(images))


def test_afterwards_nothing_changes_any_more(network, images):
    after = adapted(network, 0.5, images)
    with torch.inference_mode():
        network(images + 5)
    assert all(map(torch.equal, after, statistics(network)))
    assert not network.training


def test_convnext_has_no_batch_norm():
    with torch.device("meta"):
        assert not layers_of(build_network("convnext_tiny", 2, 0.5))
        assert len(layers_of(build_network("resnet18", 2, 0.5))) == 20
