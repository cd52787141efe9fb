"""The plots of an evaluation: each mark lies where its metrics say."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from xray_fastai.evaluation import plots
from xray_fastai.metrics.calibration import reliability_bins
from xray_fastai.metrics.intervals import measure
from xray_fastai.metrics.scored import Scored


@pytest.fixture(scope="module")
def drawn():
    """An evaluation of random images: `metrics.json` as far as the plots read it, the images and their metrics."""
    rng = np.random.default_rng(0)
    y_true = rng.integers(2, size=200)
    positive = np.clip(rng.normal(0.35 + 0.25 * y_true, 0.2), 0, 1)
    scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(200), positive=1)
    thresholds = {"0.5": 0.5, "chosen": 0.3}
    y_pred = {name: (positive >= threshold).astype(int) for name, threshold in thresholds.items()}
    measured = measure(scored, y_pred, resamples=50)
    points = {
        name: {
            "threshold": threshold,
            "metrics": {key: interval._asdict() for key, interval in measured.points[name].items()},
            "confusion": confusion_matrix(y_true, y_pred[name]).tolist(),
        }
        for name, threshold in thresholds.items()
    }
    summary = {
        "model": "$small", "split": "test", "images": 200, "patients": 200, "calibrated": True, "tta": False,
        "counts": {"NORMAL": 1, "PNEUMONIA": 1}, "positive": "PNEUMONIA", "operating_points": points,
    }  # fmt: skip
    return summary, scored, measured


def marks(axes):
    """The position of each threshold's mark, by its label."""
    return {line.get_label(): line.get_xydata()[0] for line in axes.lines if line.get_marker() in ("o", "s")}


def test_the_thresholds_lie_on_the_roc_curve(drawn):
    _, scored, _ = drawn
    figure = plots._roc(*drawn)
    positive = scored.y_prob[:, 1]
    for label, threshold in (("threshold 0.5", 0.5), ("threshold 0.3 (chosen)", 0.3)):
        predicted = positive >= threshold
        expected = predicted[scored.y_true == 0].mean(), predicted[scored.y_true == 1].mean()
        assert marks(figure.axes[0])[label] == pytest.approx(expected)


def test_the_thresholds_lie_on_the_precision_recall_curve(drawn):
    _, scored, _ = drawn
    figure = plots._precision_recall(*drawn)
    for label, threshold in (("threshold 0.5", 0.5), ("threshold 0.3 (chosen)", 0.3)):
        predicted = scored.y_prob[:, 1] >= threshold
        expected = predicted[scored.y_true == 1].mean(), scored.y_true[predicted].mean()
        assert marks(figure.axes[0])[label] == pytest.approx(expected)


def test_the_reliability_diagram_counts_all_images(drawn):
    _, scored, _ = drawn
    above, below = plots._reliability(*drawn).axes
    assert sum(bar.get_height() for bar in below.patches) == 200
    (line,) = (line for line in above.lines if line.get_marker() == "o")
    of_image = reliability_bins(scored).of_image
    assert len(line.get_xydata()) == of_image.max() + 1 > 2
    for i, point in enumerate(line.get_xydata()):
        inside = of_image == i
        assert point == pytest.approx((scored.y_prob[inside, 1].mean(), scored.y_true[inside].mean()))
    (intervals,) = above.collections
    for (_, y), ((_, low), (_, high)) in zip(line.get_xydata(), intervals.get_segments(), strict=True):
        assert low <= y <= high and high - low > 0.1


def test_the_decision_curve_is_the_net_benefit(drawn):
    """Written out at 0.3: true positives less false ones at 0.3 / 0.7, an image."""
    _, scored, _ = drawn
    (axes,) = plots._decision_curve(*drawn).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    predicted, true = scored.y_prob[:, 1] >= 0.3, scored.y_true == 1
    expected = (predicted & true).mean() - (predicted & ~true).mean() * 0.3 / 0.7
    assert lines["the model"][29] == pytest.approx((0.3, expected))
    assert lines["act on all"][29, 1] == pytest.approx(true.mean() - (~true).mean() * 0.3 / 0.7)
    assert lines["threshold 0.3"][0, 0] == 0.3


def test_the_scores_are_shares_of_each_outcome(drawn):
    summary, scored, _ = drawn
    (axes,) = plots._scores(summary, scored).axes
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == [
        f"NORMAL: {(scored.y_true == 0).sum()}", f"PNEUMONIA: {(scored.y_true == 1).sum()}", "threshold 0.3",
    ]  # fmt: skip
    heights = [patch.get_height() for patch in axes.patches if hasattr(patch, "get_height")]
    assert sum(heights) == pytest.approx(2)


def test_the_confusion_matrix_is_that_of_the_chosen_threshold(drawn):
    summary, _, _ = drawn
    axes = plots._confusion(summary).axes[0]
    counts = [text.get_text() for text in axes.texts if "%" not in text.get_text()][:4]
    assert counts == [str(count) for row in summary["operating_points"]["chosen"]["confusion"] for count in row]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_a_name_is_no_formula(drawn):
    assert plots.short("$x_1$") == r"\$x_1\$"
    assert len(plots.short("long" * 20)) == 30
