"""How long a client goes on trying when a stream breaks again and again."""

from __future__ import annotations

import random
import time

from cognateforge.client.deadline import remaining_budget_s
from cognateforge.exceptions import DeadlineExceededError, ForgeError, ResourceExhaustedError, UnavailableError

# What breaks a stream without a verdict on the request. CircuitOpenError is an UnavailableError.
BREAKS = (UnavailableError, ResourceExhaustedError, DeadlineExceededError)
# One stream's life. A peer that vanished without a word is noticed after this long at the latest, without pings, which
# servers punish when they come more often than every five minutes.
STREAM_LIFE_S = 300.0
GIVE_UP_AFTER_S = 120.0

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 2.0


class Patience:
    """Bounds the time without progress, and spaces the attempts with doubling, jittered pauses."""

    def __init__(self, give_up_after_s: float) -> None:
        self._give_up_after_s = give_up_after_s
        self._broken_since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def progress(self) -> None:
        """Something arrived: the patience is whole again."""
        self._broken_since, self._pause_s = None, FIRST_PAUSE_S

    def pause_s(self, error: ForgeError) -> float:
        """Return how long to wait before the next attempt, or raise `error` when the patience is spent."""
        now, left_s = time.monotonic(), remaining_budget_s()
        self._broken_since = now if self._broken_since is None else self._broken_since
        if now - self._broken_since >= self._give_up_after_s or (left_s is not None and left_s <= 0):
            raise error
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients, guards nothing
