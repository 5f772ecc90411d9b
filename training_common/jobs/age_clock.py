"""The time by which ages are counted, or none while the clock has jumped ahead: what is removed cannot be had back."""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa
import structlog

from training_common.store import tables as t
from training_common.store.database import Database, now_us

log = structlog.get_logger(__name__)

# A clock that is set forward by so little ages nothing that matters.
TOLERANCE_US = 3600 * 10**6
# At the start nobody knows how long the service was away: so much longer than its last event is doubted.
MOST_AWAY_US = 30 * 86_400 * 10**6
# After so long the clock is believed all the same: it may have been behind before. A week has a day on which somebody
# reads what was logged.
HOLD_S = 7 * 86_400.0


def steady_s() -> float:
    """Return seconds that nobody can set, those of the machine's sleep included where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class AgeClock:
    """A wall clock that is doubted when it advances faster than time does.

    Called now and then, it returns microseconds since 1970, or None while it is in doubt: until the clock was set back,
    or HOLD_S have passed. clock, steady: for tests.
    """

    def __init__(
        self, database: Database, *, clock: Callable[[], int] = now_us, steady: Callable[[], float] = steady_s
    ) -> None:
        self._database = database
        self._clock = clock
        self._steady = steady
        # Up to which time the clock is believed, and when that was so.
        self._believed: tuple[int, float] | None = None
        self._doubted_since_s: float | None = None

    def __call__(self) -> int | None:
        """Return the time, or None. Errors: sqlalchemy.exc.OperationalError, of the first call."""
        now, steady = self._clock(), self._steady()
        if self._believed is None:
            self._believed = (self._newest_event_us(now) + MOST_AWAY_US, steady)
        latest, at = self._believed
        ahead_us = now - latest - round((steady - at) * 1e6)
        if ahead_us > 0 and not self._is_held_for_long(ahead_us, steady):
            return None
        if self._doubted_since_s is not None:
            log.warning("the clock is believed again: retention goes on", time_us=now)
        self._believed, self._doubted_since_s = (now + TOLERANCE_US, steady), None
        return now

    def _is_held_for_long(self, ahead_us: int, steady: float) -> bool:
        if self._doubted_since_s is None:
            self._doubted_since_s = steady
            log.warning(
                "the clock has jumped ahead: retention removes nothing", ahead_s=ahead_us // 10**6, hold_s=HOLD_S
            )
        return steady - self._doubted_since_s >= HOLD_S

    def _newest_event_us(self, now: int) -> int:
        """Return when the service was last seen at work, by its own store; now for one that never was."""
        query = sa.select(t.events.c.time_us).order_by(t.events.c.id.desc()).limit(1)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        return now if found is None else int(found)
