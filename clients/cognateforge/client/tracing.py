"""Spans of a client's calls, and the trace context that goes with them: where the program itself uses OpenTelemetry.

Nothing is imported for it. A program that has configured a tracer provider has imported its interface, and is found in
`sys.modules`; any other one pays a look into a dictionary.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc

from cognateforge.untraced import UNTRACED

# W3C's headers, which are the keys of the metadata too.
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
Header = tuple[str, str]


class CallSpan:
    """The span of one call. It ends once, however often that is told."""

    def __init__(self, trace: Any, span: Any) -> None:
        self._trace = trace
        self._span = span

    def headers(self) -> tuple[Header, ...]:
        """Return the metadata that lets the server go on with the trace; none where there is no trace."""
        place = self._span.get_span_context()
        if not place.is_valid:
            return ()
        own = (TRACEPARENT, f"00-{place.trace_id:032x}-{place.span_id:016x}-{int(place.trace_flags):02x}")
        state = place.trace_state.to_header()
        return (own, (TRACESTATE, state)) if state else (own,)

    def end(self, status: grpc.StatusCode) -> None:
        """End the span with the call's status. CANCELLED, by this side, is no error."""
        if not self._span.is_recording():
            return
        self._span.set_attribute("rpc.grpc.status_code", status.value[0])
        if status not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            self._span.set_status(self._trace.StatusCode.ERROR, status.name)
        self._span.end()


def begin(method: str) -> CallSpan | None:
    """Begin the span of a call, below the program's current one.

    None where the program does not use OpenTelemetry, and where what it is at is not traced.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or sys.modules["opentelemetry.context"].get_value(UNTRACED):
        return None
    name = method.removeprefix("/")
    service, _, call = name.partition("/")
    span = trace.get_tracer("cognateforge.client").start_span(
        name,
        kind=trace.SpanKind.CLIENT,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": call},
    )
    return CallSpan(trace, span)
