"""A circuit breaker for gRPC calls: after repeated failures calls are held back, then one probe decides."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, suppress
from typing import Literal, cast

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


class _AbandonedError(Exception):
    """The caller let go of a call before its outcome was known."""


class CallBreaker:
    """pybreaker, with a half-open state that lets exactly one call through.

    pybreaker's `calling()` is used because `call()` holds a lock while the call runs. What `calling()` lacks is the
    gate: left alone, every call that waits goes through at once when the reset timeout has passed.
    """

    def __init__(self, name: str = "", *, fail_max: int = 5, reset_timeout_s: float = 5.0) -> None:
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=fail_max,
            reset_timeout=reset_timeout_s,
            name=name,
            throw_new_error_on_trip=False,
            exclude=[self._is_answer],
        )
        self._lock = threading.Lock()
        self._probe: Admission | None = None

    @property
    def state(self) -> BreakerState:
        """Where the breaker stands. An open one turns half-open only when the next call asks."""
        return cast("BreakerState", self._breaker.current_state)

    def admit(self) -> Admission:
        """Let one call pass, or raise CircuitOpenError without one."""
        with self._lock:
            closed = self.state == "closed"
            if not closed and self._probe is not None and not self._probe.overdue:
                raise self._refusal()
            admission = Admission(self, self._breaker.calling(), self._breaker.reset_timeout)
            try:
                admission.enter()
            except pybreaker.CircuitBreakerError:
                raise self._refusal() from None
            if not closed:
                self._probe = admission
            return admission

    def record(self, error: grpc.RpcError) -> None:
        """Count the failure of a stream that was admitted and answered before."""
        if self._is_answer(error) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return  # the deadline of a stream that delivered is the end of its time, not a sign of illness
        with suppress(grpc.RpcError, pybreaker.CircuitBreakerError), self._breaker.calling():
            raise error

    def release(self, admission: Admission) -> None:
        """Make room for the next probe, if this call was the probe."""
        with self._lock:
            if self._probe is admission:
                self._probe = None

    def _refusal(self) -> CircuitOpenError:
        return CircuitOpenError(
            f"calls to {self._breaker.name or 'the service'} are held back after repeated failures: "
            f"try again in {self._breaker.reset_timeout:g} s"
        )

    def _is_answer(self, error: BaseException) -> bool:
        if isinstance(error, grpc.RpcError):
            return error.code() not in FAILURES
        # A call without an outcome says nothing; but as a probe it must not close the circuit.
        return self.state == "closed"


class Admission:
    """One call's way through the breaker. It is settled once; what comes later is ignored."""

    def __init__(self, breaker: CallBreaker, calling: AbstractContextManager[None], probe_timeout_s: float) -> None:
        self._breaker = breaker
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
            self._breaker.record(error)

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
        return True
