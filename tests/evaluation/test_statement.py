"""The statement says what the export and the evaluation hold, and no more; every checklist item is answered or open."""

import json
import re

import pytest

from tests.conftest import draw_collection, settings_of
from tests.evaluation.test_report import evaluation
from xray_fastai.evaluation.checklists import CLAIM, TRIPOD
from xray_fastai.evaluation.statement import _partitions, _variation, statement


@pytest.fixture
def stated(export):
    def stated(model=None, **changes):
        summary = evaluation(seen_in_fit={"train": 0, "valid": 0}, images_without_patient=3, **changes)
        return statement(settings_of(export) | (model or {}), summary)

    return stated


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_facts_come_from_the_export_and_the_evaluation(stated, export):
    model, text = settings_of(export), stated()
    methods, results = section(text, "Methods"), section(text, "Results")
    for fact in (
        f"{sum(model['data']['train'].values())} images",
        f"{model['preprocessing']['size']} x {model['preprocessing']['size']} pixels",
        f"{model['training']['parameters']['total']:,} parameters",
        f"the seed {model['settings']['seed']}",
        f"torch {model['versions']['torch']}",
        model["calibration"],
    ):
        assert fact in methods, fact
    assert "624 images (300 NORMAL, 301 PNEUMONIA) of 310 patients" in results
    assert "ROC AUC 0.955 (0.905 to 0.975)" in results and "sensitivity (recall) 0.890 (0.840 to 0.910)" in results
    assert "1 of 1 NORMAL called PNEUMONIA, 10 of 21 PNEUMONIA called NORMAL" in results
    assert "None of the images was used in the fit" in results and "average precision" not in results


def test_every_item_is_answered_or_open(stated):
    text = stated()
    for title, items in (("CLAIM 2024", CLAIM), ("TRIPOD+AI", TRIPOD)):
        lines = section(text, title).splitlines()
        answered = [line for line in lines if line.startswith("- [x] ")]
        left = [line for line in lines if line.startswith("- [ ] ")]
        assert len(answered) + len(left) == len(items)
        assert f"{len(answered)} of {len(items)} topics" in section(text, title)
        assert all(any(topic in line for line in lines) for topic, _ in items)
        assert all(re.fullmatch(r"- \[x\] \*\*.+?\.\*\* .+\.", line) for line in answered)
    assert [int(topic.split()[0]) for topic, _ in TRIPOD] == list(range(1, 28))
    assert "- [ ] 14 Fairness" in text and "- [ ] 17 Ethical approval" in text


def test_what_was_not_recorded_stays_open(stated, export):
    gap = {"metric": "roc_auc", "best": "F", "worst": "M", "difference": 0.1, "low": 0.01, "high": 0.2, "groups": 2}
    text = stated(groups=[{"column": "sex", "gaps": [gap]}])
    said = "By sex, the ROC AUC of F exceeds that of M by 0.100 (0.010 to 0.200), the largest difference"
    assert f"- [x] **14 Fairness.** {said}" in text and said in section(text, "Results")
    assert "- [ ] 24 Model updating" in text
    updated = {"recalibrated": {"created": "2026-11-20T00:00:00", "images": 80}}
    assert "fitted to another place on 2026-11-20, with 80 images" in stated(updated)
    adapted = {"recalibrated": {"created": "2026-11-20T00:00:00", "images": 0, "unlabelled": 30}}
    assert "The model was adapted to another place on 2026-11-20, with 30 images without labels." in stated(adapted)
    settings = settings_of(export)["settings"]
    assert f"with batches of {settings['batch_size']}, a peak learning rate of {settings['lr']:g}, the schedule" in text
    training = settings_of(export)["training"]
    phases = [phase | {"lr": 0.0021} for phase in training["phases"]]
    searched = stated({"settings": settings | {"lr": "find"}, "training": training | {"phases": phases}})
    assert "a peak learning rate of 0.0021 (unfrozen), by a learning rate range test, the schedule" in searched
    by_hand = stated({"settings": settings | {"lr": None, "batch_size": None}, "best": None})
    assert "with the schedule" in by_hand and "- [ ] Methods, training: choice of the final model" in by_hand
    plain = stated({"class_weights": None})
    assert "- [ ] 13 Class imbalance" in plain and "weighted by class" not in plain


def test_which_images_of_a_stopped_ensemble_chose_the_threshold():
    data = {"train": {"A": 60}, "valid": {}, "name": "d", "patients": {"train": 40, "valid": 0, "images_without": 0}}
    ensemble = {"outputs": "out of fold", "planned": 3, "images": 40}
    said = "chose the calibration and the threshold"
    parts = {"training": "60 images", "validation": "none"}
    stopped = _partitions({"data": data, "members": 2, "ensemble": ensemble}, parts)
    assert "The outputs of the 40 images that the 2 networks left out, each by the network that was not" in stopped
    whole = _partitions({"data": data, "members": 3, "ensemble": ensemble | {"images": 60}}, parts)
    assert "The outputs of all images, each by" in whole and said in whole and said in stopped


def test_what_varied_the_images_of_the_frozen_phase(export):
    model = settings_of(export)
    settings = model["settings"] | {"frozen_views": 1}
    not_varied = ", but not in the frozen phase."
    for name, by_hand, expected in (
        ("frozen", False, True),
        ("frozen, member 1", False, True),
        ("frozen", True, False),  # fastai's `fine_tune` varies them
        ("unfrozen, member 1", False, False),
    ):
        phases = {"training": {"phases": [{"name": name}]}, "settings": settings, "by_hand": by_hand}
        assert _variation(model | phases).endswith(not_varied) == expected, (name, by_hand)


def test_a_path_of_the_machine_is_left_out(stated, export):
    name = "/home/someone/chest_xray/"
    text = stated({"data": settings_of(export)["data"] | {"name": name}}, data=name)
    assert "images are those of chest_xray (" in text and "of chest_xray, the data of the fit" in text
    assert "someone" not in text


def test_images_of_the_fit_are_not_called_new(export):
    summary = evaluation(seen_in_fit={"train": 7, "valid": 2})
    assert "9 of the images were used in the fit" in statement(settings_of(export), summary)
    earlier = statement(settings_of(export), evaluation())  # a metrics.json that does not know it
    assert "used in the fit" not in earlier


@pytest.mark.slow
def test_evaluate_writes_it_on_request(run, export, tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 4, "test/PNEUMONIA": 4})
    for options in ([], ["--statement"]):
        result = run("evaluate", "--model", export, "--data", data, "--output", tmp_path, *options)
        assert result.exit_code == 0, result.output
        file = tmp_path / "evaluation-test" / "statement.md"
        assert file.exists() == bool(options)
    summary = json.loads(file.with_name("metrics.json").read_text())
    assert file.read_text() == statement(settings_of(export), summary)
