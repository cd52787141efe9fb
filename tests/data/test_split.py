"""`data split`: no patient is in both parts, classes are stratified, and `fit` and `evaluate` take the result."""

import json
import os
import shlex
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import QUICK, draw_collection
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.folders import read_split
from xray_fastai.data.patients import patient_rule

FIT = [*QUICK, "--weights", "none", "--epochs", "1", "--valid", "0.25", "--name", "model"]


@pytest.fixture
def drawn(tmp_path):
    """A folder of classes: 60 images of 30 patients, who have two each, and a copy of an image of another patient."""
    root = draw_collection(tmp_path / "month", {"NORMAL": 30, "PNEUMONIA": 30})
    for label in ("NORMAL", "PNEUMONIA"):
        for i, path in enumerate(sorted((root / label).iterdir())):
            path.rename(path.with_name(f"person{i // 2}{len(label)}_virus_{i}.jpeg"))
    paths = sorted((root / "NORMAL").iterdir())
    paths[10].write_bytes(paths[0].read_bytes())
    return root


def split(run, *args):
    result = run("data", "split", *args)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_table_by_patient_with_its_seed(drawn, run, refused):
    output = split(run, drawn, "t.csv", "--test", "0.3", "--seed", "7")
    table, record = pd.read_csv("t.csv"), json.loads(Path("t.json").read_text())
    assert list(table) == ["path", "label", "split", "patient"] and len(table) == 60
    assert table.split.eq("test").groupby(table.label).mean().between(0.2, 0.4).all()
    assert (table.groupby("patient").split.nunique() == 1).all() and table.patient.nunique() == 30
    contents = table.path.map(lambda path: (drawn.parent / path).read_bytes())
    assert (table.groupby(contents).split.nunique() == 1).all() and contents.nunique() == 59
    assert (record["seed"], record["test"], record["by"]) == (7, 0.3, "patient")
    assert sum(record["images"]["test"].values()) == (table.split == "test").sum()
    assert f"next      xray-fastai fit --data t.csv --images {drawn.parent}" in output
    refused(run("data", "split", drawn, "t.csv"), "t.csv: already exists")
    split(run, drawn, "again.csv", "--test", "0.3", "--seed", "7")
    assert Path("again.csv").read_bytes() == Path("t.csv").read_bytes()
    split(run, drawn, "other.csv", "--test", "0.3", "--seed", "8")
    assert Path("other.csv").read_bytes() != Path("t.csv").read_bytes()


@pytest.mark.parametrize("form", ["--links", "--copy"])
def test_folders_keep_the_patients(form, drawn, run):
    names = [path.name for path in sorted((drawn / "NORMAL").iterdir())]
    listed = [(f"month/NORMAL/{name}", f"Meier {i // 3}") for i, name in enumerate(names)]
    pd.DataFrame(listed, columns=["file", "patient"]).to_csv("p.csv", index=False)
    output = split(run, drawn, "out", form, "--patients", "p.csv")
    files = list(Path("out").rglob("*.jpeg"))
    assert len(files) == 60 and {path.is_symlink() for path in files} == {form == "--links"}
    assert all(os.path.isfile(path) for path in files) and json.loads(Path("out/split.json").read_text())["seed"] == 42
    assert "--data out --patients out/patients.csv" in output and "Meier" not in Path("out/patients.csv").read_text()
    rule = patient_rule(None, "out/patients.csv")
    train, test = (read_split(Path("out"), part, rule=rule) for part in ("train", "test"))
    assert not set(train.patient) & set(test.patient) and 6 <= len(test) <= 18
    assert sorted(Path("out").parent.glob(".out*")) == []


@pytest.mark.parametrize("name", ["group", "hospital"])
def test_a_table_by_another_column(name, drawn, run, refused):
    files = sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.jpeg"))
    frame = pd.DataFrame({"file": files, "Finding": [int("PNEU" in file) for file in files]})
    frame["Hospital"] = [f"H{i % 6}" for i in range(60)]
    frame["sex"] = "F"
    frame["subject"] = range(60)
    frame.to_csv("in.csv", index=False, sep=";")
    source = ["in.csv", "out.csv", "--images", drawn, "--positive", "P", "--column", f"{name}=Hospital"]
    output = split(run, *source, "--column", "sex=sex", "--by", name, "--test", "0.34")
    table = pd.read_csv("out.csv")
    assert (table.groupby(name).split.nunique() == 1).all() and set(table.split) == {"train", "test"}
    assert set(table.label) == {"P", "no P"} and set(table.sex) == {"F"}
    assert f"--column {name}={name} --column sex=sex" in output
    words = (
        f"--by site: no such column is kept; give patient or {name}, or keep this column of a table by --column site="
    )
    refused(run("data", "split", *source[:1], "x.csv", *source[2:], "--by", "site"), words)
    refused(run("data", "split", "out.csv", "x.csv", "--images", drawn), "has rows of split test already")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["DATA", "x"], ["x: give a new .csv file, or --links for a folder"]),
        (["DATA", "x.csv", "--links"], ["x.csv: give a folder's name"]),
        (["DATA", "x.csv", "--test", "0.9"], ["--test 0.9: give a fraction from 0.02 to 0.5"]),
        (["DATA", "x.csv", "--by", "site"], ["--by site: no such column is kept; give patient, or keep this"]),
        (["DATA", "x", "--links", "--copy"], ["--copy: give one of --links and --copy"]),
        (["DATA/NORMAL", "x.csv"], ["no class folders"]),
        (["nowhere", "x.csv"], ["no such folder"]),
        (["DATA", "no/x.csv"], ["there is no folder no"]),
        (["DATA", "x.csv", "--patient-pattern", "."], ["none can be held out for test; add patients"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(args, words, drawn, run, refused):
    refused(run("data", "split", *(arg.replace("DATA", str(drawn)) for arg in args)), *words)
    assert list(Path().iterdir()) == []


def test_train_and_val_are_divided_together_and_a_test_split_stays(tmp_path, run, refused):
    root = draw_collection(tmp_path / "data", {f"{s}/{c}": 10 for s in ("train", "Valid") for c in ("A", "B")})
    assert "train/ and val/ are divided anew together" in split(run, root, "t.csv")
    assert len(pd.read_csv("t.csv")) == 40
    draw_collection(root, {"testing/A": 2, "testing/B": 2})
    refused(run("data", "split", root, "x.csv"), "has a test split already", root)


@pytest.mark.slow
def test_what_comes_out_is_fitted_and_evaluated(drawn, run):
    for args in (["t.csv"], ["out", "--links"]):
        line = split(run, drawn, *args).splitlines()[-1]
        command = shlex.split(line)[2:]
        result = run(*command, *FIT, "--exports", f"exports-{args[0]}")
        assert result.exit_code == 0, result.output
        result = run("evaluate", "--model", f"exports-{args[0]}/model", "--json")
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        assert summary["seen_in_fit"] == {"train": 0, "valid": 0} and summary["images_without_patient"] == 0


def test_a_fit_to_the_table_never_reads_its_test_rows(drawn, run):
    split(run, drawn, "t.csv")
    _, data = read_collection(FitConfig(data="t.csv", images=str(drawn.parent), valid="0.25").with_recipe())
    table = pd.read_csv("t.csv")
    assert set(data.table.file) == set(table.path[table.split == "train"])
