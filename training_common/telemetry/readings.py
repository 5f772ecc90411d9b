"""From single values to the families of an exposition, each as the catalogue declares it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from training_common.telemetry.catalog import BY_NAME, Kind


@dataclass(frozen=True)
class Reading:
    """One value of a counter or a gauge at this moment. labels: their values, in the catalogue's order."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


def families(service: str, readings: Iterable[Reading]) -> list[Metric]:
    """Return the families of some readings. Errors: KeyError, for a name that the catalogue lacks."""
    found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for reading in readings:
        family = found.get(reading.name)
        if family is None:
            family = found[reading.name] = _family(reading.name)
        family.add_metric([service, *reading.labels], reading.value)
    return list(found.values())


def _family(name: str) -> CounterMetricFamily | GaugeMetricFamily:
    metric = BY_NAME[name]
    labels: Sequence[str] = ["service", *metric.labels]
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    return kind(name, metric.description, labels=labels)
