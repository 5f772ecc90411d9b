"""What a metric is: a unit and a definition. Each service has one table of its own metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric's unit and definition."""

    unit: str
    definition: str
