"""Metrics of a job over its steps, thinned while they are read, so that memory does not grow with the job's length."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cognateforge.job.v1 import job_pb2

# The contract's bound on a series, and one on all of them: a value with its step takes at most 14 bytes, and a client
# takes messages of 4 MiB.
MAX_POINTS = 10_000
MAX_POINTS_IN_ALL = 250_000
# Held before a series is made coarser: up to here no point is lost before the answer is.
_HELD = 2 * MAX_POINTS


class _Points:
    """One metric: the newest value of every `width` steps."""

    def __init__(self) -> None:
        self._width = 1
        self._points: dict[int, tuple[int, float]] = {}

    def add(self, step: int, value: float) -> None:
        self._points[step // self._width] = (step, value)
        if len(self._points) > _HELD:
            self._width *= 2
            self._points = {step // self._width: (step, value) for step, value in sorted(self._points.values())}

    def thinned(self, most: int) -> Sequence[tuple[int, float]]:
        """Return at most `most` points in order, the last among them."""
        points = sorted(self._points.values())
        if len(points) <= most:
            return points
        last = len(points) - 1
        return [points[round(index * last / (most - 1))] for index in range(most)]


class SeriesBuilder:
    """Takes progress events in order and makes a series of every scalar metric; histograms are left out.

    After a lost worker the steps since its checkpoint are trained again: of two values at a step the newer one counts.
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = frozenset(wanted)
        self._metrics: dict[str, _Points] = {}

    def add(self, progress: Mapping[str, Any]) -> None:
        """Take one progress event's payload."""
        for name, value in progress["metrics"].items():
            if not isinstance(value, list) and (not self._wanted or name in self._wanted):
                self._metrics.setdefault(name, _Points()).add(progress["step"], value)

    def series(self, units: Mapping[str, str]) -> list[job_pb2.MetricSeries]:
        """Return the series, sorted by name."""
        most = min(MAX_POINTS, max(2, MAX_POINTS_IN_ALL // max(1, len(self._metrics))))
        result = []
        for name, metric in sorted(self._metrics.items()):
            steps, values = zip(*metric.thinned(most), strict=True)
            result.append(job_pb2.MetricSeries(name=name, unit=units.get(name, ""), steps=steps, values=values))
        return result
