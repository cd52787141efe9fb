"""Timings of a benchmark: repeats in turns, so that what else the machine does falls on all; medians and ratios."""

import statistics
import time
from collections.abc import Callable


def rates(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Things a second of each way, a number a repeat; a way does its work once and returns how many things it did.

    A first round, in which memory is taken and caches are filled, is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if repeat:
                found[name].append(count / (time.perf_counter() - start))
    return found


def show(title: str, found: dict[str, list[float]], unit: str, against: tuple[str, ...]) -> None:
    """A row a way: the median, the lowest and the highest, and the ratio of its median to those of `against`."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    heads = "".join(f"{'/ ' + name:>14}" for name in against)
    print(f"\n{title}\n{'':<28}{unit:>12}{'range':>20}{heads}")
    for name, values in found.items():
        ratios = "".join(f"{medians[name] / medians[other]:>14.2f}" for other in against)
        print(f"{name:<28}{medians[name]:>12.1f}{f'{min(values):.1f} to {max(values):.1f}':>20}{ratios}", flush=True)
