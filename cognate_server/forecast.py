"""When waiting jobs are likely to start: by measured speeds, steps that are left, and reservations.

The queue is played through: every job that runs ends after its remaining steps, and the first that waits takes the
first slot that no reservation keeps. What was not measured makes everything behind it unknown.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from cognate_server.reservations import Calendar, ReservationRow
from training_common.jobs.queue import ORDER, is_due
from training_common.jobs.speed import measured_steps_per_s, speeds
from training_common.jobs.states import HELD, WAITING
from training_common.jobs.store import JobRow
from training_common.store import tables as t
from training_common.store.database import now_us

# Jobs of the queue that are played through. Behind them nothing is foretold.
_MOST = 200
_COLUMNS = (
    t.jobs.c.id,
    t.jobs.c.attempt,
    t.jobs.c.step,
    t.jobs.c.total_steps,
    t.jobs.c.configuration,
    t.jobs.c.reservation,
    t.jobs.c.slots,
)


class Forecast:
    """Foretells starts, for one server's speeds."""

    def __init__(self, calendar: Calendar, *, server: str) -> None:
        self._calendar = calendar
        self._server = server

    def expected(self, connection: sa.Connection, jobs: Sequence[JobRow]) -> Mapping[int, int]:
        """Return when those of the jobs that wait are likely to get a worker, by id, in microseconds since 1970."""
        wanted = {job.id for job in jobs if job.state in WAITING}
        if not wanted:
            return {}
        now = now_us()
        open_ = self._calendar.open(connection, now)
        play = _Play(self._calendar.slots, open_, now)
        for row in connection.execute(sa.select(*_COLUMNS).where(t.jobs.c.state.in_([s.value for s in HELD]))):
            measured = measured_steps_per_s(connection, row.id, row.attempt)
            if measured is None:
                play.unknown(row.reservation)
            else:
                play.runs(row.reservation, row.slots, now + _left_us(row.step, row.total_steps, measured))
        rates: dict[str, float | None] = {}
        found = {}
        for row in connection.execute(sa.select(*_COLUMNS).where(is_due()).order_by(*ORDER).limit(_MOST)):
            start = play.start(row.reservation, row.slots)
            if start is not None and row.id in wanted:
                found[row.id] = start
            if row.configuration not in rates:
                known = speeds(connection, configuration=row.configuration, server=self._server)
                rates[row.configuration] = statistics.median(known) if known else None
            rate = rates[row.configuration]
            if rate is None or start is None:
                play.unknown(row.reservation)
            else:
                play.runs(row.reservation, row.slots, start + _left_us(row.step, row.total_steps, rate))
        return found


class _Play:
    """Slots over time, as far as they are known: those of every reservation, and those of all other jobs ("")."""

    def __init__(self, slots: int, open_: Sequence[ReservationRow], now: int) -> None:
        self._slots = slots
        self._open = {one.name: one for one in open_}
        self._now = now
        # When the jobs in each group end.
        self._ends: dict[str, list[int]] = {}
        self._unknown: set[str] = set()

    def runs(self, reservation: str, slots: int, end: int) -> None:
        """Take slots until then."""
        self._ends.setdefault(self._group(reservation), []).extend([end] * slots)

    def unknown(self, reservation: str) -> None:
        """Take slots until nobody knows when."""
        self._unknown.add(self._group(reservation))

    def start(self, reservation: str, slots: int) -> int | None:
        """Return when the next job gets so many slots, None where that is unknown or never."""
        group = self._group(reservation)
        if group in self._unknown or (not group and self._unknown):
            return None
        ends = self._ends.get(group, [])
        if group:
            one = self._open[group]
            moments = [max(self._now, one.start_us), *(end for end in ends if end > one.start_us)]
            free = (moment for moment in sorted(moments) if sum(end > moment for end in ends) + slots <= one.slots)
            start = next(free, None)
            # With its end the job waits like any other: that far nothing is foretold.
            return start if start is not None and start < one.end_us else None
        borders = [border for one in self._open.values() for border in (one.start_us, one.end_us)]
        moments = sorted({self._now, *ends, *(border for border in borders if border > self._now)})
        return next((moment for moment in moments if self._taken(moment) + slots <= self._slots), None)

    def _taken(self, moment: int) -> int:
        """Return how many slots others than a new job have: those kept at the time, and those that are taken."""
        taken = sum(end > moment for end in self._ends.get("", []))
        for name, one in self._open.items():
            kept = one.slots if one.start_us <= moment < one.end_us else 0
            # A job of a reservation that is over goes on beside the others.
            taken += max(kept, sum(end > moment for end in self._ends.get(name, [])) if moment >= one.start_us else 0)
        return taken

    def _group(self, reservation: str) -> str:
        return reservation if reservation in self._open else ""


def _left_us(step: int, total_steps: int, steps_per_s: float) -> int:
    return round(max(0, total_steps - step) / steps_per_s * 1e6)
