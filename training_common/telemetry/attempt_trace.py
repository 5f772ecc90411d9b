"""The trace of one attempt at a job: it goes on with the trace that the job was submitted in, whoever launched it.

Its phases are spans below the attempt's: prepare, train, validate. What a worker asks of others meanwhile, such as the
fetch of a foundation, stands below the phase.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog

from training_common.jobs.states import JobState
from training_common.settings import ServiceSettings, SettingsError
from training_common.telemetry.spans import Tracer, mark_failed, place_of, require_otel
from training_common.telemetry.traces import parse

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from training_common.jobs.store import AttemptStore

log = structlog.get_logger(__name__)

_PHASES = {JobState.RUNNING: "train", JobState.VALIDATING: "validate"}


class AttemptTrace:
    """The attempt's spans; without a tracer it only tells the log which trace this is."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        # The attempt's span and its phase's.
        self._spans: list[Span] = []
        self._phase = contextlib.ExitStack()

    def begin_phase(self, to: JobState) -> None:
        """Begin the phase that a state stands for, if any, and end the one before."""
        if self._tracer is not None and to in _PHASES:
            self._begin(_PHASES[to])

    def _begin(self, name: str) -> None:
        self._phase.close()
        if self._tracer is not None:
            self._spans[1:] = [self._phase.enter_context(self._tracer.span(name))]

    def failed(self, reason: str) -> None:
        """Mark the attempt and its phase as failed. reason: the job's, or PLATFORM where the job has no part in it."""
        for span in self._spans:
            mark_failed(span, reason)

    @contextlib.contextmanager
    def of(self, store: AttemptStore, *, rank: str) -> Iterator[None]:
        """Make the attempt's span of the body. rank: of this process among the attempt's, "0" for the first."""
        parent = parse(store.job.traceparent)
        if self._tracer is None:
            if parent is not None:
                structlog.contextvars.bind_contextvars(trace_id=parent.trace_id)
            yield
            return
        facts = {"forge.job": store.job.name, "forge.attempt": store.attempt.number, "forge.rank": int(rank)}
        with self._tracer.span("attempt", parent, **facts) as span:
            self._spans = [span]
            place = place_of(span)
            if place is not None:
                structlog.contextvars.bind_contextvars(trace_id=place.trace_id, span_id=place.span_id)
            try:
                self._begin("prepare")
                yield
            finally:
                self._phase.close()


@contextlib.contextmanager
def tracing(settings: ServiceSettings) -> Iterator[AttemptTrace]:
    """Trace the work of this process, where the settings name a collector, and send the last spans at its end.

    A worker whose installation cannot send goes on without.
    """
    if not settings.telemetry.otlp_endpoint:
        yield AttemptTrace()
        return
    try:
        require_otel(settings.telemetry)
    except SettingsError as error:
        log.warning("attempt is not traced", detail=str(error))
        yield AttemptTrace()
        return
    tracer = Tracer(settings.telemetry, service=f"{settings.SERVICE}-worker", instance=settings.server_name)
    tracer.install()
    try:
        yield AttemptTrace(tracer)
    finally:
        tracer.close()
