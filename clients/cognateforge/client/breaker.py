"""A circuit breaker for gRPC calls: after repeated failures calls are held back, then one probe decides."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import grpc
import pybreaker

from cognateforge.exceptions import CircuitOpenError

# What says that a service is ill. Every other status is an answer from a healthy one.
FAILURES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)

BreakerState = Literal["closed", "open", "half-open"]
# Told of every change: the breaker's name, the state before and the state after.
OnStateChange = Callable[[str, BreakerState, BreakerState], None]
# Clients whose breakers opened together do not probe together: each draws its pause anew, every time it opens.
RESET_TIMEOUT_S = 5.0
_MAX_REASON_CHARS = 200
EARLIEST_PROBE = 0.8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BreakerSnapshot:
    """What a breaker has seen since it was made, for a program's metrics.

    state: where it stands now. failures_in_a_row: what is counted towards the next opening.
    The others only grow. admitted: calls that were sent. refused: calls that were not, because the circuit was open.
    failed: failures that counted. probes: those of the admitted calls that were sent to find out whether the service
    is back. opened: how often the circuit opened.
    """

    name: str
    state: BreakerState
    failures_in_a_row: int
    admitted: int = 0
    refused: int = 0
    failed: int = 0
    probes: int = 0
    opened: int = 0


class _AbandonedError(Exception):
    """The caller let go of a call before its outcome was known."""


class CallBreaker:
    """pybreaker, with a half-open state that lets exactly one call through.

    pybreaker's `calling()` is used because `call()` holds a lock while the call runs. What `calling()` lacks is the
    gate: left alone, every call that waits goes through at once when the reset timeout has passed.

    reset_timeout_s: the longest time that an open circuit holds calls back before a probe; the shortest is 0.8 of it.
    on_state_change: called after each change, from the thread of the call that brought it, while no lock is held.
        What it raises is logged.
    """

    def __init__(
        self,
        name: str = "",
        *,
        fail_max: int = 5,
        reset_timeout_s: float = RESET_TIMEOUT_S,
        on_state_change: OnStateChange | None = None,
    ) -> None:
        self._reset_timeout_s = reset_timeout_s
        self._on_state_change = on_state_change
        self._counts = BreakerSnapshot(name=name, state="closed", failures_in_a_row=0)
        self._counting = threading.Lock()
        self._changes: deque[tuple[BreakerState, BreakerState]] = deque()
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=fail_max,
            reset_timeout=reset_timeout_s,
            name=name,
            throw_new_error_on_trip=False,
            exclude=[self._is_answer],
            listeners=[_Listener(self._changed, self._failed)],
        )
        self._lock = threading.Lock()
        self._breaking = threading.Lock()
        self._probe: Admission | None = None
        self._last_failure = ""

    @property
    def state(self) -> BreakerState:
        """Where the breaker stands. An open one turns half-open only when the next call asks."""
        return cast("BreakerState", self._breaker.current_state)

    def snapshot(self) -> BreakerSnapshot:
        """Return state and counts. May be called from any thread."""
        return replace(self._counts, state=self.state, failures_in_a_row=self._breaker.fail_counter)

    def admit(self) -> Admission:
        """Let one call pass, or raise CircuitOpenError without one."""
        try:
            return self._admit()
        except CircuitOpenError:
            self._count("refused")
            raise
        finally:
            self.tell()

    def _admit(self) -> Admission:
        with self._lock:
            closed = self.state == "closed"
            if not closed and self._probe is not None and not self._probe.overdue:
                raise self._refusal()
            admission = Admission(
                self, self._breaker.calling(), self._reset_timeout_s, failed_before=self._counts.failed
            )
            try:
                admission.enter()
            except pybreaker.CircuitBreakerError:
                raise self._refusal() from None
            self._count("admitted")
            if not closed:
                self._probe = admission
                self._count("probes")
            return admission

    def record(self, error: grpc.RpcError, *, failed_before: int) -> None:
        """Count the failure of a stream that was admitted and answered before.

        failed_before: failures that had counted when it was admitted. Streams break together, with the one connection
        that carries them: the first says so, and those that are opened after it say whether the service is ill.
        """
        if self._is_answer(error) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return  # the deadline of a stream that delivered is the end of its time, not a sign of illness
        with self._breaking:
            if failed_before < self._counts.failed:
                return
            with suppress(grpc.RpcError, pybreaker.CircuitBreakerError), self._breaker.calling():
                raise error
        self.tell()

    def tell(self) -> None:
        """Tell the program of the changes that have come about."""
        while self._changes:
            try:
                before, after = self._changes.popleft()
            except IndexError:  # another thread told it
                return
            if self._on_state_change is None:
                continue
            try:
                self._on_state_change(self._counts.name, before, after)
            except Exception:
                logger.exception("on_state_change failed", extra={"breaker": self._counts.name})

    def _changed(self, before: BreakerState, after: BreakerState) -> None:
        # pybreaker calls this with its lock held: the program is told later, by tell().
        if after == "open":
            draw = random.uniform(EARLIEST_PROBE, 1.0)  # noqa: S311 - spreads clients, guards nothing
            self._breaker.reset_timeout = self._reset_timeout_s * draw
        if before == after:
            return  # a call that was sent while it was closed has failed after it opened
        if after == "open":
            self._count("opened")
        self._changes.append((before, after))

    def _failed(self, error: BaseException) -> None:
        self._count("failed")
        if isinstance(error, grpc.RpcError):
            self._last_failure = f"{error.code().name}: {error.details() or ''}".rstrip(": ")[:_MAX_REASON_CHARS]

    def _count(self, what: str) -> None:
        with self._counting:
            counts: dict[str, Any] = {what: getattr(self._counts, what) + 1}
            self._counts = replace(self._counts, **counts)

    def release(self, admission: Admission) -> None:
        """Make room for the next probe, if this call was the probe."""
        with self._lock:
            if self._probe is admission:
                self._probe = None

    def _refusal(self) -> CircuitOpenError:
        last = f", the last one {self._last_failure}" if self._last_failure else ""
        return CircuitOpenError(
            f"calls to {self._breaker.name or 'the service'} are held back after repeated failures{last}; "
            f"try again in {self._reset_timeout_s:g} s"
        )

    def _is_answer(self, error: BaseException) -> bool:
        if isinstance(error, grpc.RpcError):
            return error.code() not in FAILURES
        # A call without an outcome says nothing; but as a probe it must not close the circuit.
        return self.state == "closed"


class _Listener(pybreaker.CircuitBreakerListener):
    """What pybreaker tells."""

    def __init__(
        self, changed: Callable[[BreakerState, BreakerState], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._changed, self._failed = changed, failed

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self._changed(old_state.name if old_state else "closed", new_state.name)

    def failure(self, cb: Any, exc: BaseException) -> None:
        self._failed(exc)


class Admission:
    """One call's way through the breaker. It is settled once; what comes later is ignored."""

    def __init__(
        self, breaker: CallBreaker, calling: AbstractContextManager[None], probe_timeout_s: float, *, failed_before: int
    ) -> None:
        self._breaker = breaker
        self._failed_before = failed_before
        self._calling = calling
        # A probe without an outcome, for instance a silent stream, gives up its place after one reset timeout.
        self._due = time.monotonic() + probe_timeout_s
        self._open = False
        self._lock = threading.Lock()

    @property
    def overdue(self) -> bool:
        """Whether another probe may go beside this one."""
        return time.monotonic() > self._due

    def enter(self) -> None:
        """Pass the breaker, or raise pybreaker's error."""
        self._calling.__enter__()
        self._open = True

    def answered(self) -> None:
        """The service gave an answer."""
        self._settle(None)

    def failed(self, error: grpc.RpcError) -> None:
        """The call ended with this status, which the breaker may count. After an answer, it counts as a new failure."""
        if not self._settle(error):
            self._breaker.record(error, failed_before=self._failed_before)

    def abandoned(self) -> None:
        """The caller let go of the call."""
        self._settle(_AbandonedError())

    def _settle(self, error: Exception | None) -> bool:
        with self._lock:
            if not self._open:
                return False
            self._open = False
        with suppress(grpc.RpcError, _AbandonedError):
            self._calling.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        self._breaker.release(self)
        self._breaker.tell()
        return True
