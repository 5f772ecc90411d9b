"""Pretraining's recovery manager (`training_common.recovery`): its detectors' ladders and their budget."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cognate_server.detectors import DETECTORS, Detector, History, Measurement, RecoveryLimits
from training_common.recovery import Evidence, Finding, Ladder, RecoveryManager


class Action(enum.StrEnum):
    """What may be done. Each has bounds of its own, where it is applied."""

    SKIP_BATCH = "skip_batch"
    LOWER_LAMBDA = "lower_lambda"
    ROLL_BACK = "roll_back"
    ADJUST_PONDERING = "adjust_pondering"
    RESET_MEMORY = "reset_memory"
    # A matter of quality that no action has mended: training goes on, and the gate judges the model.
    LEAVE_TO_GATE = "leave_to_gate"


# The mildest action first; the next one when the same trouble comes again before training was stable.
LADDER: Mapping[str, Sequence[str]] = {
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
BUDGET: Mapping[str, int] = {
    Action.SKIP_BATCH: 10,
    Action.LOWER_LAMBDA: 4,
    Action.ROLL_BACK: 3,
    Action.ADJUST_PONDERING: 4,
    Action.RESET_MEMORY: 4,
}
BUDGET_IN_ALL = 16


class CognateRecoveryManager(RecoveryManager[History]):
    """Watches a pretraining run."""

    def __init__(self, limits: RecoveryLimits) -> None:
        ladder = Ladder(rungs=LADDER, budget=BUDGET, budget_in_all=BUDGET_IN_ALL, stable_steps=limits.stable_steps)
        super().__init__(ladder, History())
        self.limits = limits

    def measures(self, step: int) -> bool:
        """Whether the step that will be finished as number `step` must be measured. No setting of a plan moves it."""
        return step % self.limits.measure_interval_steps == 0

    def observe_step(self, step: int, loss: float, measurement: Measurement | None) -> Finding | None:
        """Take in a finished step and return the gravest trouble that is seen after it."""
        self.history.step, self.history.not_finite = step, ""
        self.begin_ladder(Detector.NOT_FINITE)  # trouble in a row is what climbs this one
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

    def _evidence(self) -> Iterator[tuple[str, Evidence | None]]:
        return ((detector, look(self.history, self.limits)) for detector, look in DETECTORS.items())

    def _restored(self, value: Mapping[str, Any]) -> History:
        return History.from_json(value)

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

    def restarted_slow_gradient(self) -> None:
        """Say that the EMA starts anew, so that its ratio means nothing for a while."""
        self.history.slow_gradient_start = self.history.step
