"""A learner that a fastai user goes on working with: loaders, training by fastai's methods, and the way back."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import (
    Callback,
    ClassificationInterpretation,
    CSVLogger,
    ImageDataLoaders,
    error_rate,
    get_image_files,
)

import xray_fastai
from tests.conftest import draw_collection, settings_of
from tests.small_network import NAME as SMALL
from xray_fastai import dataloaders, evaluate, fit, interpret, learner, open_learner, predict, save_export, verify
from xray_fastai.export.reader import path_of
from xray_fastai.model.loaders import NO_IMAGES
from xray_fastai.system.errors import ImageError, UserError

QUICK = {"batch_size": 8, "workers": 0, "device": "cpu"}
FIT = {"arch": SMALL, "size": 32, "precision": "fp32", "weights": "none", **QUICK}


@pytest.fixture(autouse=True)
def without_windows():
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A second hospital, with enough validation images to calibrate."""
    counts = {f"{split}/{name}": n for name in ("NORMAL", "PNEUMONIA") for split, n in (("train", 20), ("val", 52))}
    return draw_collection(tmp_path_factory.mktemp("second") / "data", counts | {"test/NORMAL": 8, "test/PNEUMONIA": 8})


@pytest.fixture
def learn(export, hospital):
    learn = open_learner(export)
    learn.dls = dataloaders(hospital, learn, **QUICK)
    return learn


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        lambda learn: learn.fine_tune(1),
        lambda learn: learn.fit_one_cycle(1),
        lambda learn: learn.fit(1),
        lambda learn: learn.lr_find(),
        lambda learn: learn.get_preds(),
        lambda learn: learn.validate(),
        lambda learn: learn.show_results(),
        lambda learn: learn.dls.show_batch(),
        lambda learn: learn.dls.one_batch(),
        ClassificationInterpretation.from_learner,
    ],
)
def test_an_export_without_images_says_how_to_get_some(use, export):
    learn = open_learner(export)
    with pytest.raises(UserError) as caught:
        use(learn)
    assert str(caught.value) == NO_IMAGES
    assert not learn.recorder.history and not learn.xray.changed


@pytest.mark.slow
def test_an_export_without_images_has_a_summary_and_predicts(export, an_image):
    learn = open_learner(export)
    assert "x 32 x 32" in learn.summary() and "Total params: 78,442" in learn.summary()
    assert learn.dls.train.n == 0
    assert learn.predict(an_image)[0] in learn.dls.vocab
    with pytest.raises(ImageError, match=r"^nosuch\.jpeg: no such file$") as caught:
        learn.predict("nosuch.jpeg")
    assert len(caught.traceback) == 2 and not caught.value.__suppress_context__ < 1


def test_a_batch_larger_than_the_images_is_no_silent_training(learn):
    learn.dls.train.bs = 100
    with pytest.raises(UserError, match="40 training images, fewer than a batch of 100"):
        learn.fit(1)


@pytest.mark.slow
def test_a_learner_says_what_it_is(export, learn):
    threshold = settings_of(export)["threshold"]
    words = f"small_resnet, 32 px, classes NORMAL, PNEUMONIA, PNEUMONIA from a probability of {threshold:.4g}, export "
    assert repr(open_learner(export)) == f"XrayLearner: {words}{export}"
    assert learn.xray.settings["architecture"] == SMALL and learn.xray.path == str(export)
    learn.save("kept")
    assert not learn.xray.changed and open_learner(export).load(Path("models/kept").absolute()).xray.changed
    with learn.no_bar():
        learn.fit(1)
    assert repr(learn) == f"XrayLearner: {words}{export}, trained since"
    with pytest.raises(UserError, match=r"was trained after it was opened; save it by xray_fastai\.save_export"):
        path_of(learn)


@pytest.mark.slow
def test_what_fastais_tutorials_do_works_on_an_export(export, hospital, learn):
    """`validate` gives what `evaluate` gives: the loaders prepare images as the export does."""
    own = evaluate(export, hospital, uncalibrated=True, threshold=0.5).metrics.value
    test = learn.dls.test_dl(get_image_files(hospital / "test"), with_labels=True)
    assert [test.vocab[k] for _, labels in test for k in labels] == [f.parent.name for f in test.items.path.map(Path)]
    with learn.no_bar(), learn.no_logging():
        _, accuracy, roc_auc = learn.validate(dl=test)
        assert (accuracy, roc_auc) == (pytest.approx(own["accuracy"]), pytest.approx(own["roc_auc"]))
        probabilities = learn.get_preds(dl=test)[0].numpy()
        expected = predict(list(test.items.path), export, precision="fp32").p_PNEUMONIA
        assert probabilities[:, 1] == pytest.approx(expected.to_numpy(), abs=1e-5)

        learn.dls.show_batch(max_n=2)
        learn.show_results(max_n=2)
        before = [parameter.detach().clone() for parameter in learn.model.parameters()]
        assert learn.lr_find(num_it=20, stop_div=False).valley > 0
        assert all(map(torch.equal, before, learn.model.parameters())) and not learn.xray.changed
        assert not learn.recorder.history

        learn.metrics += [error_rate]
        learn.fine_tune(1, freeze_epochs=1, cbs=CSVLogger(fname="history.csv"))
        assert not torch.equal(before[0], next(learn.model.parameters()))
        assert "error_rate" in Path("history.csv").read_text().splitlines()[0]
        learn.freeze()
        learn.to_fp16().fit_one_cycle(1)
        learn.to_fp32().unfreeze()
        assert len(learn.validate()) == 4
        rows = [
            (row["phase"], row["epoch"], round(row["error_rate"] + row["accuracy"], 5))
            for row in learn.recorder.history
        ]
        assert rows == [(phase, epoch, 1) for phase, epoch in (("frozen", 1), ("unfrozen", 1), ("frozen", 2))]

        interpretation = ClassificationInterpretation.from_learner(learn)
        assert interpretation.confusion_matrix().sum(axis=1).tolist() == [52, 52]
        interpretation.plot_confusion_matrix()
        interpretation.plot_top_losses(2)
        assert "Adam" in learn.summary()


@pytest.mark.slow
def test_loaders_of_a_learner_have_its_transforms(export, hospital, learn):
    """Pixel for pixel those of the fit, also without the cache of decoded images."""
    plain = dataloaders(hospital, learn, **QUICK, cache=False)
    images, expected = learn.dls.valid.one_batch()[0], plain.valid.one_batch()[0]
    assert torch.equal(images, expected)
    assert [type(t).__name__ for t in learn.dls.train.after_batch.fs] == [
        type(t).__name__ for t in plain.train.after_batch.fs
    ]
    theirs = ImageDataLoaders.from_folder(hospital, valid="val", item_tfms=[], bs=8)
    with pytest.raises(UserError, match=r"dls: the images of these loaders are not prepared .*\.dataloaders\(folder\)"):
        learner(theirs, SMALL)
    with pytest.raises(UserError, match="size 64: the learner's is 32; leave it out"):
        dataloaders(hospital, learn, size=64)
    with pytest.raises(TypeError, match="bs: no such option; it is batch_size="):
        dataloaders(hospital, learn, bs=64)


def test_loaders_for_other_classes_are_refused(export, tmp_path):
    root = draw_collection(tmp_path / "other", {"train/NORMAL": 12, "train/TB": 12})
    with pytest.raises(UserError, match="its classes are NORMAL, TB, those of the learner are NORMAL, PNEUMONIA;"):
        dataloaders(root, open_learner(export), **QUICK)


def test_files_in_other_folders_have_no_label(learn, an_image):
    stray = Path("stray.jpeg")
    stray.write_bytes(an_image.read_bytes())
    with pytest.raises(UserError, match=r"stray\.jpeg: its folder is none of the classes NORMAL, PNEUMONIA"):
        learn.dls.test_dl([stray], with_labels=True)


class First(Callback):
    "Keep the weights that the first training batch starts with, and the images of that batch."

    def before_batch(self):
        if not hasattr(self, "images"):
            self.weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.images = self.x.clone()


@pytest.mark.slow
def test_the_learner_is_the_one_that_fit_trains(hospital):
    first, ours = First(), First()
    fit(hospital, **FIT, epochs=1, dropout=0.2, callbacks=[first])
    dls = dataloaders(hospital, size=32, **QUICK)
    learn = learner(dls, SMALL, weights="none", dropout=0.2)
    assert dls.class_weights == [1.0, 1.0] and learn.lr == 2e-3
    assert repr(learn) == "XrayLearner: small_resnet, 32 px, classes NORMAL, PNEUMONIA, not saved"
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=ours)
    assert torch.equal(first.images, ours.images)
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in ours.weights.items())
    with pytest.raises(UserError, match="this learner is no export; save it by"):
        evaluate(learn)


@pytest.mark.slow
def test_every_command_takes_a_saved_learner(hospital, export, learn, an_image, run, capsys):
    learn.metrics = [lambda y_pred, y_true: torch.tensor(1.0)]  # neither ours nor one that can be pickled
    learn.add_cb(First())
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(2)
        del learn.first.images, learn.first.weights
        with torch.no_grad():
            expected = learn.get_preds(act=lambda x: x)[0]
    folder = save_export(learn, "exports/mine")
    assert "frozen phase: 1 epoch" in capsys.readouterr().out
    model = settings_of(folder)
    parent = settings_of(export)
    lineage = {"name": "small", "sha256": parent["weights"]["sha256"], "created": parent["created"]}
    assert model["by_hand"] and model["lineage"] == [lineage] and model["training"]["weights"] == "of the export small"
    assert not settings_of(export)["by_hand"]
    assert model["calibration_kind"] == "validation" and model["temperature"] != parent["temperature"]
    held_out = [model["data"]["valid"][label] for label in model["classes"]]
    assert model["prior"] == pytest.approx(np.divide(held_out, sum(held_out)))
    assert model["settings"]["data"] == str(hospital)
    assert [(p["name"], p["epochs"]) for p in model["training"]["phases"]] == [("frozen", 1), ("unfrozen", 2)]
    assert model["best"]["phase"] == "unfrozen" and model["best"]["roc_auc"] > 0.5
    assert learn.xray.path == "exports/mine" and not learn.xray.changed and path_of(learn) == "exports/mine"
    assert [type(cb).__name__ for cb in learn.cbs if type(cb) is First] == ["First"] and len(learn.metrics) == 1

    again = open_learner(folder)
    again.dls = learn.dls
    with again.no_bar():
        assert torch.allclose(again.get_preds(act=lambda x: x)[0], expected, atol=1e-5)
    assert learn.predict(an_image)[2].tolist() == pytest.approx(again.predict(an_image)[2].tolist(), abs=1e-6)
    valid = evaluate(learn, split="valid", uncalibrated=True, threshold=0.5)
    assert valid.metrics.value["accuracy"] == pytest.approx(model["best"]["accuracy"])
    assert valid.metrics.value["roc_auc"] == pytest.approx(model["best"]["roc_auc"])
    assert len(interpret(folder, top=2).table) == 104
    assert len(predict(hospital / "test" / "NORMAL", learn)) == 8
    assert verify(folder).ok
    result = run("evaluate", "--model", folder)
    assert result.exit_code == 0 and "16 images" in result.stdout
    result = run("fit", "--data", hospital, "--weights", folder, "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    assert result.exit_code == 0 and "weights of the export mine" in result.stdout


@pytest.mark.slow
def test_a_search_of_the_parent_is_not_one_of_a_saved_learner(learn):
    learn.xray.settings["settings"]["lr"] = "find"
    assert settings_of(save_export(learn, "exports/mine"))["settings"]["lr"] is None


@pytest.mark.slow
def test_a_saved_learner_opens_with_fastai_serves_and_becomes_onnx(learn, an_image, run):
    from fastai.vision.all import load_learner as load_pickled
    from starlette.testclient import TestClient

    from xray_fastai.config.predict_config import PredictConfig
    from xray_fastai.inference.model import open_model
    from xray_fastai.inference.rows import RowBuilder
    from xray_fastai.serving.app import Predictor, create_app

    folder = save_export(learn, "exports/mine")
    assert settings_of(folder)["best"] is None  # it was not trained
    expected = learn.predict(an_image)[2].tolist()
    assert load_pickled(folder / "learner.pkl").predict(an_image)[2].tolist() == pytest.approx(expected, abs=1e-6)
    app = create_app(Predictor(RowBuilder(open_model(folder, "cpu"), PredictConfig())), {"testserver"})
    with an_image.open("rb") as stream:
        (served,) = TestClient(app).post("/predict?heatmap=false", files={"files": stream}).json()["predictions"]
    assert served["probabilities"]["PNEUMONIA"] == pytest.approx(expected[1], abs=1e-4)
    pytest.importorskip("onnxruntime")
    result = run("export", folder, "--format", "onnx", "--output", "mine.onnx")
    assert result.exit_code == 0 and Path("mine.onnx").is_file(), result.output


@pytest.mark.slow
def test_a_learner_that_cannot_be_saved(export, learn, hospital):
    bare = open_learner(export)
    with pytest.raises(UserError, match=r"data: learn\.dls was not made by xray_fastai\.dataloaders; give the folder"):
        save_export(bare, "exports/mine")
    assert settings_of(save_export(bare, "exports/mine", data=hospital))["data"]["name"] == str(hospital)
    with pytest.raises(UserError, match="name mine: exports/mine already exists"):
        save_export(learn, "exports/mine")
    body, head = learn.model
    learn.model = torch.nn.Sequential(body, torch.nn.Flatten(), torch.nn.Linear(64, 2))
    with pytest.raises(UserError, match="its network is not the small_resnet that it was made with"):
        save_export(learn, "exports/other")
    learn.model = torch.nn.Sequential(body, head)
    with torch.no_grad():
        next(learn.model.parameters()).fill_(np.nan)
    with pytest.raises(UserError, match="its weights are not finite"):
        save_export(learn, "exports/other")
    assert sorted(path.name for path in Path("exports").iterdir()) == ["mine"]


@pytest.mark.slow
def test_fit_takes_callbacks_and_metrics(hospital):
    result = fit(hospital, **FIT, epochs=2, callbacks=[CSVLogger(fname="log.csv")], metrics=[error_rate], name="own")
    rows = [line.split(",") for line in Path("log.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "train_loss", "valid_loss", "accuracy", "roc_auc_score", "error_rate", "time"]
    for row, logged in zip(result.history, rows[1:], strict=True):
        assert row["error_rate"] == pytest.approx(1 - row["accuracy"]) == pytest.approx(float(logged[5]))
    assert (result.path / "history.csv").read_text().splitlines()[0].endswith(",lr,error_rate")
    assert "error_rate" not in json.dumps(settings_of(result.path)["best"])
    assert verify(result.path).ok
    assert re.search("XrayLearner", repr(xray_fastai.load_learner(result.path)))
