"""What the benches share: interleaved runs, medians, and the JSON object in a bench's last line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def interleave(ours: Callable[[], T], yardstick: Callable[[], T], *, runs: int) -> list[tuple[T, T]]:
    """Measure the two in turn, after one of each to warm up, so that a busy machine hurts both alike.

    Each is the first one as often as the other, since the second may find caches warm.
    """
    ours()
    yardstick()
    return [(yardstick(), ours())[::-1] if number % 2 else (ours(), yardstick()) for number in range(runs)]


def report(name: str, pairs: list[tuple[float, float]], *, unit: str, **beside: object) -> None:
    """Print the result of pairs: medians of ours (`value`) and of the yardstick, and the median of their ratios.

    beside: further fields.
    """
    print_result(
        name,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        unit=unit,
        ratio=median_ratio(pairs),
        runs=len(pairs),
        **beside,
    )


def print_result(
    name: str, value: float, yardstick: float, *, unit: str, ratio: float | None = None, runs: int = 1, **beside: object
) -> None:
    """Print one JSON object, a bench's last line. ratio: value over yardstick, unless it is another one."""
    result = {"name": name, "value": value, "unit": unit, "yardstick": yardstick}
    ratio = value / yardstick if ratio is None else ratio
    print(json.dumps({**result, "ratio": ratio, "runs": runs, **beside}))


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Return the median of ours over the yardstick's."""
    return statistics.median(ours / theirs for ours, theirs in pairs)


def center(ratios: Sequence[float]) -> tuple[float, float]:
    """Return where ratios lie, and below which value that is with 95 %; single ones may be far off.

    The median of the means of all pairs of their logarithms (Hodges and Lehmann 1963) and the bound of Wilcoxon's
    signed-rank test. Both ask for a symmetric distribution, which turns in both orders give.
    """
    logs, count = np.log(np.asarray(ratios)), len(ratios)
    first, second = np.triu_indices(count)
    means = np.sort((logs[first] + logs[second]) / 2)
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    above = min(len(means) - 1, math.ceil(len(means) / 2 + 1.645 * spread))
    return math.exp(np.median(means)), math.exp(means[above])
