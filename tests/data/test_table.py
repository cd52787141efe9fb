"""A table of images instead of folders: its columns, labels, splits and files, and what is wrong with it."""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import check_data, dataloaders
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.file_index import FileIndex
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.patients import ANY
from xray_fastai.data.table import FRAME, Source, read_table, with_patients
from xray_fastai.data.table_labels import Naming, read_labels
from xray_fastai.system.errors import UserError
from xray_fastai.training.fit import fit


@pytest.fixture
def images(tmp_path):
    """Sixty images in folders that are no classes."""
    root = tmp_path / "images"
    draw_collection(tmp_path / "drawn", {"NORMAL": 30, "PNEUMONIA": 30})
    for i, path in enumerate(sorted(tmp_path.glob("drawn/*/*"))):
        folder = root / f"study{i // 2}" / "series"
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{i:03}.jpeg")
    return root


def frame_of(images, **columns):
    """Return a table of the images: two of a patient, of a study; the first half is normal."""
    files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpeg"))
    number = [int(Path(file).stem) for file in files]
    given = {
        "path": files,
        "label": ["NORMAL" if n < 30 else "PNEUMONIA" for n in number],
        "patient": [f"Meier {n // 2}" for n in number],
    }
    return pd.DataFrame(given | columns)


def read(frame, images, column=None, **naming):
    return read_table(Source(frame, images, column, Naming(**naming)))


def texts(listing):
    return {fault.kind: fault.text for fault in listing.faults}


@pytest.mark.parametrize(
    ("headers", "separator", "encoding"),
    [
        (("path", "label", "patient"), ",", "utf-8"),
        (("Image Index", "Finding Labels", "Patient ID"), ";", "utf-8-sig"),
        (("FILE_NAME", "Class", "subject_id"), "\t", "utf-16"),
    ],
)
def test_columns_are_found_by_their_names(headers, separator, encoding, images):
    frame = frame_of(images).set_axis(headers, axis=1)
    frame.to_csv("t.csv", index=False, sep=separator, encoding=encoding)
    listing = read("t.csv", images)
    assert listing.table.label.value_counts().to_dict() == {"NORMAL": 30, "PNEUMONIA": 30}
    assert len(set(listing.patients.values())) == 30 and not listing.faults
    note = f"columns: path {headers[0]}, label {headers[1]}, patient {headers[2]}"
    assert listing.notes == ([] if headers[0] == "path" else [note])
    assert all(Path(path).is_file() for path in listing.table.path)


def test_excels_windows_1252_is_read_with_a_note(images):
    frame = frame_of(images, label=["Ohne Befund"] * 30 + ["Lungenentzündung € groß"] * 30)
    frame.to_csv("t.csv", index=False, sep=";", encoding="cp1252")
    listing = read("t.csv", images)
    assert set(listing.table.label) == {"Ohne Befund", "Lungenentzündung € groß"}
    assert len(listing.notes) == 1 and "read as Windows-1252" in listing.notes[0]
    frame.to_csv("t.csv", index=False, sep=";", encoding="utf-8")
    assert read("t.csv", images).notes == []


@pytest.mark.parametrize("column", ["label=Befund, kurz,sex=Sex", ["label=Befund, kurz", "sex=Sex"], None])
def test_columns_are_named_and_others_are_kept(column, images):
    frame = frame_of(images, sex="F").rename(columns={"label": "Befund, kurz", "sex": "Sex"})
    listing = read(frame, images, column or {"label": "befund, KURZ", "sex": "Sex"})
    table = listing.table
    assert listing.notes == ["columns: label Befund, kurz; kept: sex"]
    assert set(table["group:sex"]) == {"F"} and set(table.label) == {"NORMAL", "PNEUMONIA"}


@pytest.mark.parametrize(
    ("change", "column", "words"),
    [
        (lambda f: f.drop(columns="label"), None, r'no column for the label is found; name it, as in column="label='),
        (lambda f: f, "label=Nope", "column: no column Nope in pandas.DataFrame; it has path, label, patient"),
        (lambda f: f, "Nope", "column Nope: give NAME=HEADER"),
        (lambda f: f[:0], None, "has no rows"),
        (
            lambda f: f.assign(path="x.png"),
            None,
            "none of its 60 rows can be used; most have a file that is not there [(]column path[)], such as x.png",
        ),
        (
            lambda f: f.assign(split="x"),
            None,
            "a split other than train, val and test [(]column split[)], such as x; write",
        ),
        (
            lambda f: f.assign(label=""),
            None,
            r'most have no label [(]column label[)]; name the column by column="label=HEADER"$',
        ),
        (lambda f: f.assign(label=1), None, "positive: the labels in column label are 0 and 1; say what 1 means"),
        (lambda f: f.assign(label="A|B"), None, "several findings in a row, such as A|B"),
        (lambda f: pd.concat([f, f.label], axis=1), None, "two columns label, for the label"),
    ],
)
def test_a_table_that_is_none(change, column, words, images):
    with pytest.raises(UserError, match=words):
        read(change(frame_of(images)), images, column)


def test_labels_that_the_model_does_not_know_are_named_with_its_classes(images):
    frame = frame_of(images, label=["Pneumonie"] * 20 + ["Ohne Befund"] * 40)
    with pytest.raises(UserError) as caught:
        read(frame, images, classes=("NORMAL", "PNEUMONIA"))
    assert "(column label), such as Ohne Befund, Pneumonie; the model has NORMAL, PNEUMONIA" in str(caught.value)
    assert "images=" not in str(caught.value) and "study" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b"", "not a table"),
        (b"path,label\na,b\nc,d,e\n", "not a table"),
        (b"path,label\n\x81,b\n", "not UTF-8; save it as CSV UTF-8"),
    ],
)
def test_a_file_that_is_no_table(content, words, run, refused):
    if content is not None:
        Path("t.csv").write_bytes(content)
    for command in (["fit", "--data", "t.csv", *QUICK], ["data", "check", "t.csv"]):
        refused(run(*command), "t.csv", words)


def test_files_are_found_by_path_name_stem_and_folder():
    index = FileIndex(["a/s1/1.PNG", "a/s2/2.png", "b/s2/2.png", "1.2.840/1.3/1.2.7", "b/s9/p/x.dcm", "y.jpeg"])
    assert index.find("a/s1/1.PNG") == index.find("1.PNG") == index.find("1") == index.find("1.png") == ["a/s1/1.PNG"]
    assert index.find("/data/set/a/s2/2.png") == index.find("a\\s2\\2.png") == index.find("./a/s2/2") == ["a/s2/2.png"]
    assert index.find("2.png") == index.find("s2/2.png") == index.find("2") == ["a/s2/2.png", "b/s2/2.png"]
    assert index.find("1.2.7") == index.find("1.2.840") == index.find("1.3") == ["1.2.840/1.3/1.2.7"]
    assert index.find("s9") == index.find("x") == ["b/s9/p/x.dcm"] and len(index.find("b")) == 2
    assert index.find("folder/y.jpeg") == ["y.jpeg"]
    assert index.find("s3/2.png") == index.find("z") == index.find("s9/y.jpeg/z") == []


def test_dicom_studies_are_found_by_their_accession_number(tmp_path):
    """A hospital's archive: files without extensions in a folder of the series in one of the study."""
    dicom_files = pytest.importorskip("tests.data.dicom_files")
    for i in range(6):
        series = tmp_path / f"00{i}" / f"1.2.840.{i}"
        series.mkdir(parents=True)
        (series / f"1.2.840.{i}.7").write_bytes(
            dicom_files.written(dicom_files.picture(seed=i), PatientID=f"p{i // 2}")
        )
    shutil.copy(series / "1.2.840.5.7", series / "1.2.840.5.8")
    Path("t.csv").write_text("AccessionNumber,Befund\n" + "".join(f"00{i},{'AB'[i % 2]}\n" for i in range(6)))
    listing = read("t.csv", tmp_path, "label=Befund")
    assert list(listing.table.file) == [f"00{i}/1.2.840.{i}/1.2.840.{i}.7" for i in (0, 2, 4, 1, 3)]
    assert texts(listing)["several-files"] == "1 row with a name that fits several files"
    table = with_patients(listing.table, listing, ANY)
    assert table.patient.tolist() == ["DICOM #1", "DICOM #2", "DICOM #3", "DICOM #1", "DICOM #2"]


@pytest.mark.parametrize("element", ["AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_dicom_files_are_found_by_their_headers(element, tmp_path):
    dicom_files = pytest.importorskip("tests.data.dicom_files")
    for i in range(6):
        text = dicom_files.written(dicom_files.picture(seed=i), **{element: f"1.2.{min(i, 4)}"})
        (tmp_path / f"x{i}.dcm").write_bytes(text)
    rows = [("1.2.0", "A"), ("1.2.1", "B"), ("x2", "A"), ("1.2.4", "B"), ("1.2.9", "B"), ("", "B")]
    frame = pd.DataFrame(rows, columns=[element, "label"])
    listing = read(frame, tmp_path)
    assert list(listing.table.file) == ["x0.dcm", "x2.dcm", "x1.dcm"]
    assert f"3 rows found by {element} in the headers of the DICOM files" in listing.notes
    assert {kind: text[:5] for kind, text in texts(listing).items()} == dict.fromkeys(
        ("no-file", "several-files", "no-name"), "1 row"
    ) | {"no-row": "3 fil"}
    with pytest.raises(UserError, match="none of its 2 rows"):  # another column: names only
        read(frame[:2].rename(columns={element: "image"}), tmp_path)


def test_what_is_wrong_is_counted_and_named(images):
    frame = frame_of(images)
    frame["split"] = ["train"] * 40 + ["val"] * 10 + ["test"] * 8 + ["holdout"] * 2
    more = pd.DataFrame(
        {
            "path": [frame.path[0], frame.path[1], "gone.png", "study3", ""],
            "label": ["PNEUMONIA", "NORMAL", "NORMAL", "NORMAL", "NORMAL"],
            "split": "train",
            "patient": ["Meier 0", "Meier 0", "x", "x", "x"],
        }
    )
    frame.loc[3, "label"] = None
    frame.loc[45, "patient"] = frame.patient[4]
    listing = read(pd.concat([frame.drop(index=2), more]), images)
    assert texts(listing) == {
        "no-file": "1 row with a file that is not there",
        "several-files": "1 row with a name that fits several files",
        "no-name": "1 row with no name of a file",
        "no-label": "1 row with no label",
        "unknown-split": "2 rows with a split other than train, val and test",
        "conflict": "1 file in rows with different labels or splits",
        "repeated": "1 file in several rows, of which the first counts",
        "patient-in-two-splits": "1 patient in two splits",
        "no-row": "1 file without a row",
    }
    assert len(listing.table) == 60 - 1 - 1 - 2 - 1 and "study0/series/000.jpeg" not in set(listing.table.file)
    examples = " ".join(listing.examples)
    assert "holdout" in examples and "gone.png" in examples and frame.path[3] in examples
    assert "Meier" not in examples and "000.jpeg" not in " ".join(listing.summary)


@pytest.mark.parametrize(
    ("labels", "naming", "classes", "why"),
    [
        (
            ["1", "0", "1.0", "-1", ""],
            {"positive": "P"},
            ["P", "no P", "P", None, None],
            ["", "", "", "-1", "no label"],
        ),
        (["True", "false"], {"positive": "P", "classes": ["N", "P"]}, ["P", "N"], ["", ""]),
        (["A|p", "A", "No Finding"], {"positive": "P"}, ["P", "no P", "no P"], ["", "", ""]),
        (["['a', 'p']", "['normal']", "[]"], {"positive": "P"}, ["P", "no P", None], ["", "", "does not know"]),
        (["A|P", "A", "No Finding"], {"positive": "P", "classes": ["N", "P"]}, ["P", None, "N"], ["", "not know", ""]),
        (["A", "P", ""], {"positive": "P", "classes": ["P", "no P"]}, ["no P", "P", None], ["", "", "no label"]),
        (["normal", "P", "x"], {"classes": ["NORMAL", "P"]}, ["NORMAL", "P", None], ["", "", "does not know"]),
        (["Normal", "NORMAL", "NORMAL", "P"], {}, ["NORMAL", "NORMAL", "NORMAL", "P"], [""] * 4),
    ],
)
def test_labels(labels, naming, classes, why):
    found = read_labels(pd.Series(labels), "label", Naming(**naming))
    assert found.classes.astype(object).where(found.classes.notna(), None).tolist() == classes
    assert all(text in reason and bool(text) == bool(reason) for text, reason in zip(why, found.left_out, strict=True))


@pytest.mark.parametrize(
    ("labels", "naming", "words"),
    [
        ([*map(str, range(21))] * 9, {}, "it has 21 different numbers, such as 0, 1, 2"),
        ([f"{i},5" for i in range(21)] * 9, {"positive": "P", "classes": ["P", "no P"]}, "it has 21 different numbers"),
        (["a", "A", "b", "c", "d", ""], {}, "it has 4 different labels in 5 rows, such as a, A, b"),
        ([*map(str, range(20))] * 2, {}, None),
        ([*map(str, range(21))] * 9, {"classes": ["0", "1"]}, None),
        (["a", "b", "c"], {"positive": "a"}, None),
        (["a", "b", ""], {}, None),
        (["a", "b", "c", "A", "B", "C"], {}, None),
    ],
)
def test_a_column_that_is_none_of_labels(labels, naming, words):
    if words is None:
        read_labels(pd.Series(labels), "Age", Naming(**naming))
        return
    with pytest.raises(UserError, match=f"column label=Age: is this the right column[?] {words}"):
        read_labels(pd.Series(labels), "Age", Naming(**naming))


def test_a_data_frame_with_other_types(images):
    frame = frame_of(images)
    frame["label"] = (frame.label == "PNEUMONIA").astype(float)
    frame["patient"] = [float(i // 2) if i else float("nan") for i in range(60)]
    frame["path"] = [images / file for file in frame.path]
    frame["is_valid"] = pd.Categorical([i % 30 > 25 for i in range(60)])
    listing = read(frame, images, positive="P")
    assert (
        set(listing.table.label) == {"P", "no P"} and len(listing.patients) == 59 and "1" in listing.patients.values()
    )
    assert listing.table.split.value_counts().to_dict() == {"train": 52, "val": 8} and listing.is_decided


def config_of(**settings):
    return FitConfig(**{"data": FRAME, "column": "group=site"} | settings).with_recipe()


@pytest.fixture
def with_sites(images):
    """A table whose images are of three sites, which the patients do not cross, except one."""
    frame = frame_of(images)
    frame["site"] = [("A", "B", "C")[(i // 2) % 3] for i in range(60)]
    frame.loc[1, "site"] = "B"  # the other image of the patient is of A
    return frame


def test_a_group_is_held_out_whole(with_sites, images):
    data = read_collection(config_of(images=str(images), valid="group:B"), with_sites)[1]
    assert set(data.valid["group:group"]) == {"B"} and "B" not in set(data.train["group:group"])
    assert len(data.valid) == 21 and len(data.train) == 38 and not set(data.valid.patient) & set(data.train.patient)
    assert data.notes[0] == "group B (21 images)"
    assert "left out of training: 1 images whose patient, or a copy, is in group B" in data.notes
    assert all(patient.startswith("patient #") for patient in data.table.patient)
    with pytest.raises(UserError, match="valid group:Z: no image of this group; the groups are A, B, C"):
        read_collection(config_of(images=str(images), valid="group:Z"), with_sites)
    with pytest.raises(UserError, match='needs the column of the groups, by column="group=HEADER"'):
        read_collection(config_of(images=str(images), valid="group:B", column=None), with_sites)


def test_validation_is_held_out_by_patient_or_as_the_table_says(with_sites, images):
    config = config_of(images=str(images))
    data = read_collection(config, with_sites)[1]
    assert data.notes[0].endswith("images held out of the table, by patient")
    assert not set(data.valid.patient) & set(data.train.patient) and len(data.table) == 60
    val = [i % 30 >= 26 for i in range(60)]
    data = read_collection(config, with_sites.assign(is_valid=val))[1]
    assert data.notes[0] == "the validation part (8 images)" and len(data.valid) == 8
    split = ["val" if of_val else "train" for of_val in val]
    data = read_collection(config, with_sites.assign(split=split))[1]
    assert data.notes[0].endswith("and the validation part, which is too small alone (8 images)")
    data = read_collection(config_of(images=str(images), valid="0.2"), with_sites.assign(split=split))[1]
    assert "not used: 8 rows of the validation part" in data.notes and len(data.table) == 52
    split = ["test" if of_val else "train" for of_val in val]
    with pytest.raises(UserError, match="valid folder: no row of the table is for validation"):
        read_collection(config_of(images=str(images), valid="folder"), with_sites.assign(split=split))
    with pytest.raises(UserError, match=r"one class only to train on \(A\)"):
        read_collection(config, with_sites.assign(label="A"))
    with_sites.loc[val, "label"] = "OTHER"
    with pytest.raises(UserError, match="the validation part has other classes than the training images: OTHER"):
        read_collection(config, with_sites.assign(is_valid=val))


def test_options_of_a_table_need_one(run, refused, collection):
    refused(run("fit", "--data", collection, *QUICK, "--images", "x"), "--images x: is for a table of images")
    refused(run("data", "check", collection, "--column", "label=x"), "--column", "is for a table of images")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run):
    """An export of a fit to a table with a split column, the table, and the folder of its images."""
    root = tmp_path_factory.mktemp("table")
    counts = {"x/NORMAL": 24, "x/PNEUMONIA": 24, "y/NORMAL": 8, "y/PNEUMONIA": 8}
    images = draw_collection(root / "images", counts)
    rows = []
    for i, path in enumerate(sorted(images.rglob("*.jpeg"))):
        file = path.relative_to(images)
        rows.append(
            (file.as_posix(), file.parts[1].title(), "train" if file.parts[0] == "x" else "test", i // 2, i % 3)
        )
    rows.append(("gone.png", "Normal", "train", 99, 0))
    frame = pd.DataFrame(rows, columns=["file", "Befund", "split", "patient", "Klinik"])
    frame.to_csv(root / "table.csv", sep=";", index=False)
    options = [*QUICK, "--weights", "none", "--epochs", 1, "--valid", "0.25", "--exports", root, "--name", "model"]
    source = ["--data", root / "table.csv", "--images", images, "--column", "label=Befund", "--column", "group=Klinik"]
    result = run("fit", *source, *options)
    assert result.exit_code == 0, result.output
    return root / "model", root / "table.csv", images, result.stdout


def test_a_fit_records_what_repeats_it_and_no_file(trained):
    export, table, images, output = trained
    text = " ".join(output.split())
    assert "table: 1 row with a file that is not there (data check names them)" in text
    assert "1 row with a file that is not there: gone.png" in text and "by patient" in text
    model = settings_of(export)
    assert model["settings"]["images"] == str(images)
    assert model["settings"]["column"] == "label=Befund,group=Klinik"
    assert FitConfig(**model["settings"]).data == str(table)
    assert "gone.png" not in (export / "model.json").read_text() and model["classes"] == ["Normal", "Pneumonia"]
    _, data = read_collection(FitConfig(**model["settings"]))
    assert {use: len(rows) for use, rows in (("train", data.train), ("valid", data.valid))} == {
        use: sum(model["data"][use].values()) for use in ("train", "valid")
    }


def test_the_images_of_a_split_of_the_fits_table_or_of_another(trained):
    export, table, images, _ = trained
    model = settings_of(export)
    found = labelled_images(model, Request(None, "test"))
    assert (
        len(found.table) == 16 and found.table.patient.nunique() == 8 and set(found.table["group:group"]) <= set("012")
    )
    valid, train = (labelled_images(model, Request(None, split)).table for split in ("valid", "train"))
    assert (len(valid), len(train)) == tuple(sum(model["data"][use].values()) for use in ("valid", "train"))
    assert not set(valid.file) & set(train.file)
    frame = pd.read_csv(table, sep=";", dtype=str).rename(columns={"Befund": "label"})
    other = frame[frame.split == "test"].drop(columns="split")
    for data in (other, "other.csv"):
        other.to_csv("other.csv", index=False)
        for split in ("test", "valid", None):
            found = labelled_images(model, Request(data, split, images=images))
            assert (len(found.table), found.split) == (16, "test")
    again = labelled_images(model, Request(frame.drop(columns="split"), "valid", images=images))
    assert sorted(again.table.file) == sorted(valid.file) and again.split == "valid"
    upper = other.assign(label=other.label.str.upper())
    upper.iloc[0, upper.columns.get_loc("label")] = "COVID"
    found = labelled_images(model, Request(upper, "test", images=images))
    assert len(found.table) == 15 and "1 row with a label that the model does not know" in found.notes[-1]
    ones = other.assign(label=(other.label == "Pneumonia").astype(int))
    assert set(labelled_images(model, Request(ones, "test", images=images)).table.label) == {"Normal", "Pneumonia"}
    model["settings"] |= {"data": "elsewhere/table.csv"}
    with pytest.raises(UserError, match=r"elsewhere/table.csv: cannot be read"):
        labelled_images(model, Request(None, "test"))


@pytest.mark.slow
def test_every_command_reads_a_table(trained, run, tmp_path, monkeypatch):
    export, table, images, _ = trained
    monkeypatch.chdir(tmp_path)
    source = ["--data", table, "--images", images, "--column", "label=Befund"]
    for command in (
        ["evaluate", "--model", export],
        ["interpret", "--model", export, "--split", "test", "--top", "2"],
        ["compare", export, export],
        ["recalibrate", export, "--output", tmp_path / "new"],
    ):
        result = run(*command, *source)
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        counts = {
            "evaluate": "split test: 16 images, 8 patients",
            "compare": "16 images",
            "recalibrate": "of 32 patients",
        }
        assert counts.get(command[0], "table.csv") in text, text
    predictions = pd.read_csv(export / "evaluation-test" / "predictions.csv")
    assert len(predictions) == 16 and predictions.patient.nunique() == 8
    shutil.copy(table, "second.csv")
    result = run("evaluate", "--model", export, "--data", "second.csv", *source[2:])
    assert result.exit_code == 0 and (export / "evaluation-test-second").is_dir(), result.output


@pytest.mark.slow
def test_python_takes_a_data_frame(trained):
    _, table, images, _ = trained
    frame = pd.read_csv(table, sep=";")
    options = {"images": images, "column": {"label": "Befund"}}
    dls = dataloaders(frame, **options, size=32, batch_size=8, device="cpu", valid="0.25")
    assert len(dls.train.items) + len(dls.valid.items) == 48 and dls.vocab == ["Normal", "Pneumonia"]
    result = fit(
        frame, **options, arch=QUICK[1], size=32, batch_size=8, weights="none", epochs=1, device="cpu", workers=0,
        name="frame",
    )  # fmt: skip
    model = settings_of(result.path)
    assert model["settings"]["data"] == FRAME and model["settings"]["column"] == "label=Befund"
    with pytest.raises(UserError, match="the fit was to a data frame; give it by data="):
        labelled_images(model, Request(None, "valid"))
    assert len(labelled_images(model, Request(frame, "valid", **options)).table) == sum(model["data"]["valid"].values())


def test_data_check_names_what_is_wrong_with_a_table(trained, run):
    _, table, images, _ = trained
    result = run("data", "check", table, "--images", images, "--column", "label=Befund", "--json")
    findings = {finding["kind"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert [file["file"] for file in findings["no-file"]["files"]] == ["gone.png"]
    assert "patient-in-two-splits" not in findings and findings["columns"]["text"].startswith(
        "columns: path file, label Befund"
    )
    audit = check_data(pd.read_csv(table, sep=";"), images=images, column="label=Befund,patient=Klinik")
    assert {"patient-in-two-splits", "no-file"} <= {finding.kind for finding in audit.findings} and not audit.ok


def test_a_hundred_thousand_rows_take_seconds(monkeypatch):
    files = [f"p{i // 10}/study{i // 2}/{i}.png" for i in range(100_000)]
    monkeypatch.setattr("xray_fastai.data.table.find_images", lambda folder: files)
    frame = pd.DataFrame({"path": [f.rpartition("/")[2] for f in files], "label": ["A", "B"] * 50_000, "patient": "x"})
    started = time.process_time()
    assert len(read(frame, ".").table) == 100_000
    assert time.process_time() - started < 20
