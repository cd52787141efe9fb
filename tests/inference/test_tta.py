"""Test-time augmentation is the mean over views of an image, in `predict` and in `evaluate`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import settings_of
from xray_fastai.data.images import open_image
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.inference.tta import VIEWS, view


def test_views_are_of_the_same_image():
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1, 1, 32, 32)
    assert torch.equal(view(ramp, 0, 1.0), ramp)
    closer = view(ramp, 0, 2.0)[0, 0, 16].float()
    assert abs(closer.diff()[4:-4].mean() - 4) < 0.2  # half as steep
    quarter = view(ramp, 90, 1.0)[0, 0].float()
    assert quarter.std(1).max() == 0 and abs(abs(quarter[:, 0].diff()).mean() - 8) < 0.1


@pytest.mark.slow
def test_the_mean_of_the_logits_of_all_views(run, export, tmp_path):
    files = sorted((export.parent / "moved" / "train").glob("*/*"))[:6]
    export = Path(shutil.copytree(export, tmp_path / "doubtful"))  # where no probability is nearly 0 or 1
    doubtful = {"temperature": 4.0, "calibration_kind": "cautious", "calibrated": True}
    (export / "model.json").write_text(json.dumps(settings_of(export) | doubtful))
    model = open_model(export, "cpu", "fp32")
    images = torch.stack([torch.from_numpy(np.array(open_image(f, model.size)))[None] for f in files])
    expected = torch.stack([model.logits(view(images, *how)) for how in VIEWS]).mean(0).numpy()
    got = predict(files, model, tta=True)
    assert np.allclose(got.p_PNEUMONIA, model.probabilities(expected)[:, 1], atol=1e-5)
    assert not np.allclose(got.p_PNEUMONIA, predict(files, model).p_PNEUMONIA, atol=1e-4)

    result = run(
        "predict", *files, "--tta", "--output", tmp_path / "rows.csv", "--model", export, "--precision", "fp32"
    )
    assert (
        result.exit_code == 0
        and "mean of 5 views an image" in result.output
        and "5 passes through the network" in result.output
    )
    assert np.allclose(pd.read_csv(tmp_path / "rows.csv").p_PNEUMONIA, got.p_PNEUMONIA, atol=1e-6)
    again = run(
        "predict", *files, "--output", tmp_path / "rows.csv", "--resume", "--model", export, "--precision", "fp32"
    )
    assert again.exit_code == 1 and "came from another model, --precision or --tta" in again.output  # without --tta


@pytest.mark.slow
def test_evaluate(run, export, tmp_path):
    options = ["--data", export.parent / "moved", "--split", "train", "--output", tmp_path, "--model", export]
    result = run("evaluate", *options, "--tta")
    assert result.exit_code == 0 and "mean of 5 views an image" in result.output
    folder = tmp_path / "evaluation-train"
    assert json.loads((folder / "metrics.json").read_text())["tta"] is True
    assert "by test-time augmentation" in (tmp_path / "report.html").read_text()
    table = pd.read_csv(folder / "predictions.csv")
    assert np.allclose(table.p_PNEUMONIA, predict(table.path, export, tta=True).p_PNEUMONIA, atol=1e-6)
