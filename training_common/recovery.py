"""From trouble in training to a bounded action, with everything on record (ADR 0007). Each service has its own manager.

Detectors tell what is wrong, a ladder what is done about it, mildest first, a budget how often. The trainer applies an
action; what it changed comes back here, and goes into the job's events, the checkpoint and the manifest.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from training_common.attempt import Json

Evidence = dict[str, float | str]
# Back to the plan's values, once training has been stable. It costs no budget.
RETURN = "return"


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What may be done about what, and how often.

    rungs: by detector, the mildest action first; the next one when the same trouble comes again before training was
        stable. The detectors' order is that of their gravity.
    budget: of a whole job, over all its attempts, by action. An action without a budget ends its detector's ladder.
    stable_steps: without trouble for so long, an action has worked.
    """

    rungs: Mapping[str, Sequence[str]]
    budget: Mapping[str, int]
    budget_in_all: int
    stable_steps: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Trouble, and the evidence for it."""

    detector: str
    evidence: Evidence

    @property
    def text(self) -> str:
        """Return the evidence as a person reads it."""
        return ", ".join(f"{name} {value}" for name, value in self.evidence.items())


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an action changed: the parameters before and after it."""

    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RecoveryEvent:
    """One action, as it stands in the job's events and in the manifest.

    budget_left: of this action; budget_left_in_all: of all together.
    """

    step: int
    detector: str
    evidence: Evidence
    action: str
    before: dict[str, float]
    after: dict[str, float]
    budget_left: int
    budget_left_in_all: int

    def payload(self) -> dict[str, Json]:
        """Return the event's facts; nested ones as JSON text, as facts of a job's event are strings."""
        return {
            "message": f"step {self.step}: {self.detector or 'stable again'}, {self.action}",
            "step": self.step,
            "detector": self.detector,
            "evidence": json.dumps(self.evidence),
            "action": self.action,
            "before": json.dumps(self.before),
            "after": json.dumps(self.after),
            "budget_left": self.budget_left,
            "budget_left_in_all": self.budget_left_in_all,
        }


class RunHistory(abc.ABC):
    """What was observed of a run, as far back as its detectors look. step: of the newest observation."""

    step: int

    @abc.abstractmethod
    def forget_signs(self) -> None:
        """Drop what led to an action: the next one needs its whole evidence anew."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""


H = TypeVar("H", bound=RunHistory)


class RecoveryManager(abc.ABC, Generic[H]):
    """Watches a run, chooses actions within the budget, and remembers them.

    Its state belongs into every checkpoint: a resumed run decides as the uninterrupted one would.
    """

    def __init__(self, ladder: Ladder, history: H) -> None:
        self.history = history
        self._ladder = ladder
        self._events: list[RecoveryEvent] = []
        self._spent = dict.fromkeys(ladder.budget, 0)
        self._rungs = dict.fromkeys(ladder.rungs, 0)
        self._last_trouble_step = 0

    @abc.abstractmethod
    def _evidence(self) -> Iterator[tuple[str, Evidence | None]]:
        """Yield each detector with what it sees, the gravest first; None where it sees nothing."""

    @abc.abstractmethod
    def _restored(self, value: Mapping[str, Any]) -> H:
        """Return the history that `to_json` wrote."""

    @property
    def events(self) -> tuple[RecoveryEvent, ...]:
        """Every action so far."""
        return tuple(self._events)

    @property
    def stable(self) -> bool:
        """Whether the last action is long enough ago to be undone."""
        return self.history.step - self._last_trouble_step >= self._ladder.stable_steps

    def _look(self) -> Finding | None:
        for detector, evidence in self._evidence():
            if evidence is None:
                continue
            self._last_trouble_step = self.history.step
            if self._rungs[detector] <= len(self._ladder.rungs[detector]):
                return Finding(detector=detector, evidence=evidence)
        return None

    def choices(self, finding: Finding) -> tuple[str, ...]:
        """Return the actions that are left for this trouble, in order; none when the budget is spent."""
        rungs = self._ladder.rungs[finding.detector][self._rungs[finding.detector] :]
        if sum(self._spent.values()) >= self._ladder.budget_in_all:
            return ()
        return tuple(action for action in rungs if self._spent[action] < self._ladder.budget[action])

    def record(self, finding: Finding, action: str, change: Change) -> RecoveryEvent:
        """Book an action that was applied."""
        rungs = self._ladder.rungs[finding.detector]
        if action in self._ladder.budget:
            self._spent[action] += 1
            self._rungs[finding.detector] = rungs.index(action, self._rungs[finding.detector]) + 1
        else:
            self._rungs[finding.detector] = len(rungs) + 1  # not asked again until training is stable
        self._last_trouble_step = self.history.step
        self.history.forget_signs()
        return self._book(finding.detector, finding.evidence, action, change)

    def record_return(self, change: Change) -> RecoveryEvent:
        """Book the return to the plan's values, and let every ladder begin anew."""
        self.start_anew()
        return self._book("", {"steps_without_trouble": float(self._ladder.stable_steps)}, RETURN, change)

    def start_anew(self) -> None:
        """Let every ladder begin with its mildest action; for a run that is stable. The budget stays spent."""
        self._rungs = dict.fromkeys(self._ladder.rungs, 0)

    def begin_ladder(self, detector: str) -> None:
        """Let one ladder begin with its mildest action."""
        self._rungs[detector] = 0

    def _book(self, detector: str, evidence: Evidence, action: str, change: Change) -> RecoveryEvent:
        budget = self._ladder.budget
        event = RecoveryEvent(
            step=self.history.step,
            detector=str(detector),
            evidence=evidence,
            action=str(action),
            before=change.before,
            after=change.after,
            budget_left=budget[action] - self._spent[action] if action in budget else 0,
            budget_left_in_all=self._ladder.budget_in_all - sum(self._spent.values()),
        )
        self._events.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a decision depends on, as JSON."""
        return {
            "history": self.history.to_json(),
            "events": [vars(event) for event in self._events],
            "spent": {str(name): count for name, count in self._spent.items()},
            "rungs": {str(name): count for name, count in self._rungs.items()},
            "last_trouble_step": self._last_trouble_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.history = self._restored(state["history"])
        self._events = [RecoveryEvent(**event) for event in state["events"]]
        self._spent = {name: state["spent"].get(name, 0) for name in self._ladder.budget}
        self._rungs = {name: state["rungs"].get(name, 0) for name in self._ladder.rungs}
        self._last_trouble_step = state["last_trouble_step"]
