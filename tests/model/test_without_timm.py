"""`--arch timm/NAME` where timm is not installed, and what no installed timm is asked for."""

import sys

import pytest

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.model.architectures import build_backbone
from xray_fastai.system.errors import UserError


@pytest.fixture
def no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)


def test_one_line_says_what_to_install(no_timm, run, collection, tmp_path):
    result = run("fit", "--data", collection, "--arch", "timm/resnet10t", "--exports", tmp_path / "exports")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        'Error: timm/NAME needs timm, not installed; pip install "xray-fastai[timm]"'
    )


def test_an_export_says_so_too(no_timm):
    with pytest.raises(UserError, match=r'timm/NAME needs timm, not installed; pip install "xray-fastai\[timm\]"'):
        build_backbone("timm/vit_tiny_patch16_224", None, 96)


@pytest.mark.parametrize("name", ["timm/hf-hub:someone/model", "timm/../x", "timm/", "resnet10t"])
def test_names_that_are_no_names_of_timm(no_timm, name):
    with pytest.raises(UserError, match="choose one of"):
        FitConfig(arch=name)
