"""What a server counts while it works: its calls, its writes, and the events of jobs as it sees them.

Every server has a registry of its own, so several in one process do not share figures. Series that are used at every
call are looked up once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from cognateforge.errors.v1 import reasons_pb2
from training_common.telemetry.catalog import BY_NAME

# A call that reads a row takes about a millisecond, one that waits for the disk's flush or for the store's lock tens to
# hundreds. The client library's default deadline is 10 s.
RPC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# From a flush of a fast disk to SQLite's patience of a minute, at whose end a write fails.
WRITE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0)
# From the scheduler's next look to days in a queue.
QUEUE_BUCKETS_S = (0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 259_200.0)
K = TypeVar("K", bound=Counter | Gauge)


class Instruments:
    """The counters and histograms of one server.

    methods: full names of the RPCs, as "package.Service/Method"; streams: those of them that answer by a stream.
    """

    def __init__(
        self,
        service: str,
        *,
        methods: Iterable[str],
        streams: Iterable[str],
    ) -> None:
        self.registry = CollectorRegistry()
        self._service = service
        self._calls = self._make(Counter, "forge_rpc_calls_total")
        self._errors = self._make(Counter, "forge_rpc_errors_total")
        self._open = self._make(Gauge, "forge_rpc_open_streams")
        self._fetched = self._make(Counter, "forge_fetched_bytes_total")
        self._durations = self._histogram("forge_rpc_duration_seconds", RPC_BUCKETS_S)
        self._writes = self._histogram("forge_store_write_seconds", WRITE_BUCKETS_S).labels(service)
        self._queue_wait = self._histogram("forge_queue_wait_seconds", QUEUE_BUCKETS_S).labels(service)
        self._ended = self._make(Counter, "forge_jobs_ended_total")
        self._lost = self._make(Counter, "forge_attempts_lost_total").labels(service)
        self._recoveries = self._make(Counter, "forge_recovery_actions_total")
        self._by_outcome: dict[tuple[str, str], Counter] = {}
        self._by_method: dict[str, Histogram] = {}
        self.store_takes_writes = True
        self._begin_at_zero(methods, frozenset(streams))

    def _begin_at_zero(self, methods: Iterable[str], streaming: frozenset[str]) -> None:
        """Make series that stand at 0: of one that appears with a 1, no increase would be seen."""
        for method in methods:
            self._call(method, "OK")
            if method in streaming:
                self._open.labels(self._service, method)
        for state in ("SUCCEEDED", "CANCELLED"):
            self._ended.labels(self._service, state, "")
        for reason in reasons_pb2.Reason.keys()[1:]:
            self._ended.labels(self._service, "FAILED", reason.removeprefix("REASON_"))

    def expect_recoveries(self, recoveries: Iterable[tuple[str, str]]) -> None:
        """Let what a recovery manager may do stand at 0. recoveries: pairs of detector and action."""
        for detector, action in recoveries:
            self._recoveries.labels(self._service, detector, action)

    def call_ended(self, method: str, code: str, reason: str, seconds: float, trace_id: str, *, unary: bool) -> None:
        """Count a call. reason: of its error, or nothing. trace_id: of a trace that is kept, or nothing."""
        counter = self._by_outcome.get((method, code))
        (counter if counter is not None else self._call(method, code)).inc()
        if reason:
            self._errors.labels(self._service, method, reason).inc()
        if unary:
            histogram = self._by_method.get(method)
            exemplar = {"trace_id": trace_id} if trace_id else None
            (histogram if histogram is not None else self._duration(method)).observe(seconds, exemplar)

    def _call(self, method: str, code: str) -> Counter:
        counter = self._by_outcome[method, code] = self._calls.labels(self._service, method, code)
        return counter

    def _duration(self, method: str) -> Histogram:
        histogram = self._by_method[method] = self._durations.labels(self._service, method)
        return histogram

    def stream_opened(self, method: str) -> Gauge:
        """Count a stream as open, and return the gauge to lower when it has ended."""
        gauge = self._open.labels(self._service, method)
        gauge.inc()
        return gauge

    def sender(self, method: str) -> Counter:
        """Return the counter of the bytes that a method sends."""
        return self._fetched.labels(self._service, method)

    def write_ended(self, seconds: float, taken: bool) -> None:
        """Count a write transaction. taken: False when the store was away, full or busy for too long."""
        self.store_takes_writes = taken
        if taken:
            self._writes.observe(seconds)

    def job_ended(self, state: str, reason: str) -> None:
        """Count a job that has reached its last state."""
        self._ended.labels(self._service, state, reason).inc()

    def attempt_lost(self) -> None:
        """Count an attempt whose worker was lost."""
        self._lost.inc()

    def recovered(self, detector: str, action: str) -> None:
        """Count an action of a recovery manager."""
        self._recoveries.labels(self._service, detector, action).inc()

    def queue_left(self, seconds: float) -> None:
        """Count a job that got its first worker."""
        self._queue_wait.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield the families as they stand, without the times at which their series were made."""
        for family in self.registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def _make(self, kind: type[K], name: str) -> K:
        metric = BY_NAME[name]
        return kind(name, metric.description, ["service", *metric.labels], registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        metric = BY_NAME[name]
        labels = ["service", *metric.labels]
        return Histogram(name, metric.description, labels, registry=self.registry, buckets=buckets)
