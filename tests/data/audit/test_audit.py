"""What `data check` finds in a data set, what it advises, and that a fit goes by its list."""

import csv
import json
import ntpath
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageFile

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import check_data
from xray_fastai.data.audit.shortcuts import find_shortcuts
from xray_fastai.data.duplicates import near_pairs, same_image
from xray_fastai.data.exclusions import leave_out
from xray_fastai.data.image_facts import examine
from xray_fastai.data.sources.phantom import write


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The phantom's X-rays, small: its images are as unlike each other as real ones are."""
    return write(tmp_path_factory.mktemp("phantom") / "data", images=60, size=96)


@pytest.fixture
def data(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "data"))


def images(folder):
    return sorted(folder.glob("*.jpeg"))


def found(data, **options):
    """The findings by kind."""
    audit = check_data(data, **options)
    return {finding.kind: finding for finding in audit.findings}, audit


def files(finding):
    return [file.name for file in finding.files]


def test_a_good_data_set_has_no_errors_and_exit_code_0(run, data):
    result = run("data", "check", data)
    assert result.exit_code == 0, result.output
    assert "60 readable" in result.stdout and "0 errors" in result.stdout
    assert "error " not in result.stdout
    for split in ("train", "val", "test"):
        assert f"{split} " in result.stdout


@pytest.mark.slow
def test_without_a_folder_the_phantom_or_chest_xray_is_checked(run, data, few_drawings):
    assert "built-in phantom" in run("data", "check").stdout
    shutil.copytree(data, "chest_xray")
    assert json.loads(run("data", "check", "--json").stdout)["data"] == "chest_xray"


BROKEN = {
    "empty": (lambda content: b"", "0 bytes"),
    "text": (lambda content: b"no image", "not an image"),
    "truncated": (lambda content: content[: len(content) // 2], "truncated"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_file_is_an_error_with_its_reason(kind, run, data):
    path = images(data / "train" / "NORMAL")[2]
    spoil, reason = BROKEN[kind]
    path.write_bytes(spoil(path.read_bytes()))
    result = run("data", "check", data)
    assert result.exit_code == 1, result.output
    assert "1 file cannot be read" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if path.name in line)
    assert reason in line and line.strip().startswith(f"train/NORMAL/{path.name}: ")


@pytest.mark.slow
def test_animated_and_absurdly_large_files_are_unreadable(data):
    folder = data / "train" / "NORMAL"
    frames = [Image.new("L", (80, 80), value) for value in (10, 200)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    reasons = {file.name: file.detail for file in found(data)[0]["unreadable"].files}
    assert "2 frames" in reasons["train/NORMAL/moving.webp"]
    assert "pixels" in reasons["train/NORMAL/bomb.png"]


def save_as(path, mode, to):
    pixels = np.asarray(Image.open(path))
    deep = mode == "I;16"
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if deep else Image.fromarray(pixels).convert(mode)
    path.unlink()
    image.save(to)


def test_every_mode_opens_and_is_counted_once(data):
    paths = images(data / "train" / "NORMAL")
    for path, mode in zip(paths, ["RGB", "P", "RGBA", "CMYK", "I;16", "1"], strict=False):
        save_as(path, mode, path.with_suffix(".tif" if mode == "CMYK" else ".png"))
    findings, audit = found(data)
    assert audit.ok and len(audit.images) == 60
    for words in ("1 of three channels", "1 with a palette", "1 of CMYK", "1 of 16 or more bits", "1 of one bit"):
        assert words in findings["modes"].text
    assert "1 with transparency" in findings["modes"].text
    assert "coloured" not in findings


def test_misleading_names_and_headers_are_remarks(data):
    first, second = images(data / "train" / "NORMAL")[:2]
    Image.open(first).save(first.with_suffix(".png"), "JPEG")
    first.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(second).resize((96, 120)).save(second, exif=exif)
    findings, audit = found(data)
    assert audit.ok
    assert files(findings["wrong-extension"]) == [f"train/NORMAL/{first.stem}.png"]
    assert files(findings["exif-rotation"]) == [f"train/NORMAL/{second.name}"]
    (row,) = audit.images[audit.images.orientation == 6].itertuples()
    assert (row.width, row.height) == (120, 96)  # as it is seen, upright


def test_colours_are_seen_in_jpeg_and_png_and_grey_in_three_channels_is_not_coloured(data, tmp_path):
    paths = images(data / "train" / "NORMAL")
    marked = Image.open(paths[0]).convert("RGB")
    marked.paste((255, 0, 0), (5, 5, 25, 20))
    marked.save(paths[0], quality=90)
    marked.save(paths[1].with_suffix(".png"))
    paths[1].unlink()
    Image.open(paths[2]).convert("RGB").save(paths[2], quality=60)
    assert sorted(files(found(data)[0]["coloured"])) == sorted(
        [f"train/NORMAL/{paths[0].name}", f"train/NORMAL/{paths[1].stem}.png"]
    )


def test_blank_tiny_and_long_pictures_are_named(data):
    folder = data / "train" / "PNEUMONIA"
    picture = Image.open(images(folder)[0])
    Image.new("L", (200, 200), 90).save(folder / "blank.png")
    picture.resize((40, 50)).save(folder / "tiny.png")
    picture.crop((0, 0, 96, 30)).resize((400, 100)).save(folder / "long.png")
    findings, audit = found(data)
    for kind in ("blank", "tiny", "long"):
        assert files(findings[kind]) == [f"train/PNEUMONIA/{kind}.png"]
    assert [row["file"] for row in audit.left_out if row["finding"] == "blank"] == ["train/PNEUMONIA/blank.png"]


def edited_copy(path, to):
    picture = Image.open(path)
    ImageEnhance.Contrast(picture.resize((150, 140))).enhance(0.8).save(to, quality=60)


@pytest.mark.parametrize("copied", [shutil.copy, edited_copy], ids=["identical", "near-identical"])
@pytest.mark.parametrize(
    ("to", "kind", "severity", "out"),
    [
        ("test/PNEUMONIA/person900_virus_1.jpeg", "two-splits", "error", "the first"),
        ("train/NORMAL/IM-9000-0001.jpeg", "two-classes", "error", "both"),
        ("train/PNEUMONIA/person900_virus_1.jpeg", "two-patients", "warning", "the second"),
    ],
)
def test_the_same_image_twice(copied, to, kind, severity, out, data):
    first = images(data / "train" / "PNEUMONIA")[0]
    copied(first, data / to)
    findings, audit = found(data)
    pair = {f"train/PNEUMONIA/{first.name}", to}
    assert set(files(findings[kind])) == pair
    assert findings[kind].severity == severity and audit.ok == (severity != "error")
    gone = {row["file"] for row in audit.left_out}
    assert gone == {"the first": pair - {to}, "both": pair, "the second": {to}}[out]
    assert {"two-splits", "two-classes", "two-patients", "copies"} & set(findings) == {kind}


def test_different_x_rays_are_not_taken_for_copies(drawn):
    """Those of one patient, at the same pose and with the same ribs, included."""
    assert not {"two-splits", "two-classes", "two-patients", "copies"} & set(found(drawn)[0])


def test_copies_are_found_across_blocks_and_blank_images_are_no_copies(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (50, 4), dtype=np.uint64)
    hashes[40] = hashes[3] ^ np.uint64(0b1011)  # 12 bits apart
    monkeypatch.setattr("xray_fastai.data.duplicates._BLOCK", 100)  # two rows a step
    assert np.concatenate(list(near_pairs(hashes))).tolist() == [[3, 40]]
    table = pd.DataFrame({"digest": ["a", "b", "c", "c"], "contrast": [0.0, 0.0, 0.0, 0.0], "hash": [bytes(32)] * 4})
    assert len(set(same_image(table))) == 3 and same_image(table)[2] == same_image(table)[3]


def test_copies_are_as_close_as_edits_leave_them_and_closer_than_different_x_rays():
    """24 bits, and the 30 of the closest two of the phantom's drawings: see `duplicates`."""
    hashes = np.zeros((3, 4), np.uint64)
    hashes[1, 0], hashes[2, 2] = 2**24 - 1, 2**6 - 1  # 24 and 6 bits from the first, 30 from each other
    assert np.concatenate(list(near_pairs(hashes))).tolist() == [[0, 1], [0, 2]]


def test_the_hash_outlasts_what_people_do_to_files_but_not_a_different_x_ray(drawn, tmp_path):
    hashes = []
    for path in images(drawn / "train" / "NORMAL")[:6]:
        edited_copy(path, tmp_path / path.name)
        hashes += [examine(path).hash, examine(tmp_path / path.name).hash]
    words = np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)
    assert np.concatenate(list(near_pairs(words))).tolist() == [[i, i + 1] for i in range(0, len(hashes), 2)]


def test_a_patient_in_two_splits_is_an_error_but_a_recurring_number_is_a_remark(data):
    one, two = images(data / "test" / "PNEUMONIA")[:2]
    patients = {"same": "person901_virus", "other": "person902_virus"}
    one.rename(one.with_name(f"{patients['same']}_1.jpeg"))
    two.rename(two.with_name("person902_bacteria_2.jpeg"))
    for name, path in zip(patients.values(), images(data / "train" / "PNEUMONIA"), strict=False):
        path.rename(path.with_name(f"{name}_7.jpeg"))
    findings, audit = found(data)
    assert sorted(files(findings["patient-in-two-splits"])) == [
        "test/PNEUMONIA/person901_virus_1.jpeg",
        "train/PNEUMONIA/person901_virus_7.jpeg",
    ]
    assert [row["file"] for row in audit.left_out] == ["train/PNEUMONIA/person901_virus_7.jpeg"]
    assert "person902" in findings["number-in-two-splits"].files[0].detail
    assert findings["number-in-two-splits"].severity == "remark" and not audit.ok
    # names that the user explains are believed: there a number is a patient
    findings, _ = found(data, patient_pattern=r"person\d+")
    assert "number-in-two-splits" not in findings
    assert "2 patients" in findings["patient-in-two-splits"].text
    assert "no patient in the names" in findings["no-patient"].text


def test_one_patient_for_all_is_no_patient_known_and_spoils_no_list(data):
    findings, audit = found(data, patient_pattern=r"\.jpeg")  # in every name
    everyone = findings["one-patient"]
    assert everyone.severity == "error" and "--patient-pattern" in everyone.advice and not everyone.files
    assert "patient-in-two-splits" not in findings and not audit.ok


def shaped(data, size_of, **options):
    for label in ("NORMAL", "PNEUMONIA"):
        for i, path in enumerate(images(data / "train" / label)):
            Image.open(path).resize(size_of(label, i)).save(path, **options)


@pytest.mark.slow
def test_a_shape_that_tells_the_classes_apart_is_a_warning(run, data, tmp_path):
    root = write(tmp_path / "larger", images=150, size=64)
    varied = np.random.default_rng(0).integers(90, 150, (2, 300))
    shaped(root, lambda label, i: tuple(varied[:, i] + (0 if label == "NORMAL" else [0, 60])))
    findings, audit = found(root)
    shortcut = audit.shortcuts["form"]
    assert shortcut.auc.value > 0.9 and shortcut.auc.low > 0.7
    assert next(iter(shortcut.single)) in ("height", "aspect ratio")
    assert findings["shortcut-form"].severity == "warning" and audit.ok
    assert "AUC" in findings["shortcut-form"].text and "interpret" in findings["shortcut-form"].advice
    shaped(root, lambda label, i: tuple(varied[:, i]))  # the same varied shapes in both classes
    findings, audit = found(root)
    assert "shortcut-form" not in findings and audit.shortcuts["form"].auc.low < 0.6


@pytest.mark.slow
def test_jpeg_quality_that_tells_the_classes_apart_is_a_warning_and_few_patients_are_no_figure(tmp_path):
    root = write(tmp_path / "data", images=150, size=64)
    for path in images(root / "train" / "NORMAL"):
        Image.open(path).save(path, quality=60)
    findings, audit = found(root)
    assert "form" not in audit.shortcuts and "shortcut-coding" in findings
    assert audit.shortcuts["coding"].auc.value > 0.95
    assert sorted(audit.images[audit.images.split == "train"].quality.round().unique()) == [60, 90]
    few = audit.images[audit.images.split == "train"].groupby("label").head(9)
    assert find_shortcuts(few) == {}


@pytest.mark.slow
def test_what_tells_the_patients_apart_is_no_shortcut():
    """Each patient's images have a width of their own; by chance, it says nothing of the class."""
    patient = np.repeat(np.arange(60), 6)
    width = np.random.default_rng(0).permutation(np.arange(100, 160))[patient]
    table = pd.DataFrame({"patient": patient, "label": np.where(patient % 2, "A", "B"), "width": width, "height": 100})
    table = table.assign(mode="L", format="JPEG", quality=75.0, bytes=width * 100)
    form = find_shortcuts(table)["form"]
    assert form.auc.value < 0.65 and not form.alarming


@pytest.mark.slow
def test_more_than_two_classes_have_a_shortcut_too(tmp_path):
    counts = {f"train/{name}": 30 for name in "ABC"}
    root = draw_collection(tmp_path / "data", counts)
    for i, path in enumerate(images(root / "train" / "A")):
        Image.open(path).resize((100 + i % 3, 60)).save(path)
    assert 0.7 < check_data(root).shortcuts["form"].auc.value < 0.95  # B and C are the same


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda d: (d / "train" / "COVID").mkdir(), "empty-class", "train/COVID: no image in it"),
        (lambda d: shutil.rmtree(d / "val" / "NORMAL"), "missing-class", "val/ has no class NORMAL"),
        (lambda d: (d / "val" / "NORMAL").rename(d / "val" / "X"), "surplus-class", "val/ holds class X"),
        (lambda d: shutil.rmtree(d / "train" / "NORMAL"), "one-class", "train/ has 1 class folder"),
        (lambda d: shutil.rmtree(d / "train"), "no-train", "there is no train/"),
    ],
)  # fmt: skip
def test_a_layout_that_no_fit_takes_is_an_error(spoil, kind, words, run, data):
    spoil(data)
    result = run("data", "check", data)
    assert result.exit_code == 1 and words in result.stdout, result.output
    assert found(data)[0][kind].severity == "error"


def test_every_file_of_a_class_unreadable(run, data):
    for path in (data / "train").glob("*/*.jpeg"):
        path.write_bytes(b"")
    assert run("data", "check", data).exit_code == 1
    for path in data.glob("*/*/*.jpeg"):
        path.write_bytes(b"")
    result = run("data", "check", data)
    assert result.exit_code == 1 and "no readable image" in result.stdout, result.output
    json.loads(run("data", "check", data, "--json").stdout)


def test_small_splits_are_reported_with_an_interval(data):
    audit = check_data(data)
    small = [finding.text for finding in audit.findings if finding.kind == "few-images"]
    assert len(small) == 3 and any("test/" in text for text in small)
    (advice,) = (f.advice for f in audit.findings if f.kind == "few-images" and f.text.startswith("test/"))
    assert "if 4 of 5 are detected, the sensitivity is 0.38 to 0.96 (95 %)" in advice


def test_imbalance_is_a_remark(data):
    for path in images(data / "train" / "NORMAL")[3:]:
        path.unlink()
    assert "PNEUMONIA as NORMAL" in found(data)[0]["imbalance"].text


def test_classes_without_splits_are_checked_with_advice(run, data):
    result = run("data", "check", data / "train")
    assert result.exit_code == 1
    assert "there is no train/, but folders of classes: NORMAL, PNEUMONIA" in result.stdout


def test_stray_files_are_distinguished(data):
    folder = data / "train" / "NORMAL"
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (folder / "scan.ima").write_bytes(bytes(128) + b"DICM" + bytes(50))
    Image.open(images(folder)[0]).save(folder / "scan.gif")
    shutil.copy(images(folder)[0], data / "train" / "outside.jpeg")
    findings, audit = found(data)
    assert audit.ok
    assert files(findings["system-file"]) == ["train/NORMAL/.DS_Store", "train/NORMAL/Thumbs.db"]
    assert files(findings["no-image"]) == ["train/NORMAL/notes.txt"]
    assert findings["no-image"].text == "1 file that is not an image"
    unread = {file.name: file.detail for file in findings["not-read"].files}
    assert unread.keys() == {"train/NORMAL/scan.ima", "train/NORMAL/scan.gif", "train/outside.jpeg"}
    assert "DICOM" in unread["train/NORMAL/scan.ima"]


@pytest.mark.parametrize("argument", ["nowhere", "a-file", "empty"])
def test_no_data_set(argument, run, refused):
    Path("a-file").write_text("x")
    Path("empty").mkdir()
    refused(run("data", "check", argument), argument)


@pytest.mark.slow
def test_json_is_all_that_is_printed_and_names_every_file(start, data, tmp_path):
    for path in images(data / "train" / "NORMAL")[:5]:
        path.write_bytes(b"")
    process = start("data", "check", data, "--json", "--fix", tmp_path / "list.csv")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and not err
    report = json.loads(out)
    assert report["format"] == 1 and report["ok"] is False and report["counts"]["error"] == 1
    assert report["images"] == 55 and sum(row["images"] for row in report["splits"]) == 55
    (unreadable,) = (f for f in report["findings"] if f["kind"] == "unreadable")
    assert unreadable["count"] == len(unreadable["files"]) == 5
    assert unreadable["files"][0].keys() == {"file", "detail", "action"}
    assert {f["severity"] for f in report["findings"]} <= {"error", "warning", "remark"}


def test_a_list_is_written_whole_and_nothing_is_overwritten(run, refused, data):
    spoilt = images(data / "train" / "NORMAL")[0]
    spoilt.write_bytes(b"")
    result = run("data", "check", data, "--fix", "list.csv")
    assert result.exit_code == 1 and "1 file to leave out" in result.stdout
    with open("list.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["file"], row["finding"], row["action"]) == (f"train/NORMAL/{spoilt.name}", "unreadable", "leave out")
    assert "0 bytes" in row["detail"]
    before = Path("list.csv").read_bytes()
    refused(run("data", "check", data, "--fix", "list.csv"), "--fix list.csv: already exists")
    refused(run("data", "check", data, "--fix", "nowhere/list.csv"), "--fix nowhere/list.csv", "no folder")
    assert Path("list.csv").read_bytes() == before and sorted(os.listdir(".")) == ["list.csv"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_names_that_are_no_text(run, data):
    folder = data / "train" / "NORMAL"
    name = os.fsdecode(b"IM-77-\xff\n.jpeg")
    (folder / name).write_bytes(b"")
    assert run("data", "check", data, "--fix", "list.csv").exit_code == 1
    assert b"IM-77-\xff" in Path("list.csv").read_bytes()
    json.loads(run("data", "check", data, "--json").stdout)
    args = ["--weights", "none", "--epochs", 1, "--exclude", "list.csv", "--name", "odd"]
    result = run("fit", "--data", data, *QUICK, *args)
    assert result.exit_code == 0 and "left out by the list list.csv: 1 image" in result.stdout, result.output


FIT = ["--weights", "none", "--epochs", 1]


@pytest.mark.slow
def test_a_fit_leaves_out_what_the_list_says(run, collection):
    spoilt, kept, gone = images(collection / "train" / "PNEUMONIA")[:3]
    spoilt.write_bytes(b"")
    rows = [(spoilt, "leave out"), (kept, "keep"), (Path("IM-none.jpeg"), "leave out"), (gone, "Leave out ")]
    table = [{"file": f"train/PNEUMONIA/{path.name}", "action": action} for path, action in rows]
    pd.DataFrame(table).to_csv("list.csv", index=False)
    result = run("fit", "--data", collection, *QUICK, *FIT, "--exclude", "list.csv", "--name", "without")
    assert result.exit_code == 0, result.output
    assert "left out by the list list.csv: 2 images" in result.stdout
    assert "named by the list list.csv, but missing: 1 file" in result.stdout
    model = settings_of(Path("exports/without"))
    assert sum(model["data"]["train"].values()) + sum(model["data"]["valid"].values()) == 42
    assert model["settings"]["exclude"] == "list.csv"
    assert spoilt.name not in (Path("exports/without") / "model.json").read_text()


def test_on_windows_a_list_may_have_backslashes_and_another_case(monkeypatch, tmp_path):
    monkeypatch.setattr("os.path.normcase", ntpath.normcase)
    table = pd.DataFrame([("train/A/p1.jpeg", "train", "A"), ("train/A/p2.jpeg", "train", "A")])
    table.columns = ["file", "split", "label"]
    rows = [("train\\A\\P1.jpeg", "leave out"), ("train/A/none.jpeg", "leave out")]
    pd.DataFrame(rows, columns=["file", "action"]).to_csv("list.csv", index=False)
    kept, notes = leave_out(table, tmp_path, "list.csv")
    assert kept.file.tolist() == ["train/A/p2.jpeg"]
    assert notes == ["left out by the list list.csv: 1 image", "named by the list list.csv, but missing: 1 file"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"path;what\nx;y\n", "columns file and action"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "columns file and action"),
        (b"", "columns file and action"),
        (b'file,action\n"x,leave out\n', "after line 1"),
        (b"file,action\nx,keep\ny,\nz,leave_out\n", 'line 4, z: unknown action "leave_out"; write leave out, or keep'),
    ],
    ids=["missing", "columns", "binary", "empty", "quotes", "action"],
)
def test_a_wrong_list_is_refused(content, words, run, refused, collection):
    if content is not None:
        Path("list.csv").write_bytes(content)
    refused(run("fit", "--data", collection, *QUICK, *FIT, "--exclude", "list.csv"), "--exclude list.csv", words)


def test_a_list_of_a_whole_class_is_refused(run, refused, collection):
    names = [f"train/NORMAL/{path.name}" for path in images(collection / "train" / "NORMAL")]
    pd.DataFrame({"file": names, "action": "leave out"}).to_csv("list.csv", index=False)
    words = ["--exclude list.csv", "every image of train/NORMAL"]
    refused(run("fit", "--data", collection, *QUICK, *FIT, "--exclude", "list.csv"), *words)


@pytest.mark.slow
def test_a_fit_says_what_matters_and_names_no_file_in_its_export(run, data):
    """A copy under another patient's name stays on its side, a wrong label and too few images are reported."""
    one, two = images(data / "train" / "PNEUMONIA")[:2]
    edited_copy(one, data / "train" / "PNEUMONIA" / "person900_virus_1.jpeg")
    edited_copy(two, data / "train" / "NORMAL" / "IM-9000-0001.jpeg")
    result = run("fit", "--data", data, *QUICK, *FIT, "--valid", "0.5", "--name", "noted")
    assert result.exit_code == 0, result.output
    model = settings_of(Path("exports/noted"))
    notes = " | ".join(model["data"]["notes"])
    assert "same image under two classes: 2 files" in notes
    assert "same image under two patients: 2 files, kept on one side" in notes
    assert "few validation images: " in notes
    for word in ("person9", "IM-9000", ".jpeg"):
        assert word not in json.dumps(model["data"])
    for note in model["data"]["notes"]:
        assert note in result.stdout


@pytest.mark.slow
def test_near_identical_copies_stay_on_one_side_of_the_hold_out(tmp_path):
    from xray_fastai.data.dataset import check_files
    from xray_fastai.data.folders import read_split
    from xray_fastai.data.splits import hold_out

    root = write(tmp_path / "data", images=60, size=96)
    for i, path in enumerate(images(root / "train" / "PNEUMONIA")[:12]):
        edited_copy(path, path.with_name(f"person{900 + i}_virus_1.jpeg"))
    table = check_files(read_split(root, "train"))[0]
    for seed in range(5):
        held_out = hold_out(table, 0.3, seed)
        assert not set(table.image[held_out]) & set(table.image[~held_out])
    assert table.image.duplicated().sum() == 12


@pytest.mark.slow
def test_ctrl_c_while_reading_ends_at_once_and_writes_nothing(data, tmp_path):
    """Sent from within, once some files are read. If it hangs from then on, the message shows each thread's stack."""
    program = (
        "import faulthandler, sys, os, signal, xray_fastai.data.image_facts as facts\n"
        "from xray_fastai.cli.main import app\n"
        "read, count = facts.examine, iter(range(10**9))\n"
        "def examine(*args):\n"
        "    if next(count) == 20:\n"
        "        faulthandler.dump_traceback_later(60, exit=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return read(*args)\n"
        "facts.examine = examine\n"
        "app(['data', 'check', sys.argv[1], '--fix', 'list.csv'])\n"
    )
    for path in images(data / "train" / "NORMAL")[:1]:
        for i in range(2000):
            os.symlink(path, path.with_name(f"IM-5{i:04d}-0001.jpeg"))
    done = subprocess.run(
        [sys.executable, "-c", program, data], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "Stopped; nothing was written." and not done.stdout
    assert not (tmp_path / "list.csv").exists()


@pytest.mark.slow
def test_the_real_collections_copies_and_shortcut(real_images):
    """28 pairs of identical files, all of one patient and class; at 224 pixels only the detail is left to tell."""
    findings, audit = found(real_images)
    train = audit.images[audit.images.split == "train"]
    if len(train) != 5216:
        pytest.skip("not the whole collection")
    assert "two-classes" not in findings and "two-splits" not in findings and "two-patients" not in findings
    assert all("identical to" in file.detail for file in findings["copies"].files)


def test_a_table_fits_an_eighty_column_terminal(run, data):
    for line in run("data", "check", data).stdout.splitlines()[1:]:  # the first has the folder
        assert len(line) <= 80, line


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_is_decoded_once(mode, monkeypatch, tmp_path):
    decoded, prepare = [], ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: decoded.append(self.mode) or prepare(self))
    Image.new(mode, (100, 100), 50).save(tmp_path / "x.jpeg")
    examine(tmp_path / "x.jpeg")
    assert decoded == ["YCbCr" if mode == "RGB" else "L"]
