"""Every command takes an export of an ensemble as one model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests

from tests.conftest import draw_collection, settings_of
from tests.serving.conftest import send, served
from xray_fastai import dataloaders, learner, load_learner, predict, save_export, verify
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import open_image
from xray_fastai.export.network import load_network
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.model.ensemble import split
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.system.errors import UserError

NAMED = "3 x small_resnet"


@pytest.fixture(scope="module")
def files(export):
    return [str(path) for path in sorted((export.parent / "moved" / "train").glob("*/*"))]


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """Images of other patients."""
    counts = {f"{split}/{label}": 12 for split in ("train", "test") for label in ("NORMAL", "PNEUMONIA")}
    return draw_collection(tmp_path_factory.mktemp("tested") / "data", counts, seed=1)


@pytest.fixture
def three(ensemble, tmp_path):
    """A copy into which commands may write."""
    return shutil.copytree(ensemble, tmp_path / "three")


def mean_of_members(export, files) -> np.ndarray:
    """The probabilities (N, classes) of the mean of the members' outputs, each computed by its own network."""
    import torch

    model, network = load_network(export)
    images = torch.from_numpy(np.stack([np.array(open_image(file, 32)) for file in files]))[:, None]
    with torch.no_grad():
        batch = Preprocessing(model["preprocessing"]["contrast"])(images)
        logits = torch.stack([member(batch) for member in split(network, 3)]).mean(0).numpy()
    return open_model(export, "cpu").probabilities(logits)


@pytest.mark.parametrize("options", [(), ("--precision", "bf16"), ("--tta",)], ids=str)
def test_predict_averages_the_outputs(options, ensemble, files, run, tmp_path):
    result = run("predict", *files, "--model", ensemble, *options, "--output", tmp_path / "rows.csv", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found, expected = pd.read_csv(tmp_path / "rows.csv").p_PNEUMONIA, mean_of_members(ensemble, files)[:, 1]
    assert np.ptp(expected) > 0.1
    tolerance = 1e-4 if not options else 0.05 if "bf16" in options else 1
    np.testing.assert_allclose(found, expected, atol=tolerance)
    alone = predict(files, load_learner(ensemble), device="cpu", precision="fp32").p_PNEUMONIA
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    assert np.abs(found - expected).max() > 1e-4 or not options  # views and bf16 give other numbers


def test_heat_maps_are_drawn(ensemble, files, run, tmp_path):
    result = run("predict", files[0], "--model", ensemble, "--heatmaps", tmp_path / "maps", "--device", "cpu")
    assert result.exit_code == 0 and len(list((tmp_path / "maps").glob("*.png"))) == 1


@pytest.mark.slow
def test_evaluate_and_what_reads_its_files(three, tested, run):
    result = run("evaluate", "--model", three, "--data", tested, "--statement", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert NAMED in result.output
    metrics = json.loads((three / "evaluation-test-data" / "metrics.json").read_text())
    assert (metrics["architecture"], metrics["members"]) == ("small_resnet", 3)
    page = (three / "report.html").read_text()
    assert page.count(NAMED) >= 2
    statement = (three / "evaluation-test-data" / "statement.md").read_text()
    assert f"The model is {NAMED}" in statement and "An ensemble of 3 networks" in statement
    assert "One network, no ensemble" not in statement


@pytest.mark.slow
def test_the_statement_of_one_network_is_as_it_was(export, tested, run, tmp_path):
    one = shutil.copytree(export, tmp_path / "one")
    assert run("evaluate", "--model", one, "--data", tested, "--statement", "--device", "cpu").exit_code == 0
    statement = (one / "evaluation-test-data" / "statement.md").read_text()
    assert "The network is a small_resnet with pooling, dropout of" in statement
    assert "; it maps an image to the probabilities of NORMAL, PNEUMONIA." in statement
    assert "One network, no ensemble." in statement


@pytest.mark.parametrize("command", ["evaluate", "interpret"])
def test_no_image_is_kept_for_validation(command, three, export, run, refused):
    settings = settings_of(three)
    settings["settings"]["data"] = str(export.parent / "moved")
    (three / "model.json").write_text(json.dumps(settings))
    for split_name in ("val", "valid"):
        result = run(command, "--model", three, "--split", split_name, "--device", "cpu")
        refused(result, "an ensemble has none", "report.html", "--data")
    result = run(command, "--model", three, "--split", "val", "--data", export.parent / "moved", "--device", "cpu")
    refused(result, "an ensemble has none")


@pytest.mark.parametrize("of_fit", [False, True])
def test_nor_are_rows_of_a_table_without_splits(of_fit, three, files, run, refused, tmp_path):
    table, root = tmp_path / "labels.csv", Path(files[0]).parents[1]
    names = [f"{Path(file).parent.name}/{Path(file).name}" for file in files]
    pd.DataFrame({"path": names, "label": [Path(name).parent.name for name in names]}).to_csv(table, index=False)
    settings = settings_of(three)
    settings["settings"] |= {"data": str(table), "images": str(root)}
    (three / "model.json").write_text(json.dumps(settings))
    given = () if of_fit else ("--data", table, "--images", root)
    result = run("evaluate", "--model", three, "--split", "val", *given, "--device", "cpu")
    if of_fit:
        refused(result, "an ensemble has none")
    else:  # a table of another place has no splits, and all of its rows are used
        assert result.exit_code == 0 and "no splits in it" in result.output, result.output


@pytest.mark.slow
def test_interpret(three, tested, run):
    result = run("interpret", "--model", three, "--data", tested, "--split", "test", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"{NAMED}, 32 pixels" in result.output


@pytest.mark.slow
def test_compare_with_its_first_member(ensemble, export, tested, run, tmp_path):
    result = run("compare", export, ensemble, "--data", tested, "--output", tmp_path / "compared", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"three: {NAMED}, threshold" in result.output and "small: small_resnet, threshold" in result.output
    content = json.loads((tmp_path / "compared" / "comparison-small-three" / "comparison.json").read_text())
    assert (content["a"]["members"], content["b"]["members"]) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["labels", "unlabelled"])
def test_recalibrate(way, ensemble, tested, run, tmp_path):
    options = {"labels": ("--data", tested / "test"), "unlabelled": ("--unlabelled", tested / "test")}[way]
    local = tmp_path / "local"
    result = run("recalibrate", ensemble, *options, "--output", local, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert NAMED in " ".join(result.output.split()) and "not here" not in result.output
    assert verify(local).ok and settings_of(local)["members"] == 3
    (_, before), (_, after) = load_network(ensemble), load_network(local)
    names = [name for name, t in before.state_dict().items() if not (t == after.state_dict()[name]).all()]
    if way == "labels":
        assert not names
    else:  # batch norm of all members, and nothing else
        assert {name.split(".")[2] for name in names} == {"0", "1", "2"}
        assert all("running_" in name or "num_batches" in name for name in names)
        assert "no image is new to all networks of an ensemble" in result.output
    learn = load_learner(local)
    assert "3 x small_resnet" in repr(learn)


@pytest.mark.slow
def test_the_onnx_file_has_all_members(ensemble, files, run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output = tmp_path / "three.onnx"
    result = run("export", ensemble, "--format", "onnx", "--output", output)
    assert result.exit_code == 0, result.output
    assert f"{NAMED}, 32 x 32 px" in result.output
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    images = np.stack([np.array(open_image(file, 32)) for file in files])[:, None]
    (found,) = session.run(None, {"images": images})
    np.testing.assert_allclose(found, mean_of_members(ensemble, files), atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["architecture"], metadata["members"]) == ("small_resnet", "3")


def test_the_server_says_what_it_is(ensemble, export, files):
    for path, members, named in ((ensemble, 3, f"<dd>{NAMED},"), (export, 1, "<dd>small_resnet,")):
        with served(RowBuilder(open_model(path, "cpu", "fp32"), PredictConfig())) as address:
            facts = requests.get(f"{address}/health", timeout=60).json()["model"]
            assert (facts["architecture"], facts["members"]) == ("small_resnet", members)
            assert named in requests.get(address, timeout=60).text
            (answer,) = send(address, Path(files[0]), heatmap=True).json()["predictions"]
        assert answer["probabilities"]["PNEUMONIA"] == pytest.approx(predict([files[0]], path).p_PNEUMONIA[0], abs=1e-4)


@pytest.mark.slow
def test_fit_continues_from_it_with_as_many_networks(ensemble, tested, run, refused, tmp_path):
    options = ("--data", tested, "--workers", 0, "--batch-size", 8, "--device", "cpu", "--weights", ensemble)
    refused(run("fit", *options), "holds 3 networks, which cannot go on as one; give --members 3")
    refused(run("fit", *options, "--members", 2), "holds 3 networks; give 3")
    folder = tmp_path / "exports"
    briefly = ("--members", 3, "--freeze-epochs", 0, "--epochs", 1, "--lr", 1e-9)
    result = run("fit", *options, *briefly, "--exports", folder, "--name", "on")
    assert result.exit_code == 0, result.output
    assert verify(folder / "on").ok and settings_of(folder / "on")["lineage"][0]["name"] == "three"
    before, after = (load_network(path)[1].state_dict() for path in (ensemble, folder / "on"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.ndim == 4 or name.startswith("1."):
            np.testing.assert_allclose(tensor, after[name], atol=1e-4, err_msg=name)


def test_a_new_learner_cannot_start_from_it(ensemble, tested):
    loaders = dataloaders(tested, size=32, valid="0.25", batch_size=8, workers=0, device="cpu")
    with pytest.raises(UserError, match="three is an ensemble; open it by"):
        learner(loaders, weights=str(ensemble))


@pytest.mark.slow
def test_training_by_hand_trains_all_members(ensemble, tested, tmp_path):
    learn = load_learner(ensemble)
    learn.dls = dataloaders(tested, learn, valid="0.25", batch_size=8, workers=0, device="cpu")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    path = save_export(learn, tmp_path / "mine")
    model, network = load_network(path)
    assert verify(path).ok and model["members"] == 3 and model["by_hand"]
    assert model["settings"]["members"] == 3 and len(model["data"]["valid_files"]) == sum(
        model["data"]["valid"].values()
    )
    before = load_network(ensemble)[1].state_dict()
    for member in range(3):
        name = f"0.0.{member}.0.weight"
        assert not (before[name] == network.state_dict()[name]).all()
