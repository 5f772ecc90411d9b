"""What the interceptor tells of every call: into the metrics, and into a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from google.rpc import code_pb2

from training_common.telemetry.instruments import Instruments
from training_common.telemetry.spans import Tracer, end_call
from training_common.telemetry.traces import TraceContext

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
# The label of what is no method of the contract: anybody may call such names.
_OTHER = "other"


class CallTelemetry:
    """Counts calls and, where there is a tracer, makes their spans. Used on the event loop alone."""

    def __init__(self, instruments: Instruments, tracer: Tracer | None = None) -> None:
        self._instruments = instruments
        self.tracer = tracer

    def begin(self, method: str, parent: TraceContext | None) -> tuple[Span | None, TraceContext | None]:
        """Return a call's span, made the current one, where one is kept, and its place in a trace.

        That is the parent's where this server makes no spans.
        """
        if self.tracer is None:
            return None, parent
        return self.tracer.begin_call(method[1:], parent)

    def ended(
        self,
        method: str,
        outcome: str,
        status: int | None,
        seconds: float,
        span: Span | None,
        place: TraceContext | None,
        *,
        unary: bool,
        known: bool,
    ) -> None:
        """Count a call that has ended. outcome: OK, CANCELLED or a reason, which has a status."""
        if status is None:
            status = code_pb2.CANCELLED if outcome == "CANCELLED" else code_pb2.OK
            reason = ""
        else:
            reason = outcome
        trace_id = place.trace_id if place is not None and place.sampled else ""
        name = method[1:] if known else _OTHER
        self._instruments.call_ended(name, _NAMES[status], reason, seconds, trace_id, unary=unary)
        if span is not None:
            end_call(span, status, outcome)

    def stream_opened(self, method: str) -> Callable[[], None]:
        """Count a stream as open, and return what to call when it has ended."""
        gauge = self._instruments.stream_opened(method[1:])
        return gauge.dec
