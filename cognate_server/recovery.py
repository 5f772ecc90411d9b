"""The recovery manager: from trouble in training to a bounded action, with everything on record.

ADR 0007. Detectors tell what is wrong (`cognate_server.detectors`), LADDER what is done about it, the budget how often.
The trainer applies an action; what it changed comes back here, and goes into the job's events, the checkpoint and the
model's manifest.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cognate_server.detectors import DETECTORS, Detector, Evidence, History, Measurement, RecoveryLimits
from training_common.attempt import Json


class Action(enum.StrEnum):
    """What may be done. Each has bounds of its own, where it is applied."""

    SKIP_BATCH = "skip_batch"
    LOWER_LAMBDA = "lower_lambda"
    ROLL_BACK = "roll_back"
    ADJUST_PONDERING = "adjust_pondering"
    RESET_MEMORY = "reset_memory"
    # Back to the mandated lambda and ponder weight. It costs no budget.
    RETURN = "return"
    # A matter of quality that no action has mended: training goes on, and the gate judges the model.
    LEAVE_TO_GATE = "leave_to_gate"


# The mildest action first; the next one when the same trouble comes again before training was stable.
LADDER: Mapping[Detector, tuple[Action, ...]] = {
    # Twice: one bad batch may be followed by its neighbour. Three in a row are not the data's fault.
    Detector.NOT_FINITE: (Action.SKIP_BATCH, Action.SKIP_BATCH, Action.ROLL_BACK, Action.ROLL_BACK),
    Detector.LOSS_TREND: (Action.LOWER_LAMBDA, Action.ROLL_BACK, Action.ROLL_BACK, Action.ROLL_BACK),
    Detector.SLOW_GRADIENT: (Action.LOWER_LAMBDA, Action.LOWER_LAMBDA, Action.ROLL_BACK),
    # What slots hold is a function of the weights, and the next chunks bring it back: emptying them would not help.
    Detector.MEMORY_OVERFLOW: (Action.ROLL_BACK, Action.ROLL_BACK),
    Detector.HALTING_COLLAPSE: (Action.ADJUST_PONDERING,) * 3,
    Detector.READ_COLLAPSE: (Action.RESET_MEMORY, Action.RESET_MEMORY, Action.ROLL_BACK),
    Detector.REASONING_LOSS: (Action.ROLL_BACK,),
}
# These make a model worse, not void: the gate makes it EXPERIMENTAL, so the job need not fail.
QUALITY = (Detector.HALTING_COLLAPSE, Detector.READ_COLLAPSE, Detector.REASONING_LOSS)

# Of a whole job, over all its attempts. A run that needs more is another run than the one that was asked for.
BUDGET: Mapping[Action, int] = {
    Action.SKIP_BATCH: 10,
    Action.LOWER_LAMBDA: 4,
    Action.ROLL_BACK: 3,
    Action.ADJUST_PONDERING: 4,
    Action.RESET_MEMORY: 4,
}
BUDGET_IN_ALL = 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Trouble, and the evidence for it."""

    detector: Detector
    evidence: Evidence


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


class CognateRecoveryManager:
    """Watches a run, chooses actions within the budget, and remembers them.

    Its state belongs into every checkpoint: a resumed run decides as the uninterrupted one would.
    """

    def __init__(self, limits: RecoveryLimits) -> None:
        self.limits = limits
        self.history = History()
        self._events: list[RecoveryEvent] = []
        self._spent = dict.fromkeys(BUDGET, 0)
        self._rungs = dict.fromkeys(Detector, 0)
        self._last_trouble_step = 0

    @property
    def events(self) -> tuple[RecoveryEvent, ...]:
        """Every action so far."""
        return tuple(self._events)

    def measures(self, step: int) -> bool:
        """Whether the step that will be finished as number `step` must be measured. No setting of a plan moves it."""
        return step % self.limits.measure_interval_steps == 0

    def observe_step(self, step: int, loss: float, measurement: Measurement | None) -> Finding | None:
        """Take in a finished step and return the gravest trouble that is seen after it."""
        self.history.step, self.history.not_finite = step, ""
        self._rungs[Detector.NOT_FINITE] = 0  # trouble in a row is what climbs this ladder
        self.history.add_loss(loss, self.limits)
        if measurement is not None:
            self.history.add_measurement(measurement, self.limits)
        return self._look()

    def observe_not_finite(self, step: int, found: str) -> Finding | None:
        """Take in a step that could not be taken."""
        self.history.step, self.history.not_finite = step, found
        return self._look()

    def observe_validation(self, loss: float, score: tuple[float, int] | None = None) -> Finding | None:
        """Take in a validation between steps. score: share of right answers and the number of rows it is of."""
        self.history.not_finite = ""  # of the step before, and answered
        self.history.add_validation(loss, score)
        return self._look()

    def _look(self) -> Finding | None:
        for detector, look in DETECTORS.items():
            evidence = look(self.history, self.limits)
            if evidence is None:
                continue
            self._last_trouble_step = self.history.step
            if self._rungs[detector] <= len(LADDER[detector]):
                return Finding(detector=detector, evidence=evidence)
        return None

    @property
    def healthy(self) -> bool:
        """Whether no detector sees even a first sign: weights of this moment are worth going back to.

        Before there is a whole window of losses and a measurement, nobody knows.
        """
        if len(self.history.losses) < self.limits.loss_window_steps or not self.history.measurements:
            return False
        ratio, strict = self.history.measurements[-1].slow_gradient_norm_ratio, self.limits.strict()
        if ratio is not None and ratio > strict.slow_ratio:
            return False  # its harm to the validation loss comes later
        return all(look(self.history, strict) is None for look in DETECTORS.values())

    @property
    def stable(self) -> bool:
        """Whether the last action is long enough ago to be undone."""
        return self.history.step - self._last_trouble_step >= self.limits.stable_steps

    def choices(self, finding: Finding) -> tuple[Action, ...]:
        """Return the actions that are left for this trouble, in order; none when the budget is spent."""
        ladder = LADDER[finding.detector][self._rungs[finding.detector] :]
        if sum(self._spent.values()) >= BUDGET_IN_ALL:
            return ()
        return tuple(action for action in ladder if self._spent[action] < BUDGET[action])

    def record(self, finding: Finding, action: Action, change: Change) -> RecoveryEvent:
        """Book an action that was applied."""
        ladder = LADDER[finding.detector]
        if action in BUDGET:
            self._spent[action] += 1
            rung = self._rungs[finding.detector]
            self._rungs[finding.detector] = ladder.index(action, rung) + 1
        else:
            self._rungs[finding.detector] = len(ladder) + 1  # this detector is not asked again until training is stable
        self._last_trouble_step = self.history.step
        self.history.forget_signs()
        return self._book(finding.detector, finding.evidence, action, change)

    def record_return(self, change: Change) -> RecoveryEvent:
        """Book the return to the mandated values, and let every ladder begin anew."""
        self.start_anew()
        return self._book("", {"steps_without_trouble": float(self.limits.stable_steps)}, Action.RETURN, change)

    def start_anew(self) -> None:
        """Let every ladder begin with its mildest action; for a run that is stable. The budget stays spent."""
        self._rungs = dict.fromkeys(Detector, 0)

    def restarted_slow_gradient(self) -> None:
        """Say that the EMA starts anew, so that its ratio means nothing for a while."""
        self.history.slow_gradient_start = self.history.step

    def _book(self, detector: str, evidence: Evidence, action: Action, change: Change) -> RecoveryEvent:
        event = RecoveryEvent(
            step=self.history.step,
            detector=str(detector),
            evidence=evidence,
            action=action.value,
            before=change.before,
            after=change.after,
            budget_left=BUDGET[action] - self._spent[action] if action in BUDGET else 0,
            budget_left_in_all=BUDGET_IN_ALL - sum(self._spent.values()),
        )
        self._events.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a decision depends on, as JSON."""
        return {
            "history": self.history.to_json(),
            "events": [vars(event) for event in self._events],
            "spent": dict(self._spent),
            "rungs": dict(self._rungs),
            "last_trouble_step": self._last_trouble_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.history = History.from_json(state["history"])
        self._events = [RecoveryEvent(**event) for event in state["events"]]
        self._spent = {Action(name): count for name, count in state["spent"].items()}
        self._rungs = {Detector(name): count for name, count in state["rungs"].items()}
        self._last_trouble_step = state["last_trouble_step"]
