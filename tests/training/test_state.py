"""What a checkpoint holds of devices can be restored on a machine that has others."""

import random
from types import SimpleNamespace

import pytest
import torch
from fastai.vision.all import L

from xray_fastai.training.checkpoint import Saved
from xray_fastai.training.state import RestoreCheckpoint, random_states, set_random_states


@pytest.fixture
def learn():
    return SimpleNamespace(dls=SimpleNamespace(loaders=[SimpleNamespace(rng=random.Random(0))]))


@pytest.fixture
def generators(monkeypatch):
    """The states of a machine's GPUs, by their number."""
    generators = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(generators))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(generators))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [*generators.values()])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, number: generators.update({number: state}))
    return generators


@pytest.mark.parametrize("gpus", [0, 1, 2, 3])
def test_random_states_of_gpus_are_restored_as_far_as_both_machines_have_them(gpus, generators, learn):
    states = random_states(learn)
    assert states["cuda"] == ["01", "02"]
    generators.clear()
    generators.update({number: torch.tensor([9], dtype=torch.uint8) for number in range(gpus)})
    set_random_states(learn, states)
    assert [int(state) for state in generators.values()] == [1, 2, 9][:gpus]


def test_the_random_state_of_mps_is_restored_where_it_is_there(learn, monkeypatch):
    restored = []
    states = random_states(learn)
    assert states["mps"] == []
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: restored.append(int(state)))
    set_random_states(learn, states | {"mps": ["07"]})
    assert restored == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([5], dtype=torch.uint8))
    states = random_states(learn)
    assert states["mps"] == ["05"]
    set_random_states(learn, states)
    del states["mps"]  # as version 0.1.0 wrote it
    set_random_states(learn, states)
    assert restored == [5]


@pytest.mark.parametrize("scaler", ["absent", "none", "present"])
def test_the_scaler_of_a_fit_in_fp16_is_restored_only_where_there_is_one(scaler, learn, monkeypatch):
    state = {"scale": 1024.0}
    optimizer = {"hypers": [], "states": []}
    kept = {
        "epoch": 1,
        "counters": {},
        "smooth_loss": [1, 0.5],
        "scaler": state,
        "optimizer": optimizer,
        "gradients": [],
    }
    kept["random"] = random_states(learn)
    saved = Saved(kept, weights={}, optimizer={}, best={}, outputs={}, best_row=None)
    loaded = []
    learn.opt = SimpleNamespace(hypers=[], all_params=list)
    learn.cbs, learn.model = L(), torch.nn.Identity()
    learn.recorder = SimpleNamespace(smooth_loss=SimpleNamespace())
    learn.dls.train = []
    if scaler != "absent":
        learn.scaler = SimpleNamespace(load_state_dict=loaded.append) if scaler == "present" else None
    callback = RestoreCheckpoint(saved)
    callback.learn = learn
    callback.restore()
    assert loaded == ([state] if scaler == "present" else [])
