"""`predict` gives one row an image: for unreadable files too, for any number of images, and after an interruption."""

import csv
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import QUICK, draw_collection, settings_of, wait_for
from xray_fastai import DISCLAIMER, load_learner
from xray_fastai.cli import app
from xray_fastai.inference import heat_maps, predict_files
from xray_fastai.inference import rows as rows_module
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.inference.row_file import RowFile
from xray_fastai.inference.rows import Column
from xray_fastai.inference.stream import predict_stream
from xray_fastai.system.device import cpu_has_bf16
from xray_fastai.system.errors import UserError

COLUMNS = ["path", "prediction", "p_NORMAL", "p_PNEUMONIA", "threshold", "unlike", "error"]


def read(path):
    """Read an output file with pandas or json, not with the reader that continues it."""
    if path.suffix == ".csv":
        return pd.read_csv(path)
    table = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    return table.astype({"unlike": float})  # without a gate all are null


# what is predicted


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_same_as_learn_predict_in_any_batch_and_order(batch_size, export, files):
    learn = load_learner(export)
    some = random.Random(batch_size).sample(files, 12)
    with learn.no_bar():
        expected = [learn.predict(path)[2].tolist() for path in some]
    table = predict(some, export, batch_size=batch_size, device="cpu", precision="fp32")
    assert table.path.tolist() == some
    # predict folds batch norm into the convolutions, which changes the rounding
    np.testing.assert_allclose(table[["p_NORMAL", "p_PNEUMONIA"]].to_numpy(), expected, atol=3e-5, rtol=0)


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU does not compute in bf16")
def test_bf16_where_it_was_trained_so(model, export, files, run):
    fast = open_model(export, "cpu")
    assert settings_of(export)["training"]["precision"] == fast.precision == "bf16"
    exact, found = (np.stack([logits for _, logits, _ in predict_stream(m, files)]) for m in (model, fast))
    spread = exact.std(axis=0).max()
    assert 0 < np.abs(found - exact).max() < 0.1 * spread
    batched = np.stack([logits for _, logits, _ in predict_stream(fast, files, batch_size=1)])
    assert np.abs(found - batched).max() < 0.1 * spread
    for command in (["predict", files[0]], ["evaluate", "--data", export.parent / "moved", "--split", "train"]):
        said = {p: run(*command, "--model", export, "--precision", p).output for p in ("auto", "fp32")}
        assert "precision bf16" in said["auto"] and "precision fp32" in said["fp32"]


def test_an_image_is_called_at_the_threshold(model, files):
    scores = predict(files, model).p_PNEUMONIA
    at = float(np.median(scores))
    table = predict(files, model, threshold=at)
    assert (table.threshold == at).all()
    assert ((table.prediction == "PNEUMONIA") == (scores >= at)).all() and table.prediction.nunique() == 2
    assert (predict(files, model).threshold == settings_of(model.path)["threshold"]).all()


class LikeBrightness:
    """A gate that finds bright images unlike the training images."""

    def __init__(self, limit):
        self.limit = limit

    def unlike(self, images, features):
        return images.float().mean((1, 2, 3)).numpy() / 2.55


@pytest.fixture
def gated(model, files):
    """The small model with a gate that withholds about half of the images."""
    open_gate = dataclasses.replace(model, gate=LikeBrightness(100.0))
    return dataclasses.replace(model, gate=LikeBrightness(float(predict(files, open_gate).unlike.median())))


def test_a_gate_withholds_what_is_unlike(gated, model, files):
    table, called = predict(files, gated), predict(files, gated, gate=False)
    withheld = table.unlike > gated.gate.limit
    assert 0 < withheld.sum() < len(files) and table.unlike.notna().all()
    assert ((table.prediction == "uncertain") == withheld).all()
    assert (called.prediction != "uncertain").all() and (called.unlike == table.unlike).all()
    assert (table.prediction[~withheld] == called.prediction[~withheld]).all()
    assert (table.p_PNEUMONIA == called.p_PNEUMONIA).all() and predict(files, model).unlike.isna().all()


def test_a_band_around_the_threshold_is_uncertain(model, files):
    scores = predict(files, model).p_PNEUMONIA
    at = float(np.quantile(scores, 0.5, method="nearest"))
    distances = (scores - at).abs().round(7)
    width = float(distances.sort_values().iloc[3])  # that of an image, which lies on the edge
    table = predict(files, model, threshold=at, abstain=width)
    within = distances <= width
    assert 1 < within.sum() < len(files)
    assert ((table.prediction == "uncertain") == within).all()


def test_uncertain_rows_are_counted_with_their_reasons_and_continued(gated, files, says, refused, monkeypatch):
    monkeypatch.setattr(predict_files, "open_model", lambda *args: gated)
    options = ["--output", "out.csv", "--abstain", 0.49, "--threshold", 0.5]
    result = says(*files, *options)
    rows = read(Path("out.csv"))
    unlike, close = rows.unlike > gated.gate.limit, (rows.p_PNEUMONIA - 0.5).abs().round(7) <= 0.49
    summary = f"{(unlike | close).sum()} uncertain: {unlike.sum()} unlike the training images"
    summary += f", {(close & ~unlike).sum()} within 0.49 of the threshold"
    assert result.exit_code == 0 and summary in result.output and (close & ~unlike).any()
    whole = Path("out.csv").read_bytes()
    Path("out.csv").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    without = says(*files, "--output", "out.csv", "--threshold", 0.5, "--resume")
    refused(without, "--resume: ", "is uncertain, and would not be now; give the same options (--no-gate, --abstain)")
    result = says(*files, *options, "--resume")
    assert result.exit_code == 0 and summary in result.output and Path("out.csv").read_bytes() == whole


def test_the_map_of_an_uncertain_image_is_of_the_class_that_it_would_get(gated, files, says, monkeypatch):
    monkeypatch.setattr(predict_files, "open_model", lambda *args: gated)
    says(*files[:8], "--no-gate", "--heatmaps", "called")
    says(*files[:8], "--heatmaps", "uncertain")
    called, uncertain = ({p.name: p.read_bytes() for p in Path(name).iterdir()} for name in ("called", "uncertain"))
    assert called == uncertain and len(called) == 8


HOT = {"temperature": 3.0, "intercepts": [0.25, -0.5], "threshold": 0.55, "calibration_kind": "validation"}


def test_uncalibrated_makes_the_same_decisions_by_default(model, files):
    hot = type(model)(model.path, model.settings | HOT, model.network)
    calibrated, raw = predict(files, hot), predict(files, hot, uncalibrated=True)
    assert (calibrated.prediction == raw.prediction).all()
    assert not np.allclose(calibrated.p_NORMAL, raw.p_NORMAL)
    np.testing.assert_allclose(raw.p_NORMAL, predict(files, model, uncalibrated=True).p_NORMAL, atol=1e-6)


def test_the_threshold_moves_with_temperature_and_intercepts(model):
    hot = type(model)(model.path, model.settings | HOT, model.network)
    margins = np.linspace(-3, 3, 61)
    logits = np.stack([np.zeros(61), margins], axis=1)
    calibrated, raw = hot.probabilities(logits), hot.probabilities(logits, calibrated=False)
    decisions = hot.decide(calibrated)
    assert (decisions == (margins / 3 - 0.75 >= np.log(0.55 / 0.45))).all()
    assert (hot.decide(raw, hot.threshold_of(calibrated=False)) == decisions).all()
    assert (hot.decide(raw) != decisions).any()  # the export's own threshold belongs to calibrated probabilities


def test_paths_pictures_and_arrays(model, an_image, tmp_path):
    picture, array = Image.open(an_image), np.asarray(Image.open(an_image))
    table = predict([str(an_image), an_image, picture, array, picture.copy(), an_image.read_bytes()], model)
    assert table.path.tolist() == [str(an_image)] * 3 + ["image 3", "image 4", "image 5"]
    assert table.p_NORMAL.max() - table.p_NORMAL.min() < 1e-3
    for one in (an_image, picture, array):
        assert len(predict(one, model)) == 1
    assert predict(iter([]), model).columns.tolist() == COLUMNS
    bad = predict([np.full((4, 4), np.nan), array], model)
    assert "values from nan" in bad.error[0] and bad.prediction[1] in model.classes


def test_a_path_of_any_kind(model, files):
    with os.scandir(Path(files[0]).parent) as entries:
        entry = next(entry for entry in entries if entry.path == str(files[0]))
    assert predict(entry, model).path.tolist() == [str(files[0])]
    assert predict([entry], model, recursive=1).error.isna().all()  # as bool


def test_the_stream_gives_logits_in_order(model, files):
    found = list(predict_stream(model, [*files[:3], "nowhere.png", *files[3:5]], batch_size=2))
    assert [source for source, _, _ in found] == [*files[:3], "nowhere.png", *files[3:5]]
    assert found[3][1] is None and str(found[3][2]) == "nowhere.png: no such file" and found[4][1].shape == (2,)


def test_an_output_that_is_not_a_number_is_an_error_of_the_row(model, files, monkeypatch):
    def nan(self, images, exact=False):
        return torch.full((len(images), 2), torch.nan), torch.zeros(len(images), 4)

    monkeypatch.setattr(type(model), "logits_and_features", nan)
    for some in (files[:2], files[:10]):  # the first way, and the second
        table = predict(some, model)
        assert table.prediction.isna().all() and "not a number" in table.error[0]


@pytest.mark.slow
def test_more_than_two_classes(run, tmp_path):
    data = draw_collection(tmp_path / "data", {"train/A": 8, "train/B": 8, "train/PNEUMONIA": 8})
    fit = ["--weights", "none", "--epochs", 1, "--exports", tmp_path, "--name", "three", "--class-weights", "none"]
    result = run("fit", "--data", data, *QUICK, *fit)
    assert result.exit_code == 0, result.output
    three = open_model(tmp_path / "three")
    table = predict(data / "train" / "A", three)
    scores = table[["p_A", "p_B", "p_PNEUMONIA"]]
    assert table.threshold.isna().all() and (table.prediction == scores.idxmax(axis=1).str[2:]).all()
    result = run("predict", data / "train" / "A", "--model", tmp_path / "three", "--output", "out.csv")
    assert "the most probable class is predicted" in result.stdout and pd.read_csv("out.csv").threshold.isna().all()
    with pytest.raises(UserError, match=r"^threshold 0\.3: a model of 3 classes"):
        predict(data / "train" / "A", three, threshold=0.3)
    with pytest.raises(UserError, match=r"^prevalence 0\.3: a model of 3 classes has no class to detect; leave it out"):
        predict(data / "train" / "A", three, prevalence=0.3)


def test_a_column_is_added_in_one_place(model, says, files, monkeypatch):
    """Text stays text and numbers stay numbers, in the data frame, in both files, and when they are continued."""

    def columns_of(classes, at_prevalence=False, facts=()):
        extra = [
            Column("folder", str, lambda result: result.path.split("/")[-2]),
            Column("seven", float, lambda _: 7.0),
        ]
        return [*original(classes), *extra]

    original = rows_module.columns_of
    monkeypatch.setattr(rows_module, "columns_of", columns_of)
    table = predict(files[:3], model)
    assert table.columns.tolist() == [*COLUMNS, "folder", "seven"] and table.folder.tolist() == ["NORMAL"] * 3
    for output in ("out.csv", "out.jsonl"):
        assert says(*files[:2], "--output", output).exit_code == 0
        with RowFile(output, {c.name: c.type for c in columns_of(model.classes)}, resume=True) as file:
            assert [(row["folder"], row["seven"], row["error"]) for row in file.done()] == [("NORMAL", 7.0, None)] * 2
        assert says(*files[:3], "--output", output, "--resume").exit_code == 0
        rows = read(Path(output)).drop(columns="error")
        pd.testing.assert_frame_equal(rows, table.drop(columns="error"), check_dtype=False, atol=1e-5)


# what is named


def test_folders(says, images, tmp_path):
    images = shutil.copytree(images, Path("images").absolute())
    (images / "NORMAL" / "._hidden.jpeg").write_text("")
    (images / "NORMAL" / "notes.txt").write_text("")
    os.symlink(images / "NORMAL", tmp_path / "link")
    result = says(tmp_path / "link", "--output", "flat.csv")
    assert result.exit_code == 0 and "passed over   1 file whose name is no image's" in result.output
    names = [Path(path).name for path in read(Path("flat.csv")).path]
    assert names == sorted(names) and len(names) == 16
    os.symlink(tmp_path, tmp_path / "loop")  # a link to what holds it
    assert says(images, tmp_path, "--recursive", "--output", "deep.csv").exit_code == 0
    parents = [Path(path).parent for path in read(Path("deep.csv")).path]
    assert parents == [images / "NORMAL"] * 16 + [images / "PNEUMONIA"] * 24 + [tmp_path / "link"] * 16


def test_a_list_on_standard_input(says, files, images):
    listed = "\n".join([files[3], "", files[3], "nowhere.png", str(images / "NORMAL")]) + "\r\n"
    result = says(files[0], "-", files[1], "--output", "out.csv", stdin=listed)
    assert result.exit_code == 3
    rows = read(Path("out.csv"))
    assert rows.path.tolist() == [files[0], files[3], files[3], "nowhere.png", *files[:16], files[1]]
    assert rows.error.dropna().tolist() == ["nowhere.png: no such file"]


def test_what_can_not_be_read_is_a_row(says, files, tmp_path):
    os.symlink(tmp_path / "gone.png", tmp_path / "broken.png")
    (tmp_path / "text.jpeg").write_text("text")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpeg").write_bytes(Path(files[0]).read_bytes()[:400])
    result = says("nowhere.png", tmp_path, files[0], "--output", "out.jsonl")
    assert result.exit_code == 3 and "Traceback" not in result.output
    assert result.stderr == "Error: 5 of 6 files could not be read; the column error of out.jsonl says why\n"
    rows = read(Path("out.jsonl"))
    names = ["nowhere.png", "broken.png", "cut.jpeg", "empty.png", "text.jpeg", Path(files[0]).name]
    assert [Path(path).name for path in rows.path] == names
    assert rows.prediction[:5].isna().all() and rows.p_NORMAL[:5].isna().all() and rows.error.isna()[5]
    for error, words in zip(
        rows.error, ["no such file", "no such file", "broken", "empty", "not an image"], strict=False
    ):
        assert words in error


def test_the_newest_export_by_default(run, export, an_image, monkeypatch):
    Path("exports").mkdir()
    os.symlink(export, "exports/mine")
    result = run("predict", an_image)
    assert result.exit_code == 0 and "exports/mine (the newest in ./exports)" in result.stdout


# the terminal


def test_a_table_for_a_few(says, files, tmp_path):
    deep = tmp_path / ("folder" * 20)
    deep.mkdir()
    os.symlink(files[0], deep / "an \x1b[31mimage.jpeg")
    result = says(*files[:3], deep / "an \x1b[31mimage.jpeg", "nowhere.png")
    lines = result.stdout.splitlines()
    assert lines[0] == lines[-1] == DISCLAIMER
    rows = lines[lines.index(next(line for line in lines if line.startswith("path"))) :][:6]
    assert max(map(len, rows)) <= 80 and rows[0].split() == ["path", "prediction", "p_NORMAL", "p_PNEUMONIA"]
    assert len({len(row) for row in rows[:5]}) == 1  # aligned
    assert "…" in rows[4] and "an ?[31mimage.jpeg" in rows[4] and rows[5].endswith("no such file")
    assert result.stderr == "Error: 1 of 5 files could not be read; their rows say why\n"
    assert "5 files in" in result.stdout and "errors: 1" in result.stdout


def test_many_rows_are_cut(says, files):
    result = says(*files, *files)
    rows = [line for line in result.stdout.splitlines() if ".jpeg" in line]
    assert len(rows) == 50 and "--output" in result.stdout and "80 files in" in result.stdout


# the file


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_holds_what_python_gets(suffix, says, model, files):
    odd = ["a, b.jpeg", 'a "b".jpeg', "a\nb.jpeg", "a\rb.jpeg", "ä.jpeg"]
    for name in odd:
        os.symlink(files[0], name)
    inputs = [*files[:3], *odd, "nowhere.png"]
    output = Path("out" + suffix)
    result = says(*inputs, "--output", output)
    assert result.stdout.splitlines()[0] == result.stdout.splitlines()[-1] == DISCLAIMER
    rows = read(output)
    assert rows.columns.tolist() == COLUMNS
    pd.testing.assert_frame_equal(rows, predict(inputs, model), check_dtype=False, atol=1e-6)


def test_a_name_that_is_not_utf8(says, files):
    name = os.fsdecode(b"\xff.jpeg")
    os.symlink(files[0], name)
    for output in ("out.csv", "out.jsonl"):
        assert says(name, "--output", output).exit_code == 0
        assert says(name, files[0], "--output", output, "--resume").exit_code == 0
    assert says("-", stdin=b"\xff.jpeg\n").exit_code == 0
    assert "\n\\udcff.jpeg," in Path("out.csv").read_text(encoding="utf-8")
    assert json.loads(Path("out.jsonl").read_text().splitlines()[0])["path"] == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "out.txt"], "ends in .csv, .jsonl or .xlsx"),
        (["--output", "there.csv"], "--output there.csv: already exists"),
        (["--output", "nowhere/out.csv"], "nowhere/out.csv: cannot be written to (No such file or directory)"),
        (["--output", "folder.csv"], "a folder, not a file"),
        (["empty"], "empty: no image in this folder (looked for .jpeg"),
        (["--heatmaps", "there.csv"], "--heatmaps there.csv: cannot be made"),
        (["images", "--heatmaps", "images"], "give a folder outside"),
        (["images", "--recursive", "--heatmaps", "images/maps"], "give a folder outside"),
        (["--model", "empty"], "empty: not an export"),
    ],
)
def test_bad_input(options, words, says, refused, files):
    for folder in ("empty", "folder.csv", "images"):
        Path(folder).mkdir()
    Path("empty/notes.txt").write_text("")
    os.symlink(files[0], "images/a.jpeg")
    Path("there.csv").write_text("mine")
    if "--model" in options:
        result = CliRunner().invoke(app, ["predict", files[0], *options], prog_name="xray-fastai")
    else:
        result = says(files[0], *options)
    refused(result, words, code=None)
    assert Path("there.csv").read_text() == "mine" and not Path("out.txt").exists()
    refused(says(files[0], "--resume"), "--resume: give the file to continue by --output", code=2)


def test_no_export(run, refused, an_image):
    refused(run("predict", an_image), "no export")


def test_a_folder_whose_images_lie_deeper(says, refused, images):
    refused(says(images), f"{images}: no image in this folder", "--recursive")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(says, refused, files, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(says(files[0], "--output", tmp_path / "closed" / "out.csv"), "cannot be written to (Permission denied)")


# continuing


@pytest.fixture
def whole(says, files):
    """Write a complete file of twelve inputs: one has a line break in its name, two cannot be read."""
    os.symlink(files[0], "a\nb, c.jpeg")
    Path("bad.jpeg").write_text("text")
    inputs = [*files[:4], "a\nb, c.jpeg", "nowhere.png", *files[4:9], "bad.jpeg"]

    def whole(suffix):
        path = Path("whole" + suffix)
        assert says(*inputs, "--output", path).exit_code == 3
        return inputs, path.read_bytes()

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_cut_anywhere_is_continued_to_the_same(suffix, says, whole):
    inputs, content = whole(suffix)
    output = Path("out" + suffix)
    middle = content.index(b"nowhere.png")  # behind the row with a line break in it
    first = content.index(b"\n") + 1
    for end in [
        0,
        3,
        first - 1,
        first,
        first + 40,
        *range(middle - 100, middle + 4, 9),
        len(content) - 1,
        len(content),
    ]:
        output.write_bytes(content[:end])
        result = says(*inputs, "--output", output, "--resume", "--batch-size", 5)
        assert result.exit_code == 3, result.output
        rows, expected = read(output), read(Path("whole" + suffix))
        pd.testing.assert_frame_equal(rows, expected, atol=1e-5)
        assert "Error: 2 of 12 files" in result.stderr and "12 rows" in result.stdout


def test_a_list_is_continued(says, files):
    assert says("-", "--output", "out.csv", stdin="\n".join(files[:7])).exit_code == 0
    result = says("-", "--output", "out.csv", "--resume", stdin="\n".join(files[:20]))
    assert result.exit_code == 0 and "13 files in" in result.stdout and "after 7 rows" in result.stdout
    assert read(Path("out.csv")).path.tolist() == files[:20]


def test_a_csv_holds_no_formulas(says, files):
    """A name that a spreadsheet or a terminal would act on is written as text, and found again."""
    names = ["=1+1.jpeg", "'=1.jpeg", "-x.jpeg", "@x.jpeg", "\x1b[31m.jpeg", "it's.jpeg", "two\nlines.jpeg"]
    for name in names:
        shutil.copy(files[0], name)
    given = "\n".join(name for name in names if "\n" not in name)
    Path("folder").mkdir()
    shutil.move(names[-1], "folder")
    assert says("-", "folder", "--output", "out.csv", stdin=given).exit_code == 0
    shown = ["'=1+1.jpeg", "''=1.jpeg", "'-x.jpeg", "'@x.jpeg", "\\x1b[31m.jpeg", "it's.jpeg", "folder/two\nlines.jpeg"]
    assert pd.read_csv("out.csv").path.tolist() == shown
    before = Path("out.csv").read_bytes()
    assert says("-", "folder", "--output", "out.csv", "--resume", stdin=given).exit_code == 0
    assert Path("out.csv").read_bytes() == before
    Path("out.csv").write_bytes(before.replace(b"'=1+1", b"=1+1"))  # as 0.1.0 wrote it
    assert says("-", "folder", "--output", "out.csv", "--resume", stdin=given).exit_code == 0


def test_resume_without_a_file_begins_one(says, files):
    assert says(files[0], "--output", "out.csv", "--resume").exit_code == 0
    assert len(read(Path("out.csv"))) == 1


def _other_probability(content):
    number = content.rsplit(b"\n", 2)[-2].split(b",")[2]
    return content.replace(number, b"0.123")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.replace(b"p_NORMAL", b"p_COVID"), "does not begin with the columns"),
        (lambda content: b"my notes", "does not begin with the columns"),
        (lambda content: content + b"a,b\n", "row 5 of out.csv does not have the columns"),
        (lambda content: content + content.splitlines()[1] + b"\n", "row 5 of out.csv is", ),
        (lambda content: content.replace(b"train1.jpeg", b"train9.jpeg"), "but that input is"),
        (_other_probability, "the rows in out.csv came from another model, --precision or --tta"),
    ],
    ids=["class", "text", "columns", "too many", "path", "model"],
)  # fmt: skip
def test_what_does_not_fit_is_not_continued(change, words, says, refused, files):
    assert says(*files[:4], "--output", "out.csv").exit_code == 0
    content = change(Path("out.csv").read_bytes())
    Path("out.csv").write_bytes(content)
    refused(says(*files[:4], "--output", "out.csv", "--resume"), "--resume: ", words)
    assert Path("out.csv").read_bytes() == content


def test_another_threshold_is_not_continued(says, refused, files):
    assert says(*files[:4], "--output", "out.csv").exit_code == 0
    result = says(*files[:6], "--output", "out.csv", "--resume", "--threshold", 0.9)
    refused(result, "--resume: the threshold in out.csv is", "here 0.9")


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_disk_that_fills_up(suffix, says, refused, files):
    output = Path("out" + suffix)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, before[1]))
    try:
        result = says(*files, "--output", output, "--batch-size", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stand = len(read(output))
    refused(result, f"--output {output}: File too large after {stand} rows, which are kept", "--resume")
    assert 0 < stand < 40 and stand % 4 == 0
    assert says(*files, "--output", output, "--resume").exit_code == 0
    assert read(output).path.tolist() == files


@pytest.mark.slow
def test_ctrl_c_leaves_whole_rows(start, says, export, files):
    process = start(
        "predict", "-", "--model", export, "--device", "cpu", "--precision", "fp32", "--batch-size", 4,
        "--output", "out.csv", stdin=-1,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    process.stdin.write("\n".join(files))
    process.stdin.flush()  # and it waits for more
    wait_for(lambda: Path("out.csv").exists() and len(Path("out.csv").read_bytes().splitlines()) > 20, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    with open("out.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    kept = f"Stopped; out.csv has {len(rows)} rows, continue it by --resume."
    assert process.stderr.read().strip() == kept
    assert [row["path"] for row in rows] == files[: len(rows)] and rows[-1]["threshold"]
    process.stdin.detach()
    assert says("-", "--output", "out.csv", "--resume", stdin="\n".join(files)).exit_code == 0
    assert read(Path("out.csv")).path.tolist() == files


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_slow_pictures(start, export, tmp_path):
    """Progressive JPEGs of 25 megapixels take about a second each to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600), dtype=np.uint8)
    Image.fromarray(noise).resize((5000, 5000), Image.Resampling.NEAREST).save(
        tmp_path / "0.jpeg", progressive=True, quality=50
    )
    files = [tmp_path / f"{i}.jpeg" for i in range(60)]
    for file in files[1:]:
        file.symlink_to(files[0])
    process = start(
        "predict", *files, "--model", export, "--device", "cpu",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not process.stdout.readline().startswith("probabilities"):
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - sent < 8  # all of them take some 12 s on two cores


@pytest.mark.slow
def test_a_pipe_that_is_closed(start, export, files):
    process = start("predict", *files, "--model", export, "--device", "cpu", "--batch-size", 1)
    assert process.stdout.readline().strip() == DISCLAIMER
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


# heat maps


def test_heat_maps(says, files, model, monkeypatch):
    os.mkdir("same")
    os.symlink(files[0], f"same/{Path(files[0]).name}")
    Path("bad.jpeg").write_text("text")
    for _ in range(2):  # what is there stays
        result = says(*files[:2], "same", "bad.jpeg", "--heatmaps", "maps")
        assert result.exit_code == 3, result.output
        assert "heat maps     maps, " in result.stdout
    first, second = Path(files[0]).stem, Path(files[1]).stem
    names = [f"{first}.png", f"{second}.png", f"{first}-2.png", f"{first}-3.png", f"{second}-2.png", f"{first}-4.png"]
    assert sorted(path.name for path in Path("maps").iterdir()) == sorted(names)

    def ramp(_, images, targets):
        asked.extend(targets)
        return np.tile(np.linspace(0, 1, 4), (len(images), 4, 1))

    asked = []
    monkeypatch.setattr(heat_maps, "grad_cam", ramp)  # at this size the network's own map is a single place
    assert says(*files[14:18], "--heatmaps", "ramps", "--threshold", 0, "--batch-size", 3).exit_code == 0
    assert asked == [1, 1, 1, 1]  # the class that is called
    with Image.open(f"ramps/{Path(files[14]).stem}.png") as picture:
        assert picture.mode == "RGB" and picture.size[0] == heat_maps.LEAST_WIDTH and picture.size[1] > 432
        blue_to_red = np.asarray(picture).astype(int)[:432]  # 40 x 48 pixels, nine times as large
    assert (blue_to_red[:, -1, 0] > blue_to_red[:, -1, 2]).all()
    with Image.open(f"ramps/{Path(files[14]).stem}.png") as picture:
        assert np.asarray(picture)[432:].any()  # the words
    asked.clear()
    assert says(*files[14:16], "--heatmaps", "both", "--threshold", 1, "--batch-size", 3).exit_code == 0
    assert asked == [0, 1, 0, 1]  # the class to detect beside the one that is called
    with Image.open(f"both/{Path(files[14]).stem}.png") as picture:
        assert picture.size[0] == 2 * heat_maps.LEAST_WIDTH


def test_heat_maps_of_rows_that_do_not_stand_go(says, files, monkeypatch):
    """Ctrl-C comes while the second batch's maps are drawn; --resume draws them again under the same names."""
    names = [path.name for path in made_by(says, files, "whole")]
    save, calls = Image.Image.save, []

    def interrupted(picture, stream, *args):
        calls.append(1)
        if len(calls) == 6:
            stream.write(b"begun")
            raise KeyboardInterrupt
        return save(picture, stream, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        result = says(*files[:8], "--heatmaps", "maps", "--output", "out.csv", "--batch-size", 4)
    assert result.exit_code == 130 and "out.csv has 4 rows" in result.stderr
    assert [path.name for path in sorted(Path("maps").iterdir())] == names[:4]
    assert [path.name for path in made_by(says, files, "maps", "--output", "out.csv", "--resume")] == names


def made_by(says, files, folder, *options):
    assert says(*files[:8], "--heatmaps", folder, "--batch-size", 4, *options).exit_code == 0
    return sorted(Path(folder).iterdir())


def test_an_output_that_another_process_is_writing_is_left_to_it(says, refused, files):
    with RowFile("out.csv", {"path": str}):
        for resume in ([], ["--resume"]):
            assert says(files[0], "--output", "out.csv", *resume).exit_code == 1
        refused(says(files[0], "--output", "out.csv", "--resume"), "--output out.csv: another predict is writing it")
    assert sorted(os.listdir()) == ["out.csv"]


@pytest.mark.slow
def test_bf16_on_a_cpu_that_only_imitates_it(start, export, files):
    """oneDNN's own operators do not run there; torch's do."""
    args = ["predict", *files[:4], "--model", export, "--device", "cpu", "--precision", "bf16", "--output", "out.csv"]
    process = start(*args, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    exact = predict(files[:4], export, device="cpu", precision="fp32")
    assert read(Path("out.csv")).p_PNEUMONIA.to_numpy() == pytest.approx(exact.p_PNEUMONIA.to_numpy(), abs=0.1)


def test_the_error_of_an_array_names_its_place(model):
    table = predict([np.zeros((40, 40), np.uint8), np.full((40, 40), -1.0)], model)
    assert table.path.tolist() == ["image 0", "image 1"] and table.error[1].startswith("image 1: values from -1 to -1")
