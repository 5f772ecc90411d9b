"""Alerts without Prometheus: conditions that are read through the generated clients alone (docs/alerts.md).

    alerts = await evaluate(cognate, agent)

The names are those of the rules in deploy/monitoring/prometheus, so a runbook serves both.
"""

from cognateforge.alerts.conditions import Limits
from cognateforge.alerts.evaluator import Evaluator, Look, evaluate
from cognateforge.alerts.model import KINDS, Alert, Kind, Severity

__all__ = ["KINDS", "Alert", "Evaluator", "Kind", "Limits", "Look", "Severity", "evaluate"]
