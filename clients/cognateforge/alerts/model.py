"""What an alert is, and the kinds that can be told from the contract alone."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


class Severity(enum.StrEnum):
    """Who should look: `critical` somebody now, `warning` somebody today."""

    CRITICAL = "critical"
    WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of alert.

    hold_s: a condition must hold for so long before somebody is told, like `for` of a Prometheus rule.
    """

    name: str
    severity: Severity
    hold_s: float = 0.0

    @property
    def runbook(self) -> str:
        """Path of its page in this repository."""
        return f"docs/runbooks/{self.name}.md"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that is wrong now.

    service: "cognate" or "agent". labels: what tells it from others of its name, for instance `job`. summary: for
    people, one sentence. runbook: a path in this repository. since: from when on, as far as that is known, in UTC.
    """

    name: str
    severity: Severity
    service: str
    labels: Mapping[str, str] = field(default_factory=dict)
    summary: str
    runbook: str
    since: datetime

    @property
    def key(self) -> str:
        """What two looks at the same trouble have in common."""
        told = ",".join(f"{name}={value}" for name, value in sorted(self.labels.items()))
        return f"{self.name}{{service={self.service}{',' if told else ''}{told}}}"


# Recovery managers' detectors, of both services.
DETECTORS: Mapping[str, str] = {
    "not_finite": "ForgeNotFinite",
    "loss_trend": "ForgeLossTrend",
    "slow_gradient": "ForgeSlowGradient",
    "memory_overflow": "ForgeMemoryOverflow",
    "halting_collapse": "ForgeHaltingCollapse",
    "read_collapse": "ForgeReadCollapse",
    "reasoning_loss": "ForgeReasoningLoss",
    "violations": "ForgeViolations",
    "validation": "ForgeValidationWorse",
    "version_skew": "ForgeTeamOutOfStep",
    "drift": "ForgeTeamOutOfStep",
}

_CRITICAL, _WARNING = Severity.CRITICAL, Severity.WARNING
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        # A minute: a restart in order takes less.
        Kind(name="ForgeServiceDown", severity=_CRITICAL, hold_s=60),
        Kind(name="ForgeNotServing", severity=_CRITICAL, hold_s=60),
        Kind(name="ForgeCircuitOpen", severity=_WARNING, hold_s=120),
        Kind(name="ForgeArtifactsDamaged", severity=_CRITICAL),
        Kind(name="ForgeTrainingDiverged", severity=_CRITICAL),
        Kind(name="ForgeRetryBudgetSpent", severity=_CRITICAL),
        Kind(name="ForgeJobFailed", severity=_WARNING),
        Kind(name="ForgeJobsUnobserved", severity=_WARNING, hold_s=300),
        Kind(name="ForgeJobStalled", severity=_WARNING),
        Kind(name="ForgeQueueWait", severity=_WARNING),
        Kind(name="ForgeWorkersDoNotStart", severity=_CRITICAL, hold_s=120),
        Kind(name="ForgeCapacityNotReturned", severity=_WARNING, hold_s=600),
        *(Kind(name=name, severity=_WARNING) for name in dict.fromkeys(DETECTORS.values())),
    )
}
