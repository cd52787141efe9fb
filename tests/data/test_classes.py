"""The class to detect is the disease, whatever the alphabet says; the choice is printed."""

import pytest

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai.data.classes import is_negative, only_class, positive_class, positive_note
from xray_fastai.system.errors import UserError


def test_positive_class():
    assert positive_class(["NORMAL", "PNEUMONIA"]) == "PNEUMONIA"
    assert positive_class(["covid", "normal"]) == "covid"
    assert positive_class(["A", "B"]) == "B"
    assert positive_class(["A", "B", "C"]) is None
    assert positive_class(["NORMAL", "PNEUMONIA"], "NORMAL") == "NORMAL"
    with pytest.raises(UserError, match="positive FLU: no such class"):
        positive_class(["NORMAL", "PNEUMONIA"], "FLU")


NEGATIVES = """NORMAL, Normal, normals, No Finding, no_findings, NoFinding, nofinding, Healthy, no_disease,
normal chest, chest-normal, negative, NEG, control, Controls, non-COVID, not_pneumonia,
without pneumonia, covid_negative, Negative for Pneumonia, clear, No, None, unremarkable,
No Lung Opacity - Not Normal"""
DISEASES = """ABNORMAL, abnormal chest, not_normal, Non-healthy, PNEUMONIA, positive, Nodule, Nocardiosis, finding,
clear cell, disease, Lung Opacity, COVID, 1, ..."""


@pytest.mark.parametrize("name", NEGATIVES.replace("\n", " ").split(", "))
def test_usual_negatives_are_not_the_class_to_detect(name):
    assert is_negative(name)
    for disease in ("COVID", "zoster"):  # before and after it, by alphabet
        assert positive_class(sorted([name, disease])) == disease


@pytest.mark.parametrize("name", DISEASES.replace("\n", " ").split(", "))
def test_diseases_are_no_negatives(name):
    assert not is_negative(name)


def test_what_is_said():
    assert positive_note(["NORMAL", "PNEUMONIA"]) == ("to detect: PNEUMONIA; for the other, give --positive NORMAL")
    assert positive_note(["COVID", "No Finding"]) == "to detect: COVID; for the other, give --positive 'No Finding'"
    guessed = "to detect: B, the last by name, as neither is a usual negative such as NORMAL; for the other, "
    assert positive_note(["A", "B"]) == guessed + "give --positive A"
    assert "both names are usual negatives" in positive_note(["healthy", "normal"])
    assert positive_note(["A", "B"], "A") == "to detect: A"
    assert positive_note(["A", "B", "PNEUMONIA"]) == "to detect: PNEUMONIA"
    assert positive_note(["A", "B", "C"]) is None


def test_only_class():
    assert only_class({"A": 3, "B": 0}) == "A" and only_class({"A": 3, "B": 1}) is only_class({}) is None


@pytest.mark.slow
def test_plain_weighs_the_negative_class(run, tmp_path):
    root = draw_collection(tmp_path / "data", {"train/ABNORMAL": 8, "train/No Finding": 8})
    options = ["--weights", "none", "--epochs", 1, "--recipe", "plain", "--exports", tmp_path, "--name", "plain"]
    result = run("fit", "--data", root, *QUICK, *options)
    assert result.exit_code == 0, result.output
    assert "to detect: ABNORMAL; for the other, give --positive 'No Finding'" in result.stdout
    assert "loss weights  ABNORMAL 1, No Finding 3" in result.stdout
    model = settings_of(tmp_path / "plain")
    assert (model["positive"], model["class_weights"], model["settings"]["class_weights"]) == (
        "ABNORMAL",
        [1, 3],
        "1,3",
    )
