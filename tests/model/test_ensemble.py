"""The networks of an ensemble as one: the mean of the outputs, and back."""

import copy

import pytest
import torch

from tests import small_network
from xray_fastai.model.architectures import Parallel, build_network, split_parameters
from xray_fastai.model.ensemble import join, split
from xray_fastai.model.learner import build_learner
from xray_fastai.model.loaders import empty_loaders

SMALL = small_network.NAME
ARCHS = [SMALL, "resnet18", "densenet121", "efficientnet_b0", "timm/resnet10t", "timm/vit_tiny_patch16_224"]
SIZE = 32


def networks(arch: str, members: int) -> list[torch.nn.Sequential]:
    """Networks with other weights each, and outputs of some size."""
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    small_network.register()
    torch.manual_seed(0)
    made = [build_network(arch, 3, 0.5, SIZE).eval() for _ in range(members)]
    with torch.no_grad():
        for network in made:
            network[1][-1].bias.normal_()
    return made


def outputs(network: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(images)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_joined_network_gives_the_mean_of_the_outputs(arch):
    members = networks(arch, 3)
    expected = [outputs(member) for member in members]
    joined = join(members, dropout=0.25)
    torch.testing.assert_close(outputs(joined), torch.stack(expected).mean(0), atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # else any of them would do
    assert repr(joined) == repr(build_network(arch, 3, 0.25, SIZE, members=3))
    own = [member.state_dict() for member in split(joined, 3)]
    assert [list(state) for state in own] == [list(member.state_dict()) for member in members]
    torch.testing.assert_close(torch.stack([outputs(m) for m in split(joined, 3)]).mean(0), outputs(joined))


@pytest.mark.parametrize("arch", [SMALL, "timm/resnet10t"])
def test_a_member_that_is_split_off_gives_its_outputs_but_for_the_bias(arch):
    members = networks(arch, 2)
    bias = torch.stack([member[1][-1].bias.detach() for member in members])
    expected = [outputs(member) - own + bias.mean(0) for member, own in zip(members, bias, strict=True)]
    for found, wanted in zip(split(join(members, 0.5), 2), expected, strict=True):
        torch.testing.assert_close(outputs(found), wanted, atol=1e-5, rtol=1e-5)
        assert found[1][2].p == 0.5


def test_a_split_member_trains_alone():
    joined = join(networks(SMALL, 2), 0.5)
    head = joined[1][-1].weight.detach().clone()
    first, second = split(joined, 2)
    before = copy.deepcopy(second.state_dict())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())
    assert torch.equal(head, joined[1][-1].weight)
    (alone,) = split(second, 1)
    assert alone is second


@pytest.mark.parametrize("arch", [SMALL, "densenet121", "timm/resnet10t"])
def test_the_groups_hold_those_of_all_members(arch):
    single, joined = networks(arch, 1)[0], join(networks(arch, 3), 0.5)
    counts = [len(group) for group in split_parameters(single, arch)]
    groups = split_parameters(joined, arch)
    assert [len(group) for group in groups] == [3 * counts[0], 3 * counts[1], 2]
    assert {id(p) for group in groups for p in group} == {id(p) for p in joined.parameters()}
    of_member = [{id(p) for p in group} for group in split_parameters(split(joined, 3)[1], arch)]
    assert all(of_member[i] <= {id(p) for p in groups[i]} for i in (0, 1))


@pytest.mark.parametrize("arch", [SMALL, "efficientnet_b0"])
def test_a_learner_has_the_network_of_an_ensemble(arch):
    small_network.register()
    learn = build_learner(empty_loaders(["A", "B"], SIZE), arch, dropout=0.25, members=2)
    network = build_network(arch, 2, 0.25, SIZE, members=2)
    single = build_learner(empty_loaders(["A", "B"], SIZE), arch, dropout=0.25)
    assert repr(learn.model) == repr(network) and isinstance(learn.model[0][0], Parallel)
    assert not any(isinstance(part, Parallel) for part in single.model.modules())
    assert learn.model.state_dict().keys() == network.state_dict().keys()
    learn.freeze()
    assert {name for name, p in learn.model.named_parameters() if p.requires_grad} == {"1.3.weight", "1.3.bias"}


def test_each_member_has_random_weights_of_its_own():
    small_network.register()
    first, second = split(build_network(SMALL, 2, 0.5, members=2), 2)
    assert not torch.equal(first[0][0].weight, second[0][0].weight)
