"""How long a call may take: its own timeout, the client's default, and what is left of the caller's own deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cognateforge.exceptions import DeadlineExceededError

# The time.monotonic() at which whoever waits for us stops waiting. A program that serves calls sets it
# for each of them, so that the calls it makes on the way end in time; `deadline_within` does so for a block.
deadline_budget: ContextVar[float | None] = ContextVar("deadline_budget", default=None)


def remaining_budget_s() -> float | None:
    """Return the seconds that are left of the caller's deadline, or None where there is none."""
    until = deadline_budget.get()
    return None if until is None else until - time.monotonic()


@contextmanager
def deadline_within(timeout_s: float) -> Iterator[None]:
    """Bound every call that is made inside the block. A nested block can only shorten the time."""
    until, outer = time.monotonic() + timeout_s, deadline_budget.get()
    token = deadline_budget.set(until if outer is None else min(until, outer))
    try:
        yield
    finally:
        deadline_budget.reset(token)


def call_timeout_s(asked_s: float | None, default_s: float | None) -> float | None:
    """Return the timeout to send: what was asked for or the default, and never more than the budget.

    Errors: DeadlineExceededError, when the budget is spent and the call would be sent for nobody.
    """
    timeout_s, left_s = default_s if asked_s is None else asked_s, remaining_budget_s()
    if left_s is None:
        return timeout_s
    if left_s <= 0:
        raise DeadlineExceededError("the caller's deadline passed before this call was sent")
    return left_s if timeout_s is None else min(timeout_s, left_s)
