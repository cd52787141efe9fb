"""The checks of speed: the benchmarks, with the goals that they are held to on a GPU.

A quick run has sizes at which no goal means anything; it measures, and judges nothing. The benchmarks take their sizes
from environment variables (`Check.settings`).
"""

from tests.gpu.runner import BELOW, MEASURED, PASS, Outcome, Place


def judged(place: Place, text: str, *reached: bool) -> Outcome:
    if place.quick:
        return Outcome(MEASURED, text)
    return Outcome(PASS if all(reached) else BELOW, text)


def unfrozen(place: Place) -> Outcome:
    from tests.benchmarks.unfrozen import measure

    rate = measure()
    ratio = rate["ours"] / rate["limit"]
    text = f"{rate['ours']:.0f} images/s, limit {rate['limit']:.0f}, plain fastai {rate['plain']:.0f}"
    return judged(place, f"{text}: {ratio:.2f} of the limit (goal 0.95)", ratio >= 0.95)


def frozen(place: Place, goal: float) -> Outcome:
    from tests.benchmarks.frozen import measure

    seconds = measure()
    ratio = seconds["ours"] / seconds["limit"]
    parts = f"{seconds['until the epochs']:.2f} s until the epochs, {seconds['epochs']:.2f} s for them"
    plain = f", plain fastai {seconds['plain']:.1f} s" if "plain" in seconds else ""
    text = f"{seconds['ours']:.2f} s ({parts}), limit {seconds['limit']:.2f} s{plain}"
    return judged(place, f"{text}: {ratio:.2f} times the limit (goal: under {goal:g})", ratio < goal)


def epoch(place: Place) -> Outcome:
    from tests.benchmarks.epoch import TRAIN, VALID, measure

    seconds = measure()
    text = f"{TRAIN:,} + {VALID:,} images: first epoch {seconds['first epoch']:.1f} s, second "
    return Outcome(MEASURED, f"{text}{seconds['second epoch']:.1f} s, limit {seconds['limit']:.1f} s (no goal)")


def predict(place: Place) -> Outcome:
    from tests.benchmarks.predict import DECODE, FOLDED, FORWARD, IMAGES, LOOP, limit_of, measure

    rate = measure()
    of_limit, of_plain = rate["ours"] / limit_of(rate), rate["ours"] / rate[LOOP]
    limits = f"decode limit {rate[DECODE]:.0f}, forward limit {max(rate[FORWARD], rate[FOLDED]):.0f}"
    text = f"{IMAGES:,} files: {rate['ours']:.0f} images/s, {limits}, plain fastai {rate[LOOP]:.0f}"
    text += f": {of_limit:.2f} of the limit (goal 0.9), {of_plain:.0f} times plain fastai (goal 20)"
    return judged(place, text, of_limit >= 0.9, of_plain >= 20)
