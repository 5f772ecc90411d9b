"""Agents that are out of step with each other, and the way back: all of them from one checkpoint.

Agents that learn together are part of each other's environment. Two numbers tell that they no longer learn together:

    version_skew    updates that the agent with the most has had, less those of the agent with the fewest. Above 0,
                    somebody acts by a policy that the others' experience is not of.
    drift           KL(old || new), in nats, of the agent whose policy an update moved most. Too much is what is both
                    above a bound and above a multiple of the others' median: the others learnt from a teammate that is
                    no longer there (Foerster et al. 2017, arXiv:1702.08887).

The answer is the same: every agent's policy, optimizer, episodes and random numbers go back to one checkpoint, and all
learn at half the rate from there.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_common.recovery import Change, Evidence, Finding, Ladder, RecoveryEvent, RecoveryManager, RunHistory

_RATE_FACTOR = 0.5
# Of a whole job, over all its attempts: an eighth of the plan's rate hardly trains any more.
_BUDGET = 3


class Detector(enum.StrEnum):
    """How agents can be out of step, the gravest first."""

    VERSION_SKEW = "version_skew"
    DRIFT = "drift"


RESYNCHRONIZE = "resynchronize"


@dataclass(frozen=True, kw_only=True)
class TeamLimits:
    """The detectors' numbers. They are in no request; tests use others.

    drift: in nats. Updates of this method moved policies by up to 0.05 (docs/log.md); five times that is no small step.
    drift_multiple: of the others' median. stable_steps: without trouble for so long, going back has helped.
    """

    drift: float = 0.25
    drift_multiple: float = 10.0
    stable_steps: int = 1000


@dataclass(kw_only=True)
class TeamHistory(RunHistory):
    """The newest update of each agent: how many its policy has had, and how far this one moved it."""

    step: int = 0
    versions_N: tuple[int, ...] = ()
    drift_N: tuple[float, ...] = ()

    def forget_signs(self) -> None:
        """Drop what led to an action."""
        self.versions_N, self.drift_N = (), ()

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return dataclasses.asdict(self)


class TeamRecoveryManager(RecoveryManager[TeamHistory]):
    """Watches agents that learn together. Of one agent alone it never finds anything.

    rate_factor: what every learning rate of the plan is multiplied with.
    """

    def __init__(self, names: Sequence[str], limits: TeamLimits) -> None:
        ladder = Ladder(
            rungs=dict.fromkeys(Detector, (RESYNCHRONIZE,) * _BUDGET),
            budget={RESYNCHRONIZE: _BUDGET},
            budget_in_all=_BUDGET,
            stable_steps=limits.stable_steps,
        )
        super().__init__(ladder, TeamHistory())
        self._names, self.limits = tuple(names), limits
        self.rate_factor = 1.0

    def observe_update(self, step: int, versions_N: Sequence[int], drift_N: Sequence[float]) -> Finding | None:
        """Take in a finished update and return the gravest trouble that is seen after it."""
        self.history = TeamHistory(step=step, versions_N=tuple(versions_N), drift_N=tuple(drift_N))
        return self._look() if len(self._names) > 1 else None

    def resynchronized(self, finding: Finding) -> RecoveryEvent:
        """Book that all agents went back to one checkpoint: from now on they learn at half the rate."""
        before = self.rate_factor
        self.rate_factor *= _RATE_FACTOR
        change = Change(before={"rate_factor": before}, after={"rate_factor": self.rate_factor})
        return self.record(finding, RESYNCHRONIZE, change)

    def _evidence(self) -> Iterator[tuple[str, Evidence | None]]:
        yield Detector.VERSION_SKEW, self._skew()
        yield Detector.DRIFT, self._drift()

    def _skew(self) -> Evidence | None:
        versions = self.history.versions_N
        skew = max(versions) - min(versions)
        return {"agent": self._names[versions.index(min(versions))], "version_skew": skew, "limit": 0} if skew else None

    def _drift(self) -> Evidence | None:
        drifts = [drift if math.isfinite(drift) else math.inf for drift in self.history.drift_N]
        farthest = max(drifts)
        agent = drifts.index(farthest)
        others = statistics.median(drifts[:agent] + drifts[agent + 1 :])
        limit = max(self.limits.drift, self.limits.drift_multiple * others)
        if farthest < math.inf and farthest <= limit:
            return None
        return {
            "agent": self._names[agent],
            "drift": _told(farthest),
            "of_the_others": _told(others),
            "limit": _told(limit),
        }

    def _restored(self, value: Mapping[str, Any]) -> TeamHistory:
        return TeamHistory(step=value["step"], versions_N=tuple(value["versions_N"]), drift_N=tuple(value["drift_N"]))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rate_factor": self.rate_factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rate_factor = state["rate_factor"]


def _told(value: float) -> float | str:
    return value if math.isfinite(value) else "not finite"
