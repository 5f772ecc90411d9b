"""An OTLP collector in the test's process: it keeps the spans and metrics that arrive over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2


@dataclass(frozen=True, kw_only=True)
class SeenSpan:
    """A span that arrived. service: of the resource that sent it."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]


class OtlpSink:
    """Keeps what arrives."""

    def __init__(self) -> None:
        self.spans: list[SeenSpan] = []
        self.metrics: dict[str, metrics_pb2.Metric] = {}
        self._arrived = threading.Condition()
        self.endpoint = ""

    def until(self, wanted: Callable[[OtlpSink], bool], timeout_s: float = 60) -> None:
        """Wait until what has arrived is what is wanted."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: wanted(self), timeout_s):
                raise AssertionError(f"did not arrive: {[(span.service, span.name) for span in self.spans]}")

    def trace(self, trace_id: str) -> list[SeenSpan]:
        """Return the spans of a trace."""
        with self._arrived:
            return [span for span in self.spans if span.trace_id == trace_id]

    def take_spans(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._arrived:
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                self.spans += [_seen(service, span) for scope in resource.scope_spans for span in scope.spans]
            self._arrived.notify_all()

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._arrived:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in scope.metrics}
            self._arrived.notify_all()


def _seen(service: str, span: Any) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        failed=span.status.code == 2,
        attributes=_attributes(span.attributes),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, sink: OtlpSink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> Any:
        self._sink.take_spans(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, sink: OtlpSink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> Any:
        self._sink.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def otlp_sink(port: int = 0) -> Iterator[OtlpSink]:
    """Yield a collector that listens on a port, a free one for 0."""
    sink = OtlpSink()
    server = grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(_Traces(sink), server)
    add = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
    add(_Metrics(sink), server)
    sink.endpoint = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield sink
    finally:
        server.stop(None).wait()
