"""How much one caller may ask for: calls at once, and calls a second.

They hold for callers with an identity of their own; those that have no role share one. Callers without TLS all have the
same name, "local", and share the server's own bounds instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cognateforge.exceptions import ResourceExhaustedError
from training_common.rpc.identity import LOCAL, Caller

_UNLISTED = "all callers without a role together"


@dataclass(slots=True)
class _Use:
    """What one caller has taken. `tokens` is how many calls it may make at once, as of `at_s`."""

    tokens: float
    at_s: float
    open: int = 0


class CallerLimits:
    """A token bucket and a count of open calls for each caller.

    calls_per_s: 0 means no bound. The bucket holds two seconds' worth, so that a caller may be bursty.
    open_calls: calls and streams of one caller at once; 0 means no bound.
    """

    def __init__(self, *, calls_per_s: float, open_calls: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = calls_per_s
        self._burst = max(1.0, 2 * calls_per_s)
        self._open_calls = open_calls
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def taking(self, caller: Caller) -> Iterator[None]:
        """Count a call of a caller as long as it runs. Errors: ResourceExhaustedError, and the call is not counted."""
        if caller.name == LOCAL:
            yield
            return
        # All who have no role share one use: names that nobody has listed must not pile up here.
        name = caller.name if caller.roles else _UNLISTED
        use = self._uses.get(name) or self._uses.setdefault(name, _Use(self._burst, self._clock()))
        self._take(use, name)
        use.open += 1
        try:
            yield
        finally:
            use.open -= 1

    def _take(self, use: _Use, name: str) -> None:
        if self._open_calls and use.open >= self._open_calls:
            raise ResourceExhaustedError(
                f"{name} has {use.open} calls open, and may have {self._open_calls}: end one, or call later"
            )
        if not self._rate:
            return
        now = self._clock()
        use.tokens, use.at_s = min(self._burst, use.tokens + (now - use.at_s) * self._rate), now
        if use.tokens < 1:
            wait_s = (1 - use.tokens) / self._rate
            raise ResourceExhaustedError(
                f"{name} makes more than {self._rate:g} calls a second: wait {wait_s:.3f} s before the next one",
                metadata={"retry_after_s": f"{wait_s:.3f}"},
            )
        use.tokens -= 1
