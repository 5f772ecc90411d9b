"""Curves for a terminal: a metric over its steps in bounded memory, drawn as one line of blocks."""

from __future__ import annotations

import itertools
import math

_BLOCKS = "▁▂▃▄▅▆▇█"
# More than any terminal has columns; beyond it neighbours become one point.
_MOST_POINTS = 1024


class Curve:
    """One metric of a watched job: the mean of every `width` steps, coarser as the job grows longer."""

    def __init__(self) -> None:
        self._width = 1
        self._sums: dict[int, tuple[float, int]] = {}
        self.last: float | None = None
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, step: int, value: float) -> None:
        """Take a value. What is not finite makes no point."""
        if not math.isfinite(value):
            return
        self.last = value
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        place = step // self._width
        total, count = self._sums.get(place, (0.0, 0))
        self._sums[place] = (total + value, count + 1)
        while len(self._sums) > _MOST_POINTS:
            self._halve()

    def back_to(self, step: int) -> None:
        """Forget what lies after a step: training goes on from there, and its steps come again."""
        self._sums = {place: point for place, point in self._sums.items() if place * self._width <= step}

    def _halve(self) -> None:
        self._width *= 2
        merged: dict[int, tuple[float, int]] = {}
        for place, (total, count) in self._sums.items():
            other, more = merged.get(place // 2, (0.0, 0))
            merged[place // 2] = (other + total, more + count)
        self._sums = merged

    def line(self, columns: int) -> str:
        """Return the curve in at most so many columns, each the mean of its steps, from its lowest to its highest."""
        points = [total / count for _, (total, count) in sorted(self._sums.items())]
        if not points or columns < 1:
            return ""
        if len(points) > columns:
            points = [_mean(points, index, columns) for index in range(columns)]
        lowest, highest = min(points), max(points)
        if lowest == highest:
            return _BLOCKS[0] * len(points)
        scale = (len(_BLOCKS) - 1) / (highest - lowest)
        return "".join(_BLOCKS[round((point - lowest) * scale)] for point in points)


def _mean(points: list[float], index: int, columns: int) -> float:
    part = points[index * len(points) // columns : (index + 1) * len(points) // columns]
    return sum(part) / len(part)


def span(seconds: float) -> str:
    """Return a span of time in its two largest units: "42 s", "3 min 20 s", "5 h 12 min", "2 d 3 h"."""
    left = max(0, round(seconds))
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, length), (smaller, part) in itertools.pairwise(units):
        if left >= length:
            rest = left % length // part
            return f"{left // length} {unit} {rest} {smaller}" if rest else f"{left // length} {unit}"
    return f"{left} s"
