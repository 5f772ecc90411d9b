"""Which trace the work at hand is part of: W3C's trace context, as it stands in metadata, in rows and in logs.

Nothing here needs OpenTelemetry. A service that exports no traces still keeps the ids that its callers bring, so that
jobs and logs name them.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

# The key of W3C's header, which is that of the metadata too.
TRACEPARENT = "traceparent"
# Version 00, which later versions must remain readable as. Ids of zeros are none.
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 1


@dataclass(frozen=True)
class TraceContext:
    """A place in a trace. sampled: whether the trace is kept."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


def parse(text: str) -> TraceContext | None:
    """Return the place that a traceparent names, or None for what is none."""
    found = _FORM.fullmatch(text)
    return TraceContext(found[1], found[2], bool(int(found[3], 16) & _SAMPLED)) if found else None


def trace_id_of(traceparent: str) -> str:
    """Return a traceparent's trace, 32 hexadecimal digits, or nothing."""
    found = parse(traceparent)
    return found.trace_id if found else ""


_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def current() -> TraceContext | None:
    """Return the place in a trace of the call that is being served, or None."""
    return _current.get()


def set_current(context: TraceContext | None) -> None:
    """Make a place the one of the call that is being served."""
    _current.set(context)
