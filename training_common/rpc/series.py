"""Metrics of a job over its steps, thinned while they are read, so that memory does not grow with the job's length."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cognateforge.job.v1 import job_pb2

# The contract's bound on a series, and one on all of them: a value with its step takes at most 14 bytes, and a client
# takes messages of 4 MiB.
MAX_POINTS = 10_000
MAX_POINTS_IN_ALL = 250_000
# Held before a series is made coarser: up to here no point is lost before the answer is.
_HELD = 2 * MAX_POINTS
# Left after it was. A part of a series holds up to three points, so that thousands of parts remain.
_LEFT = _HELD * 3 // 4

_Point = tuple[int, float]


def _extremes(points: Sequence[_Point]) -> list[_Point]:
    """Return the lowest and the highest of the points, in their order; one where they are the same."""
    if len(points) <= 2:
        return [*points]
    return sorted({min(points, key=_value), max(points, key=_value)})


def _value(point: _Point) -> float:
    return point[1]


class _Points:
    """One metric: of every `width` steps the lowest, the highest and the newest value."""

    def __init__(self) -> None:
        self._width = 1
        self._count = 0
        self._parts: dict[int, list[_Point]] = {}
        self._first: _Point | None = None

    def add(self, step: int, value: float) -> None:
        if self._first is None or step <= self._first[0]:
            self._first = step, value
        self._put((step, value))
        while self._count > _HELD:
            self._coarsen()

    def _coarsen(self) -> None:
        while self._count > _LEFT:
            self._width *= 2
            points = sorted(itertools.chain.from_iterable(self._parts.values()))
            self._parts, self._count = {}, 0
            for point in points:
                self._put(point)

    def _put(self, point: _Point) -> None:
        place = point[0] // self._width
        if (part := self._parts.get(place)) is None:
            self._parts[place], self._count = [point], self._count + 1
            return
        # What is at this step or after it was trained before a worker was lost, and is trained again now.
        kept = [earlier for earlier in part if earlier[0] < point[0]]
        self._parts[place] = [*_extremes(kept), point] if kept else [point]
        self._count += len(self._parts[place]) - len(part)

    def thinned(self, most: int) -> Sequence[_Point]:
        """Return at most `most` points in order: the last, the first, and the extremes of even parts between them."""
        points = sorted(
            {*itertools.chain.from_iterable(self._parts.values()), *((self._first,) if self._first else ())}
        )
        if len(points) <= most:
            return points
        if most < 4:
            return [points[0], points[-1]][-most:]
        first, *between, last = points
        parts = (most - 2) // 2
        cuts = [part * len(between) // parts for part in range(parts + 1)]
        kept = (_extremes(between[begin:end]) for begin, end in itertools.pairwise(cuts))
        return [first, *itertools.chain.from_iterable(kept), last]


class SeriesBuilder:
    """Takes progress events in order and makes a series of every scalar metric; histograms are left out.

    After a lost worker the steps since its checkpoint are trained again: of two values at a step the newer one counts.
    Extremes survive the thinning, for a plot of few points must not hide a spike.
    most: points of each series; 0 means MAX_POINTS.
    """

    def __init__(self, wanted: Collection[str], most: int = 0) -> None:
        self._wanted = frozenset(wanted)
        self._most = min(MAX_POINTS, most or MAX_POINTS)
        self._metrics: dict[str, _Points] = {}

    def add(self, progress: Mapping[str, Any]) -> None:
        """Take one progress event's payload."""
        for name, value in progress["metrics"].items():
            if not isinstance(value, list) and (not self._wanted or name in self._wanted):
                self._metrics.setdefault(name, _Points()).add(progress["step"], value)

    def series(self, units: Mapping[str, str]) -> list[job_pb2.MetricSeries]:
        """Return the series, sorted by name."""
        most = min(self._most, MAX_POINTS_IN_ALL // max(1, len(self._metrics)))
        result = []
        for name, metric in sorted(self._metrics.items()):
            steps, values = zip(*metric.thinned(most), strict=True)
            result.append(job_pb2.MetricSeries(name=name, unit=units.get(name, ""), steps=steps, values=values))
        return result
