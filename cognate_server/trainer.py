"""Pretraining: from a config, a token stream and an attempt to a model folder and what was measured about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cognate_server.acceleration import AccelerationReport
from cognate_server.actions import apply, go_back_to_mandate
from cognate_server.flops import peak_flops_per_s
from cognate_server.grokfast import GrokFastDiverged, LambdaDeparture
from cognate_server.metrics import checked
from cognate_server.precision import Precision
from cognate_server.recovery import QUALITY, Action
from cognate_server.run import (
    CheckpointMismatchError,
    PretrainConfig,
    PretrainingRun,
    TrainingDivergedError,
    learning_rate,
)
from cognate_server.stream import TokenStream
from cognate_server.tracker import CognateProgressTracker, StepOutcome, measurement, validation_metrics
from cognate_server.validation import ValidationReport, first_rows, row_losses, validate
from training_common.attempt import Attempt, AttemptStopped, Json
from training_common.models.cognate_v1 import CognateV1, CognateV1Config, Operations, config_to_json, save_state
from training_common.recovery import Change, Finding, RecoveryEvent
from training_common.team import ALONE, Team

__all__ = [
    "CheckpointMismatchError",
    "PretrainConfig",
    "PretrainResult",
    "PretrainingRun",
    "TrainingDivergedError",
    "learning_rate",
    "pretrain",
]

# Measures how well a model reasons: the share of right answers, and of how many rows.
Scorer = Callable[[CognateV1], tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A finished run.

    model_dir: holds model.safetensors and config.json.
    first_loss, last_loss: training loss, mean over the first and the last ten steps.
    lambda_departures: every change of GrokFast's lambda. recovery: every action of the recovery manager.
    acceleration: against the control, where there was one and both learnt.
    optimizer_implementations: what computed the optimizer's steps, one after the other.
    """

    step: int
    model_dir: Path
    config: CognateV1Config
    precision: Precision
    parameters: int
    first_loss: float
    last_loss: float
    validation: ValidationReport
    lambda_departures: tuple[LambdaDeparture, ...]
    recovery: tuple[RecoveryEvent, ...] = ()
    acceleration: AccelerationReport | None = None
    optimizer_implementations: tuple[str, ...] = ()


def pretrain(
    config: PretrainConfig,
    data: TokenStream | None,
    attempt: Attempt,
    *,
    score: Scorer | None = None,
    team: Team = ALONE,
) -> PretrainResult:
    """Train from random values, or go on from the attempt's newest checkpoint, to the end of the plan.

    A resumed run is bitwise equal to an uninterrupted one on the same hardware with the same number of threads, and so
    are its recoveries.

    data: read by the team's first process alone. attempt: a `TeamAttempt` where there are others.
    score: asked at validations before the end, as `score_interval_steps` says; None: no reasoning is measured.
    Errors: AttemptStopped, when the job's owner asked for it: after PAUSE there is a checkpoint of the last finished
        step, after CANCEL and REVOKED nothing more was written. TrainingDivergedError, with the evidence, when
        recoveries did not help. CheckpointMismatchError, ConstructionError. PartDone, after the last step on processes
        that are not the first; TeamBrokenError.
    """
    return _Pretraining(config, data, attempt, score, team).to_the_end()


class _Pretraining:
    """The loop around a run: what its job wishes, is told and keeps."""

    def __init__(
        self, config: PretrainConfig, data: TokenStream | None, attempt: Attempt, score: Scorer | None, team: Team
    ) -> None:
        self.config, self.attempt, self.score, self.team = config, attempt, score, team
        self.run = PretrainingRun(config, data, team)
        checkpoint = attempt.latest_checkpoint()
        self.saved_step = -1
        if checkpoint is not None:
            self.run.restore(checkpoint.path)
            self.saved_step = self.run.step
        self.validation_batches = [] if data is None else first_rows(data.validation_batches(), config.validation_rows)
        self.tracker = CognateProgressTracker(
            config.model,
            total_steps=config.total_steps,
            batch_tokens=config.batch_tokens,
            step=self.run.step,
            peak_flops_per_s=team.size * peak_flops_per_s("cpu", config.precision.dtype),
        )

    def to_the_end(self) -> PretrainResult:
        while self.run.step < self.config.total_steps:
            self._obey()
            self._take_step()
            self._return_when_stable()
            is_last = self.run.step == self.config.total_steps
            interval = self.config.validation_interval_steps
            if interval and self.run.step % interval == 0 and not is_last:
                self._validate()  # before the checkpoint, which holds what followed from it
            if self.run.step % self.config.checkpoint_interval_steps == 0 or is_last:
                self.saved_step = self.run.save(self.attempt, planned=True)
        self._obey()
        return self._finish()

    def _obey(self) -> None:
        """Raise AttemptStopped if the attempt is to end."""
        kind = self.attempt.stop_requested()
        if kind is None:
            return
        if kind.saves and self.run.step != self.saved_step:
            self.run.save(self.attempt, planned=False)
        raise AttemptStopped(kind)

    def _take_step(self) -> None:
        number = self.run.step + 1
        reports = number % self.config.progress_interval_steps == 0 or number in (1, self.config.total_steps)
        measures = self.run.recovery.measures(number)
        lr = self.run.next_lr
        try:
            outcome = self.run.train_step(measure=reports or measures)
        except (TrainingDivergedError, GrokFastDiverged) as error:
            self.run.pass_over()
            self._recover(self.run.recovery.observe_not_finite(self.run.step, str(error)))
            return
        self.tracker.count(outcome)
        report = self.run.optimizer.report
        ratio = None if report is None else report.slow_gradient_norm_ratio
        if ratio is not None and not math.isfinite(ratio):
            self._recover(self.run.recovery.observe_not_finite(self.run.step, f"the EMA's norm ratio is {ratio}"))
            return
        if reports:
            self._report(self.tracker.step_metrics(outcome, report, step=self.run.step, learning_rate=lr))
        self._observe(outcome, measures=measures)

    def _observe(self, outcome: StepOutcome, *, measures: bool) -> None:
        """Show a finished step to the recovery manager."""
        run = self.run
        seen = measurement(outcome, run.optimizer.report, self.config.model) if measures else None
        self._recover(run.recovery.observe_step(run.step, outcome.loss, seen))

    def _validate(self) -> None:
        """Validate between steps: the loss, and the score where there is a scorer."""
        model = self.run.whole_model()

        def measure() -> tuple[float, float | None, list[float]]:
            loss = row_losses(model, self.validation_batches).mean
            score = self.score(model) if self.score is not None and self._score_is_due() else ()
            return loss, self._validate_control(loss), list(score)

        loss, control, score = self.team.agree(measure)
        self.run.validation_loss = loss
        self._report({"validation_loss": loss, "control_validation_loss": control})
        self._recover(self.run.recovery.observe_validation(loss, (score[0], int(score[1])) if score else None))

    def _score_is_due(self) -> bool:
        """Whether this is the first validation at or after a multiple of the scores' interval.

        A matter of the step alone, so that a resumed run asks at the same ones.
        """
        validates, scores = self.config.validation_interval_steps, self.config.score_interval_steps
        return scores is None or validates is None or self.run.step // scores > (self.run.step - validates) // scores

    def _validate_control(self, loss: float) -> float | None:
        control = self.run.control
        return None if control is None else control.validate(self.run.step, loss, self.validation_batches)

    def _recover(self, finding: Finding | None) -> None:
        """Apply the first action that is left and possible.

        Errors: TrainingDivergedError, with the evidence, when there is none and the trouble is not the gate's matter.
        """
        if finding is None:
            return
        manager = self.run.recovery
        for action in manager.choices(finding):
            change = apply(Action(action), self.run, finding)
            if change is not None:
                self._tell(manager.record(finding, action, change))
                return
        if finding.detector not in QUALITY:
            raise TrainingDivergedError(
                f"{finding.detector} at step {self.run.step} ({finding.text}); {len(manager.events)} recovery "
                "actions were taken and none is left for it"
            )
        self._tell(manager.record(finding, Action.LEAVE_TO_GATE, Change(before={}, after={})))

    def _return_when_stable(self) -> None:
        """Undo what a recovery changed once training has been stable for long enough."""
        manager = self.run.recovery
        if not manager.stable:
            return
        change = go_back_to_mandate(self.run)
        if change is None:
            manager.start_anew()
        else:
            self._tell(manager.record_return(change))

    def _tell(self, event: RecoveryEvent) -> None:
        self.attempt.event("recovery", event.payload())

    def _report(self, metrics: dict[str, Json]) -> None:
        self.attempt.progress(step=self.run.step, total_steps=self.config.total_steps, metrics=checked(metrics))

    def _finish(self) -> PretrainResult:
        """Validate, write the model folder and sum the run up."""
        run, attempt = self.run, self.attempt
        model = run.whole_model()
        model.compute_with(Operations())  # what is published is judged as everybody else computes it
        attempt.trained()
        report = validate(model, self.validation_batches, run.unigram_counts_V)
        control_loss = self._validate_control(report.loss)
        acceleration = None if run.control is None else run.control.report(report.unigram_loss)
        self._report(
            {
                **validation_metrics(report),
                "control_validation_loss": control_loss,
                "acceleration_factor": None if acceleration is None else acceleration.factor,
            }
        )
        model_dir = attempt.workdir / "final"
        model_dir.mkdir(parents=True, exist_ok=True)
        save_state(model, model_dir / "model.safetensors")
        (model_dir / "config.json").write_text(json.dumps(config_to_json(run.config.model), indent=2) + "\n")
        return PretrainResult(
            step=run.step,
            model_dir=model_dir,
            config=run.config.model,
            precision=run.config.precision,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            first_loss=sum(run.first_losses) / len(run.first_losses),
            last_loss=sum(run.last_losses) / len(run.last_losses),
            validation=report,
            lambda_departures=run.optimizer.departures,
            recovery=run.recovery.events,
            acceleration=acceleration,
            optimizer_implementations=run.optimizer.implementations,
        )
