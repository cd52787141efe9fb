"""The fused step is fastai's Adam, and fastai's own operations take over where torch's kernel fails."""

import warnings
from importlib import import_module

import pytest
import torch
from fastai.vision.all import Adam, L
from torch import nn

from xray_fastai.model.optimizer import FusedAdam, is_kernel_right

TORCHS = import_module("torch.optim.adamw")  # `torch.optim` hides this module
kernel = TORCHS.adamw


@pytest.fixture(autouse=True)
def ask_again():
    is_kernel_right.cache_clear()
    yield
    is_kernel_right.cache_clear()


def compare_with_fastais(layout=torch.contiguous_format):
    """Take 12 steps by both: two groups with different rates that change; one parameter has no weight decay, one has no
    gradient."""
    ends = []
    for made in (Adam, FusedAdam):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        network.to(memory_format=layout)
        optimizer = made([L(network[:2].parameters()), L(network[3].parameters())], lr=1e-2)
        optimizer.set_hypers(lr=[1e-3, 1e-2], wd=0.1)
        optimizer.state[network[1].weight]["do_wd"] = False
        for step in range(12):
            optimizer.hypers[1]["lr"] = 1e-2 / (1 + step)
            for parameter in [*network[:2].parameters(), network[3].weight]:
                parameter.grad = torch.randn_like(parameter) * 10.0 ** -(step % 6)
            optimizer.step()
        ends.append((network.state_dict(), [dict(state) for *_, state, _ in optimizer.all_params()]))
    (expected, states), (found, own) = ends
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    assert own[-1] == {} and states[-1] == {}  # the bias of the last layer has no gradient
    for a, b in zip(own[:-1], states[:-1], strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] == 12
        torch.testing.assert_close(a["sqr_avg"], b["sqr_avg"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_steps_as_fastais_does(layout, monkeypatch):
    calls = []
    monkeypatch.setattr(TORCHS, "adamw", lambda *args, **options: calls.append(kernel(*args, **options)))
    with warnings.catch_warnings(action="error"):
        compare_with_fastais(layout)
    assert len(calls) > 12  # torch's kernel took the steps


def removed(*args, **options):
    raise TypeError("adamw() got an unexpected keyword argument 'fused'")


def too_fast(*args, lr, **options):
    kernel(*args, lr=1.01 * lr, **options)


@pytest.mark.parametrize(
    ("broken", "reason"), [(removed, "raises TypeError: adamw"), (too_fast, "differs from fastai's Adam")]
)
def test_fastais_operations_run_where_the_kernel_fails(broken, reason, monkeypatch):
    monkeypatch.setattr(TORCHS, "adamw", broken)
    with pytest.warns(UserWarning, match=reason) as told:
        compare_with_fastais()
    assert len(told) == 1


def test_the_check_draws_no_random_numbers_and_a_removed_function_is_found(monkeypatch):
    monkeypatch.delattr(TORCHS, "adamw")
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="raises ImportError"):
        assert not is_kernel_right(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
