"""The net benefit is that of the package dcurves."""

import doctest

import numpy as np
import pytest

from tests.metrics.drawn import draw
from xray_fastai.metrics import decision
from xray_fastai.metrics.decision import THRESHOLDS, decision_curve
from xray_fastai.metrics.scored import Scored


def test_the_examples():
    failed, tried = doctest.testmod(decision, extraglobs={"np": np})
    assert tried and not failed


def test_the_net_benefit_is_that_of_dcurves():
    """`dcurves.dca` 1.1.7 gave these of the same images, at five thresholds."""
    curve = decision_curve(draw(2), 1)
    at = np.searchsorted(THRESHOLDS, (0.1, 0.25, 0.5, 0.7, 0.85))
    model = [0.531481, 0.483333, 0.300000, 0.272222, 0.166667]
    assert [curve.model[i].value for i in at] == pytest.approx(model, abs=1e-6)
    assert curve.all[at] == pytest.approx([0.518519, 0.422222, 0.133333, -0.444444, -1.888889], abs=1e-6)


def test_the_interval_goes_by_patient():
    """Copies of an image narrow nothing; where the model acts on all or on none, all patients may agree."""
    one = draw(2, images=100)
    once = Scored(one.y_true, one.y_prob, np.arange(100), 1)
    twice = Scored(*(np.repeat(x, 2, axis=0) for x in (once.y_true, once.y_prob, once.patients)), 1)
    for a, b in zip(decision_curve(once, 1).model, decision_curve(twice, 1).model, strict=True):
        assert a == pytest.approx(b, nan_ok=True) and (np.isnan(a.low) or a.low < a.value < a.high)
    assert not np.isnan(decision_curve(once, 1).model[49].low)
