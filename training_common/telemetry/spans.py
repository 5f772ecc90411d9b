"""Spans of OpenTelemetry, exported over OTLP: made only where the settings name a collector.

The SDK is imported when the first tracer is made, so that a process without one does not carry it. Spans are sent by a
thread, from a queue that drops what a collector does not take: no call and no step of training waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from cognateforge.untraced import UNTRACED
from training_common.release import release_of
from training_common.settings import SettingsError, TelemetrySettings
from training_common.telemetry.traces import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

log = structlog.get_logger(__name__)

# A collector of this site answers in milliseconds. One that is away for longer costs what is queued, and nothing else.
EXPORT_TIMEOUT_S = 5.0
# What the end of a process waits for its last spans.
FLUSH_S = 3.0
# The newest traces are looked for while something is wrong, so they should be there soon.
_DELAY_MS = 1000
_STARTS = frozenset({"StartPretraining", "StartTraining"})


def require_otel(settings: TelemetrySettings) -> None:
    """Refuse an endpoint without the packages that send to it. Errors: SettingsError."""
    if not settings.otlp_endpoint:
        return
    try:
        import opentelemetry.exporter.otlp.proto.grpc
        import opentelemetry.sdk  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"telemetry.otlp_endpoint needs {error.name}: install cognateforge[otel], or leave the key out"
        ) from error


class Tracer:
    """Makes the spans of one process, or of one server of it."""

    def __init__(
        self,
        settings: TelemetrySettings,
        *,
        service: str,
        instance: str,
        exporter: SpanExporter | None = None,
    ) -> None:
        """service: "cognate" or "agent". instance: the server's name. exporter: instead of the endpoint's own."""
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._ratio = settings.trace_ratio
        exporter = exporter or OTLPSpanExporter(endpoint=settings.otlp_endpoint, timeout=EXPORT_TIMEOUT_S)
        self.provider: TracerProvider = TracerProvider(
            resource=resource(service, instance),
            sampler=_sampler(settings.trace_ratio),
            shutdown_on_exit=False,  # it would wait for a collector that is away
        )
        self.provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
        self._tracer = self.provider.get_tracer("cognateforge")
        self._attach, self._into, self._server = context.attach, trace.set_span_in_context, trace.SpanKind.SERVER
        self._untraced = context.set_value(UNTRACED, True, context.Context())

    def install(self) -> None:
        """Make this the tracer of the whole process, whose clients then make spans of their calls."""
        from opentelemetry import trace

        trace.set_tracer_provider(self.provider)

    def begin_call(self, method: str, parent: TraceContext | None) -> tuple[Span | None, TraceContext | None]:
        """Begin the span of a call that this server serves, and make it the current one. method: "Service/Method".

        Returns it and its place in the trace. The caller decides whether its trace is kept. A call without one is
        drawn, and one that starts a job is kept, as its trace is the job's. One that is not kept has no span, and
        without a caller's trace no place in any: making up both takes a twentieth of a short call.
        """
        if parent is None:
            drawn = random.random() < self._ratio  # noqa: S311 - no secret
            if not drawn and _attributes(method)["rpc.method"] not in _STARTS:
                self._attach(self._untraced)
                return None, None
        elif not parent.sampled:
            self._attach(_context_of(parent))
            return None, parent
        span: Span = self._tracer.start_span(
            method, context=_context_of(parent), kind=self._server, attributes=_attributes(method)
        )
        self._attach(self._into(span))
        return span, place_of(span)

    @contextlib.contextmanager
    def span(self, name: str, parent: TraceContext | None = None, **attributes: Any) -> Iterator[Span]:
        """Make a span of the body, below `parent` or the current span. An exception marks it as failed."""
        context = None if parent is None else _context_of(parent)
        with self._tracer.start_as_current_span(name, context=context, attributes=attributes) as span:
            yield span

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send what is left, for so long at most."""
        within(timeout_s, self.provider.shutdown)


def end_call(span: Span, status: int, outcome: str) -> None:
    """End the span of a call. status: the number of its gRPC status. outcome: OK, or the error's reason."""
    if span.is_recording():
        span.set_attribute("rpc.grpc.status_code", status)
        if outcome != "OK":
            span.set_attribute("forge.reason", outcome)
            # As OpenTelemetry has it, an error of the server is one; a refused request is none.
            if status in _SERVER_ERRORS:
                mark_failed(span, outcome)
    span.end()


# UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS
_SERVER_ERRORS = frozenset({2, 4, 12, 13, 14, 15})


def mark_failed(span: Span, reason: str) -> None:
    """Mark a span that has not ended as failed."""
    from opentelemetry import trace

    span.set_attribute("forge.reason", reason)
    span.set_status(trace.StatusCode.ERROR, reason)


def place_of(span: Span) -> TraceContext | None:
    """Return where a span stands; None for one that is of no trace."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)


def resource(service: str, instance: str) -> Any:
    """Return who it is that tells, in OpenTelemetry's words."""
    from opentelemetry.sdk.resources import Resource

    return Resource.create(
        {
            "service.name": service,
            "service.namespace": "cognateforge",
            "service.instance.id": instance,
            "service.version": release_of(service.removesuffix("-worker")),
        }
    )


def within(timeout_s: float, work: Any) -> bool:
    """Do some work for so long at most, and return whether it has ended. What goes on then holds no process."""
    thread = threading.Thread(target=work, name="telemetry-flush", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        log.warning("telemetry not flushed", timeout_s=timeout_s)
    return not thread.is_alive()


@functools.cache
def _attributes(method: str) -> Mapping[str, str]:
    service, _, name = method.partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _context_of(parent: TraceContext | None) -> Any:
    from opentelemetry import trace
    from opentelemetry.context import Context

    if parent is None:
        return Context()
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT)
    place = trace.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(place), Context())


def _sampler(ratio: float) -> Any:
    """Return a sampler that follows the decision of the span above, and where there is none takes a share.

    Always taken are calls that are served, which `begin_call` has drawn, and an attempt at a job without a trace.
    """
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
    from opentelemetry.trace import SpanKind

    share = TraceIdRatioBased(ratio)

    class Starts(Sampler):
        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Any = None,
            trace_state: Any = None,
        ) -> SamplingResult:
            chosen = ALWAYS_ON if kind is SpanKind.SERVER or "forge.attempt" in (attributes or {}) else share
            return chosen.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

        def get_description(self) -> str:
            return f"CallsAndAttemptsAnd{share.get_description()}"

    return ParentBased(Starts())
