"""What of a job's past a plot marks: every event but progress, with the step at which it happened."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from cognateforge.dashboard.plain import event_json, seconds, step_of
from cognateforge.dashboard.upstream import Upstream

# Jobs whose past is kept, so that it is read once.
_JOBS = 64
# Events of a job that are kept, the newest: a job that is given up again and again makes a handful in each attempt.
_EVENTS = 2_000
# Moments that are kept of a job, evenly over its progress: as many as turn steps into times on a plot.
_MOMENTS = 512
# Progress that is read of what is far back, four times as much: an event that tells no step of its own is then drawn
# less than a pixel from where it belongs.
_PROGRESS = 4 * _MOMENTS
# Events at the end that are read one by one: the newest histograms are among them.
_TAIL = 500


@dataclass
class Past:
    """What was read of a job. moments: pairs of a step and its time. bins: the newest histograms, and their step."""

    sequence: int
    step: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    moments: list[tuple[int, float]] = field(default_factory=list)
    bins: dict[str, Any] = field(default_factory=dict)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _every: int = 1
    _seen: int = 0

    def take(self, event: Any) -> None:
        """Keep what is to be kept of the next event."""
        self.sequence = event.sequence
        if event.HasField("progress"):
            self._take_progress(event)
            return
        told = step_of(event)
        self.events.append({**event_json(event), "step": self.step if told is None else told})
        del self.events[:-_EVENTS]

    def _take_progress(self, event: Any) -> None:
        self.step = event.progress.step
        bins = {one.name: list(one.bins) for one in event.progress.metrics if one.bins}
        if bins:
            self.bins = {"step": self.step, "bins": bins}
        if self._seen % self._every == 0:
            self.moments.append((self.step, seconds(event.time)))
            if len(self.moments) > _MOMENTS:
                self.moments, self._every = self.moments[::2], 2 * self._every
        self._seen += 1


class History:
    """The pasts of the jobs that were looked at, the latest of them."""

    def __init__(self) -> None:
        self._pasts: OrderedDict[tuple[str, str], Past] = OrderedDict()

    async def of(self, upstream: Upstream, name: str, first: int, until: int) -> dict[str, Any]:
        """Return what happened up to a sequence. first: the oldest sequence that is kept.

        Errors: those of a watch.
        """
        key = upstream.name, name
        past = self._pasts.setdefault(key, Past(sequence=max(0, first - 1)))
        self._pasts.move_to_end(key)
        if len(self._pasts) > _JOBS:
            self._pasts.popitem(last=False)
        async with past.reading:
            # Retention may have removed what was not read yet.
            past.sequence = max(past.sequence, first - 1)
            every = max(1, (until - past.sequence) // _PROGRESS)
            if every > 1:
                await self._read(past, upstream, name, until - max(_TAIL, every), every)
            await self._read(past, upstream, name, until, 1)
        return {"events": past.events, "moments": past.moments, "newest_bins": past.bins, "sequence": past.sequence}

    async def _read(self, past: Past, upstream: Upstream, name: str, until: int, every: int) -> None:
        """Read to a sequence at least, which the job has. every: of progress one event of so many."""
        if past.sequence >= until:
            return
        async with aclosing(cast("Any", upstream.watch(name, past.sequence, every))) as frames:
            async for frame in frames:
                if frame.HasField("event"):
                    past.take(frame.event)
                if past.sequence >= until or frame.HasField("end"):
                    return
