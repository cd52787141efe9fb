"""The patient of an image: by a list, a regular expression, or the names of public collections; or none, and said."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import check_data
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.patients import PatientRule, note_on, numbered, patients_in, patients_of, published_patient
from xray_fastai.system.errors import UserError


@pytest.mark.parametrize(
    ("file", "patient"),
    [
        ("train/PNEUMONIA/person1000_bacteria_2931.jpeg", "person1000"),
        ("person1000_virus_1.jpeg", "person1000"),
        ("Person1000_virus_1.jpeg", "person1000"),
        ("copy_person1000_virus_1.jpeg", "person1000"),
        ("Copy (2) of person1000_virus_1 - Copy (1).jpeg", "person1000"),
        ("flipped-person1000_virus_1.jpeg", "person1000"),
        ("train/NORMAL/IM-0115-0001.jpeg", "IM-0115"),
        ("copy_im-0115-0001 (1).jpeg", "IM-0115"),
        ("NORMAL2-IM-0345-0001-0002.jpeg", "NORMAL2-IM-0345"),
        ("train/PNEUMONIA/BACTERIA-1008087-0001.jpeg", "1008087"),
        ("train/PNEUMONIA/VIRUS-1008087-0002.jpeg", "1008087"),
        ("train/NORMAL/NORMAL-28501-0001.jpeg", "28501"),
        ("copy_normal-28501-0002.JPEG", "28501"),
        ("00000001_000.png", "00000001"),
        ("copy of 00030805_012 (1).png", "00030805"),
        ("train/A/patient00001/study1/view1_frontal.jpg", "patient00001"),
        ("patient00001_study2_view1_frontal.jpg", "patient00001"),
        ("train/A/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg", "p10000032"),
        ("p10000032_s50414267_02aa804e.jpg", "p10000032"),
        ("scan.jpeg", None),
        ("person.jpeg", None),
        ("superperson1_bacteria_1.jpeg", None),
        ("train/NORMAL/0001.jpeg", None),
        ("20200101_001.png", None),
        ("2020_00000001_001.png", None),
        ("00000001_0000.png", None),
        ("train/A/patient00001/view1.jpg", None),
        ("0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm", None),  # RSNA
        ("50a418190bc3fb1ef1633bf9678929b3.dicom", None),  # VinDr
    ],
)
def test_names_of_public_collections_hold_the_patient(file, patient):
    assert published_patient(file) == patient


def test_a_pattern_finds_what_it_found_before():
    names = ["p1-a.png", "p22-b.png", "x.png", "p3-\udcff.png"]
    assert patients_of(names, r"^(?:p(\d+)|q)-") == ["1", "22", None, "3"]
    assert patients_of(names, r"^p\d+") == ["p1", "p22", None, "p3"]


def table_of(*files):
    parts = pd.Series(files).str.split("/", expand=True)
    return pd.DataFrame({"path": files, "file": files, "split": parts[0], "label": parts[1]})


def test_a_pattern_finds_folders_below_the_class_and_never_the_class():
    table = table_of("train/A/p7/1.png", "train/A/p7/2.png", "train/B/p8_1.png", "train/B/1.png")
    assert patients_in(table, PatientRule(r"(p\d+)"))[:3] == ["p7", "p7", "p8"]
    assert patients_in(table, PatientRule(r"^([^/]+)/"))[:2] == ["p7", "p7"]
    assert patients_in(table, PatientRule("train|A|B"))[3] == "train/B/1.png"


def test_a_list_wins_over_all_and_shows_no_patient():
    table = table_of("train/A/person1_virus_1.png", "train/A/person2_virus_2.png", "train/B/person3_virus_3.png")
    rule = PatientRule("person3", {"train/A/person1_virus_1.png": "Meier", "train/B/person3_virus_3.png": "Meier"})
    found = numbered(table.assign(patient=patients_in(table, rule))).patient.tolist()
    assert found == ["listed #1", "train/A/person2_virus_2.png", "listed #1"]


@pytest.fixture
def nameless(tmp_path):
    """Forty images to train on and ten to test on, whose names hold no patient."""
    return draw_collection(tmp_path / "data", {"train/A": 20, "train/B": 20, "test/A": 5, "test/B": 5})


def files_in(root, split):
    return [path.relative_to(root).as_posix() for path in sorted((root / split).rglob("*.jpeg"))]


def write_patients(root, images=2):
    """List as many images a patient, in train/ and test/."""
    rows = [
        (file, f"{split} {i // images}") for split in ("train", "test") for i, file in enumerate(files_in(root, split))
    ]
    pd.DataFrame(rows, columns=["file", "patient"]).to_csv("patients.csv", index=False)


def test_a_fit_says_that_no_patient_is_known(nameless):
    _, data = read_collection(FitConfig(data=str(nameless), valid="0.25").with_recipe())
    assert data.notes[0].endswith(" images held out of train/, by image")
    assert data.notes[1] == (
        "no patient is known: each image counts as a patient of its own (give --patient-pattern or --patients)"
    )
    (nameless / "train/A/IM-train0.jpeg").rename(nameless / "train/A/IM-0001-0001.jpeg")
    _, data = read_collection(FitConfig(data=str(nameless), valid="0.25").with_recipe())
    assert data.notes[0].endswith(" by patient")
    assert data.notes[1] == "no patient is known of 39 of 40 images: each counts as a patient of its own"
    assert note_on(data.table[data.table.patient == "IM-0001"]) is None


def test_a_fit_holds_out_the_patients_of_a_list(nameless):
    write_patients(nameless)
    config = FitConfig(data=str(nameless), valid="0.25", patients="patients.csv").with_recipe()
    table = read_collection(config)[1].table
    assert table.patient.nunique() == 20 and set(table.patient) == {f"listed #{n}" for n in range(1, 21)}
    assert (table.groupby("patient").is_valid.nunique() == 1).all()


def test_first_publication_copies_and_capitals_stay_on_one_side(tmp_path):
    """Each patient has an image of the usual name, one of a copy, and one in capitals."""
    root = draw_collection(tmp_path / "data", {"train/NORMAL": 60, "train/PNEUMONIA": 60})
    names = {"NORMAL": ["NORMAL-{}-0001", "copy_NORMAL-{}-0002", "normal-{}-0003"]}
    names["PNEUMONIA"] = ["person{}_virus_1", "copy_person{}_virus_2", "Person{}_bacteria_3"]
    for label, forms in names.items():
        for i, path in enumerate(sorted((root / "train" / label).iterdir())):
            path.rename(path.with_name(forms[i % 3].format(100 + i // 3) + ".jpeg"))
    _, data = read_collection(FitConfig(data=str(root), valid="0.2").with_recipe())
    assert data.table.patient.nunique() == 40
    assert not set(data.train.patient) & set(data.valid.patient)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b"file,person\nx,y\n", "does not name the columns file and patient"),
        (b'file,patient\n"x\n', "not a .csv file after line"),
        (b"file,patient\nA/1.jpeg,7\n", "names none of the images; name them as in train/A/IM-train0.jpeg"),
    ],
)
def test_a_list_that_is_none_is_refused(content, words, nameless, run, refused):
    if content is not None:
        Path("list.csv").write_bytes(content)
    for command in (["fit", "--data", nameless, *QUICK], ["data", "check", nameless]):
        refused(run(*command, "--patients", "list.csv"), "--patients list.csv: ", words)


def test_data_check_reads_a_list(nameless):
    write_patients(nameless)
    pd.concat([pd.read_csv("patients.csv"), pd.DataFrame({"file": ["val/x"], "patient": [""]})]).to_csv("patients.csv")
    kinds = [finding.kind for finding in check_data(nameless, patients="patients.csv").findings]
    assert "no-patient" not in kinds and "patient-in-two-splits" not in kinds
    table = pd.read_csv("patients.csv").assign(patient="one")
    table.to_csv("patients.csv")
    (finding,) = [f for f in check_data(nameless, patients="patients.csv").findings if f.kind == "one-patient"]
    assert "by --patients" in finding.text


def test_evaluate_takes_the_list_of_the_fit_or_another(export, nameless):
    write_patients(nameless)
    settings = settings_of(export)["settings"] | {"data": str(nameless), "patients": "patients.csv"}
    model = settings_of(export) | {"classes": ["A", "B"], "settings": settings}
    assert labelled_images(model, Request(None, "test")).table.patient.nunique() == 5
    assert labelled_images(model, Request(nameless, "test")).table.patient.nunique() == 10
    assert labelled_images(model, Request(nameless, "test", patients="patients.csv")).table.patient.nunique() == 5
    table = pd.read_csv("patients.csv")
    table[table.file.str.startswith("train")].to_csv("patients.csv", index=False)
    assert labelled_images(model, Request(None, "test")).table.patient.nunique() == 10
    with pytest.raises(UserError, match="names none of the images"):
        labelled_images(model, Request(nameless, "test", patients="patients.csv"))


@pytest.mark.slow
def test_what_evaluate_and_interpret_say_of_patients(export, run, tmp_path):
    root = draw_collection(tmp_path / "data", {"test/NORMAL": 6, "test/PNEUMONIA": 6}, seed=5)
    options = ["--model", export, "--data", root, "--output", tmp_path]
    result = run("evaluate", *options)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "evaluation-test" / "metrics.json").read_text())
    text = " ".join(result.stdout.split())
    own = "each image counts as a patient of its own"
    assert own in text and "split test: 12 images " in text and "12 images, each as a patient of its own" in text
    assert summary["images_without_patient"] == 12 and any(own in note for note in summary["notes"])
    assert own in (tmp_path / "report.html").read_text()
    files = files_in(root, "test")
    pd.DataFrame({"file": files, "patient": [i // 3 for i in range(12)]}).to_csv("list.csv")
    for command in ("evaluate", "interpret"):
        result = run(
            command, *options, "--patients", "list.csv", *(["--split", "test"] if command == "interpret" else [])
        )
        assert result.exit_code == 0 and own not in " ".join(result.stdout.split()), result.output
    summary = json.loads((tmp_path / "evaluation-test" / "metrics.json").read_text())
    assert (summary["patients"], summary["images_without_patient"], summary["notes"]) == (4, 0, [])
    assert set(pd.read_csv(tmp_path / "interpretation-test" / "top_losses.csv").patient) == {
        f"listed #{n}" for n in range(1, 5)
    }
