"""The exposition's own families, sent to an OTLP collector: what Prometheus reads and what is sent cannot differ."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any, cast

import structlog
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample

from training_common.settings import TelemetrySettings
from training_common.telemetry.spans import EXPORT_TIMEOUT_S, FLUSH_S, resource, within

log = structlog.get_logger(__name__)

_CUMULATIVE = AggregationTemporality.CUMULATIVE
_UNITS = {"seconds": "s", "bytes": "By"}


def metrics_data(families: Iterable[Family], *, about: Any, start_ns: int, now_ns: int) -> MetricsData:
    """Return families as what OTLP sends. about: the resource. start_ns: since when counters count."""
    metrics = [metric for family in families if (metric := _metric(family, start_ns, now_ns)) is not None]
    scope = ScopeMetrics(
        scope=InstrumentationScope("cognateforge", version("cognateforge-common")), metrics=metrics, schema_url=""
    )
    return MetricsData(resource_metrics=[ResourceMetrics(resource=about, scope_metrics=[scope], schema_url="")])


def _metric(family: Family, start_ns: int, now_ns: int) -> Metric | None:
    if not family.samples:
        return None
    data: Sum | Gauge | Histogram
    if family.type == "histogram":
        data = Histogram(data_points=_histograms(family.samples, start_ns, now_ns), aggregation_temporality=_CUMULATIVE)
    elif family.type == "counter":
        points = _numbers(family.samples, start_ns, now_ns)
        data = Sum(data_points=points, aggregation_temporality=_CUMULATIVE, is_monotonic=True)
    else:
        data = Gauge(data_points=_numbers(family.samples, 0, now_ns))
    # Prometheus's name of a counter has its ending back.
    name = f"{family.name}_total" if family.type == "counter" else family.name
    unit = next((unit for word, unit in _UNITS.items() if word in family.name.split("_")), "1")
    return Metric(name=name, description=family.documentation, unit=unit, data=data)


def _numbers(samples: Sequence[Sample], start_ns: int, now_ns: int) -> list[NumberDataPoint]:
    return [
        NumberDataPoint(
            attributes=dict(sample.labels), start_time_unix_nano=start_ns, time_unix_nano=now_ns, value=sample.value
        )
        for sample in samples
    ]


def _histograms(samples: Sequence[Sample], start_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = defaultdict(list)
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets[labels].append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    points = []
    for labels, cumulated in buckets.items():
        cumulated.sort()
        counts = [int(count) for _, count in cumulated]
        points.append(
            HistogramDataPoint(
                attributes=dict(labels),
                start_time_unix_nano=start_ns,
                time_unix_nano=now_ns,
                count=counts[-1],
                sum=sums.get(labels, 0.0),
                # Prometheus's buckets hold those below them as well.
                bucket_counts=[count - before for before, count in zip([0, *counts], counts, strict=False)],
                explicit_bounds=[bound for bound, _ in cumulated if math.isfinite(bound)],
                # Not known. The encoder leaves out what is None.
                min=cast("float", None),
                max=cast("float", None),
            )
        )
    return points


async def send_forever(
    settings: TelemetrySettings,
    collect: Callable[[], Awaitable[list[Family]]],
    *,
    service: str,
    instance: str,
    exporter: MetricExporter | None = None,
) -> None:
    """Send what `collect` gives, now and then, until cancelled. A collector that is away is tried again next time."""
    exporter = exporter or OTLPMetricExporter(endpoint=settings.otlp_endpoint, timeout=EXPORT_TIMEOUT_S)
    about, start_ns = resource(service, instance), time.time_ns()
    try:
        while True:
            try:
                found = metrics_data(await collect(), about=about, start_ns=start_ns, now_ns=time.time_ns())
                if await asyncio.to_thread(exporter.export, found) is not MetricExportResult.SUCCESS:
                    log.warning("metrics not sent", endpoint=settings.otlp_endpoint)
            except Exception as error:  # the next export tells more
                log.warning("metrics not sent", endpoint=settings.otlp_endpoint, error=type(error).__name__)
            await asyncio.sleep(settings.otlp_interval_s)
    finally:
        within(FLUSH_S, exporter.shutdown)
