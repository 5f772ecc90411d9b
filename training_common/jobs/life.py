"""How long workers have been silent, by this server's own steady clock.

Heartbeats are times of the wall clock, which can jump; a server can be asleep, and its store away. So a beat only
counts as a sign that something has changed, and silence only while the server itself was looking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# The scheduler looks twice a second. A longer gap means that it slept, or that its store was away: nobody could tell.
MAX_GAP_S = 5.0


class SignsOfLife:
    """Tells the seconds since each attempt's last sign of life, as far as they were watched."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked_at: float | None = None
        # By attempt: the newest beat, and the silence that was watched since.
        self._seen: dict[int, tuple[int, float]] = {}

    def look(self, beats: Iterable[tuple[int, int]]) -> None:
        """Take in the newest beat of every attempt (id and wall-clock time); those that are not named are forgotten."""
        now = self._clock()
        gap_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        watched_s = gap_s if gap_s <= MAX_GAP_S else 0.0
        before = self._seen
        self._seen = {}
        for attempt, beat in beats:
            last, silent_s = before.get(attempt, (beat, 0.0))
            self._seen[attempt] = (beat, silent_s + watched_s if beat == last and attempt in before else 0.0)

    def silent_s(self, attempt: int) -> float:
        """Return for how long an attempt was seen to be silent."""
        return self._seen[attempt][1]
