"""Metrics by group reach `metrics.json`, the terminal and the report; every column `group:NAME` makes a table."""

import json

import numpy as np
import pandas as pd

from xray_fastai.evaluation.groups import groups_of, lines_of, remarks_on
from xray_fastai.metrics.comparison import Called
from xray_fastai.metrics.scored import Scored

CLASSES = ["NORMAL", "PNEUMONIA"]


def columns(n=400):
    """Images of two sexes, of which the second is told worse, of all ages, and of one machine with few images."""
    rng = np.random.default_rng(0)
    y_true, female = np.arange(n) % 2, np.arange(n) // 2 % 2
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + (y_true - 0.5) * (1 + 3 * female))))
    called = Called(Scored(y_true, np.stack([1 - score, score], 1), np.arange(n), 1), (score >= 0.5).astype(int))
    images = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "group:sex": np.where(female, "F", "M")})
    images["group:age"] = np.where(np.arange(n) < 20, np.nan, np.arange(n) % 100)
    images["group:machine"] = np.where(np.arange(n) < 12, "old", "a machine of a long name")
    return groups_of(images, called, CLASSES)


def test_each_column_has_its_groups_and_gaps_in_json():
    sex, age, machine = json.loads(json.dumps(columns(), allow_nan=False))
    assert [column["column"] for column in (sex, age, machine)] == ["sex", "age", "machine"]
    assert [(g["name"], g["images"], g["counts"]) for g in sex["groups"]] == [
        ("F", 200, {"NORMAL": 100, "PNEUMONIA": 100}), ("M", 200, {"NORMAL": 100, "PNEUMONIA": 100})
    ]  # fmt: skip
    auc = sex["gaps"][0]
    assert (auc["metric"], auc["best"], auc["worst"], auc["groups"]) == ("roc_auc", "F", "M", 2) and auc["low"] > 0
    assert [g["name"] for g in age["groups"]] == ["0-17", "18-39", "40-59", "60-79", "80+", "unknown"]
    assert "years" in age["bands"] and sex["bands"] is None
    old = machine["groups"][1]
    assert old["metrics"]["roc_auc"] == {"value": None, "low": None, "high": None} and not machine["gaps"]
    assert old["too_few"] == "6 patients with NORMAL and 6 patients with PNEUMONIA; 10 are needed"


def test_a_table_without_further_columns_has_no_groups():
    called = Called(Scored(np.arange(4) % 2, np.full((4, 2), 0.5), np.arange(4), 1), np.zeros(4, int))
    assert groups_of(pd.DataFrame({"path": list("abcd")}), called, CLASSES) == []
    assert lines_of([]) == []


def test_the_terminals_table_fits_and_says_what_it_leaves_out():
    found = columns()
    lines = lines_of(found)
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert lines[0].split() == ["by", "sex", "images", "ROC", "AUC", "sensitivity", "specificity"]
    f, m = (next(line for line in lines if line.startswith(name)) for name in ("F ", "M "))
    assert f.split()[1] == m.split()[1] == "200" and len(f.split()) == 2 + 3 * 4
    assert any(line.split() == ["old", "12", "-", "-", "-"] for line in lines)
    assert "old: 6 patients with NORMAL and 6 patients with PNEUMONIA; 10 are needed." in " ".join(text.split())
    assert "ROC AUC, F less M: " in text and "allowing for the choice" not in " ".join(remarks_on(found[0]))
    assert "allowing for the choice among 5 groups." in " ".join(remarks_on(found[1]))
    assert "Groups by age: years, in the bands 0-17, 18-39, 40-59, 60-79, 80+." in remarks_on(found[1])
