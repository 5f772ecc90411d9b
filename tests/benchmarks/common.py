"""What the benches share: interleaved runs, medians, and the JSON object in a bench's last line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable


def interleave(ours: Callable[[], float], yardstick: Callable[[], float], *, runs: int) -> list[tuple[float, float]]:
    """Measure the two in turn, after one of each to warm up, so that a busy machine hurts both alike."""
    ours()
    yardstick()
    return [(ours(), yardstick()) for _ in range(runs)]


def report(name: str, pairs: list[tuple[float, float]], *, unit: str, **beside: float) -> None:
    """Print one JSON object: medians of ours (`value`) and of the yardstick, and the median of their ratios.

    beside: further fields.
    """
    result = {
        "name": name,
        "value": statistics.median(ours for ours, _ in pairs),
        "unit": unit,
        "yardstick": statistics.median(theirs for _, theirs in pairs),
        "ratio": median_ratio(pairs),
        "runs": len(pairs),
        **beside,
    }
    print(json.dumps(result))


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Return the median of ours over the yardstick's."""
    return statistics.median(ours / theirs for ours, theirs in pairs)
