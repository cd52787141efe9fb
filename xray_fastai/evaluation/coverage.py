"""Measures which images a model calls, their share of all (coverage), and how good the model is on these.

`predict` withholds images that are unlike the training images, and those near the threshold (`rows.DecisionRule`).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from xray_fastai.inference.rows import DecisionRule, Withheld
from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import Interval, Measured, measure, share_interval
from xray_fastai.metrics.scored import Scored
from xray_fastai.system.text import count_of, format_interval


class Called(NamedTuple):
    """What is called of the images that were evaluated."""

    rule: DecisionRule
    withheld: list[Withheld | None]  # of each image, why it is not called
    coverage: Interval  # the share that is called
    measured: Measured | None = None  # on what is called, at the point `chosen`; None if nothing is
    confusion: list[list[int]] | None = None  # the same

    def to_json(self, plain: Callable[[dict[str, Interval]], dict]) -> dict[str, Any]:
        """Return `called` of `metrics.json`; `plain` turns intervals by name into what JSON holds."""
        reasons = Counter(self.withheld)
        return {
            "text": str(self),
            "images": reasons[None],
            "coverage": plain({"": self.coverage})[""],
            "withheld": {reason.name.lower(): reasons[reason] for reason in Withheld},
            "limit": self.rule.limit,
            "abstain": self.rule.abstain,
            "metrics": None if self.measured is None else plain(self.measured.points["chosen"] | self.measured.free),
            "confusion": self.confusion,
        }

    def __str__(self) -> str:
        reasons = Counter(self.withheld)
        text = f"{reasons[None]:,} of {count_of(len(self.withheld), 'image')}, {format_interval(*self.coverage)}"
        others = ", ".join(f"{reasons[r]:,} {self.rule.why(r)}" for r in Withheld if reasons[r])
        return f"{text}; uncertain: {others}" if others else text


def called_of(rule: DecisionRule, scored: Scored, y_pred: np.ndarray, unlike: np.ndarray | None) -> Called | None:
    """Find what a rule calls, and measure the model on it; None where the rule calls all images.

    Args:
        rule: of the export and the options.
        scored: N images.
        y_pred: (N,), their predicted classes by the rule.
        unlike: (N,), see `Gate.unlike`; None without a gate.
    """
    if rule.limit is None and not rule.abstain:
        return None
    probabilities = [None] * len(y_pred) if scored.positive is None else scored.y_prob[:, scored.positive].tolist()
    distances = [None] * len(y_pred) if unlike is None else unlike.tolist()
    withheld = [rule.withheld(*pair) for pair in zip(distances, probabilities, strict=True)]
    kept = np.array([reason is None for reason in withheld])
    shares = Shares(kept[:, None].astype(float), np.ones((len(kept), 1)))
    coverage = Interval(float(kept.mean()), *share_interval(shares, scored.patients))
    part = Scored(scored.y_true[kept], scored.y_prob[kept], pd.factorize(scored.patients[kept])[0], scored.positive)
    if not kept.any():
        return Called(rule, withheld, coverage)
    measured = measure(part, {"chosen": y_pred[kept]})
    table = confusion_matrix(part.y_true, y_pred[kept], labels=range(scored.classes))
    return Called(rule, withheld, coverage, measured, table.tolist())
