"""Train an agent on rows: a base and prepared data in, a folder that is ready to publish out.

    encode -> build -> [restore] -> measure before -> steps -> measure after -> merge, checked -> export, checked

What the task asks of a model, its loss and its metrics, is an `Objective`. A run is a pure function of its
configuration, base and data. What a checkpoint holds (trained parameters, optimizer, random state, step, what
validations decided) continues it bit for bit on the same hardware and threads; the order of rows is a function of the
step, the learning rate one of the step and of validations.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from agent_server.adaptation import count_parameters
from agent_server.architectures.factory import AgentArchitecture, AgentArchitectureFactory, BuildRequest
from agent_server.architectures.model import AgentModel, require_logits
from agent_server.data.examples import PreparedData, texts_of
from agent_server.evaluation import Evaluation, measure
from agent_server.exported import PROBE_ROWS, RunFacts, write_agent
from agent_server.measurements import Measurements
from agent_server.objectives.base import Batch, Loss, Objective, sample
from agent_server.objectives.build import objective_for
from agent_server.optim import (
    PlateauState,
    Schedule,
    StoppingState,
    build_optimizer,
    computing,
    lr_factor,
    set_lr,
    warmup_steps,
)
from agent_server.recovery import Action, AgentRecoveryManager, Correction, voids
from agent_server.tracker import (
    NO_COST,
    AgentProgressTracker,
    Check,
    Cost,
    StepReport,
    generalization_gap,
)
from agent_server.train_config import AgentTrainConfig
from agent_server.training_rows import Piece, TrainingRows, pieces
from cognateforge.exceptions import (
    ArtifactCorruptError,
    DataUnavailableError,
    IncompatibleError,
    TrainingDivergedError,
)
from training_common.attempt import Attempt, AttemptStopped, CheckpointRef, Json
from training_common.good_checkpoint import GoodCheckpoint, good_of
from training_common.memory_copy import MemoryCopy
from training_common.recovery import Change, Finding, RecoveryEvent
from training_common.team import ALONE, Team, exchanging, load_parts, local, part_of, parts_of_state, whole

_CHECKPOINT_FORMAT = 2
# Training rows that a model may calibrate itself on: deviations are then known to about 6 %.
_CALIBRATION_ROWS = 128
# Training rows whose logits' shape is looked at before the first step.
_LOGITS_ROWS = 2
# A checkpoint's files. What a roll-back takes are the first two.
_WEIGHTS, _OPTIMIZER, _POSITION = "trained.safetensors", "optimizer.pt", "position.json"
_BEST = "best.safetensors"


class LossModule(nn.Module):
    """An objective's loss as a module, for what wraps modules: its forward returns the mean, `found` keeps the rest."""

    found: Loss

    def __init__(self, objective: Objective[Any, Any], model: AgentModel) -> None:
        super().__init__()
        self.objective = objective
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of the batch."""
        self.found = self.objective.loss(self.model, batch)
        return self.found.mean


@dataclass(frozen=True, kw_only=True)
class AgentResult:
    """A trained agent: a folder of files to publish, and what was measured."""

    folder: Path
    labels: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    trainable_parameters: int
    total_parameters: int
    steps: int
    recovery: tuple[RecoveryEvent, ...] = ()
    checks: tuple[Check, ...] = ()


def train_agent(
    config: AgentTrainConfig,
    base_dir: Path | None,
    data: PreparedData[Any] | None,
    attempt: Attempt,
    *,
    agent_dir: Path | None = None,
    rehearsal: PreparedData[Any] | None = None,
    factory: AgentArchitectureFactory | None = None,
    team: Team = ALONE,
    cost: Cost = NO_COST,
) -> AgentResult:
    """Train an agent, or go on from the attempt's newest checkpoint, and export it.

    base_dir: foundation or model folder; None from scratch. agent_dir: a published agent to go on with instead.
    data, rehearsal: read by the team's first process alone. attempt: a `TeamAttempt` where there are others.
    cost: what the job's workers cost, for a metric.
    Errors: ArchitectureNotFoundError, IncompatibleError, DataUnavailableError, TrainingDivergedError,
    IntegrityCheckFailedError; AttemptStopped, for PAUSE with a checkpoint saved; PartDone, after the last step on
    processes that are not the first; TeamBrokenError.
    """
    architecture = (factory or AgentArchitectureFactory()).get(config.architecture)
    if config.task not in architecture.tasks:
        served = ", ".join(architecture.tasks)
        raise IncompatibleError(f"the architecture {architecture.name} serves {served}, not {config.task}")
    if data is not None:
        _check_data(data, config.task)
    settings = config.settings
    from_scratch = base_dir is None and agent_dir is None

    def tokenizer() -> str:
        if data is None or not from_scratch:
            return ""
        return architecture.learn_tokenizer(texts_of(data.train), settings)

    request = BuildRequest(
        task=config.task,
        adaptation=config.adaptation,
        seed=config.seed,
        base_dir=base_dir,
        labels=team.agree(lambda: [] if data is None else list(data.labels)),
        settings=settings,
        tokenizer=team.agree(tokenizer),
    )
    torch.manual_seed(config.seed)

    def build() -> AgentModel:
        return architecture.build(request) if agent_dir is None else architecture.build_on(agent_dir, request)

    parent = None if agent_dir is None else lambda: architecture.load(agent_dir)
    return _Run(config, architecture, build, parent, data, rehearsal, attempt, team, cost).finish()


def _check_data(data: PreparedData[Any], task: str) -> None:
    for split, rows in (("train", data.train), ("test", data.test)):
        if not rows:
            raise DataUnavailableError(f"{data.name} has no {split} rows")
    if task == "classification":
        for split, rows in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            if not all(0 <= row.label < len(data.labels) for row in rows):
                raise DataUnavailableError(
                    f"{data.name} has {split} rows whose label is not among its {len(data.labels)}"
                )
        if len(data.labels) < 2:
            raise DataUnavailableError(f"{data.name} has {len(data.labels)} labels; a classifier needs two or more")


class _Run:
    """One attempt's walk from build to export."""

    def __init__(
        self,
        config: AgentTrainConfig,
        architecture: AgentArchitecture,
        build: Callable[[], AgentModel],
        parent: Callable[[], AgentModel] | None,
        data: PreparedData[Any] | None,
        rehearsal: PreparedData[Any] | None,
        attempt: Attempt,
        team: Team,
        cost: Cost,
    ) -> None:
        self.config, self.architecture, self.attempt, self.team = config, architecture, attempt, team
        self._build = build
        self.objective = objective_for(config)
        self.model = build()
        # The model is still the untrained one, which the rows may be prepared with.
        self.rows = (
            None
            if data is None
            else TrainingRows(
                data, rehearsal, self.objective, self.model, config, between=self._heed_stop_early, parent=parent
            )
        )
        self.validates = team.agree(lambda: self.rows is not None and len(self.rows.validation) > 0)
        self.step = 0
        self.saved_step = -1
        self.measurements = Measurements(self.objective)
        self.validation_score: float | None = None
        self.plateau, self.stopping = PlateauState(), StoppingState()
        self.best: dict[str, Tensor] = {}  # the state of the best validation, where a run may end early
        if config.optimization.needs_validation and not self.validates:
            raise DataUnavailableError(
                "optimization.early_stopping and a plateau schedule need validation rows, and there are none; add "
                "some, or choose another schedule without early stopping"
            )
        self.recovery = AgentRecoveryManager(
            config.recovery, looks_at_validation=config.optimization.early_stopping is None
        )
        self.correction = Correction()
        self.tracker = AgentProgressTracker(
            config.total_steps, worker_hour=cost.worker_hour, earlier_seconds=cost.earlier_seconds
        )
        self._good: GoodCheckpoint | None = None
        self._saving: Future[CheckpointRef] | None = None
        checkpoint = attempt.latest_checkpoint()
        if checkpoint is None:
            self._report_rows()
            self._calibrate()
        else:
            self._restore(checkpoint)
        self._loss = LossModule(self.objective, self.model)
        self._parallel = team.parallel(self._loss, blocks=self.model.blocks())
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise IncompatibleError(
                f"adaptation.{config.adaptation.method} leaves this agent nothing to train, for it has no head of its "
                "own for the task; choose another method"
            )
        # What a checkpoint holds of the model; all the rest is the foundation's.
        self.state: dict[str, Tensor] = {**self.trained, **dict(self.model.named_buffers())}
        head = self.model.head_parameters()
        in_head = {id(p) for p in head}
        base = [p for p in self.trained.values() if id(p) not in in_head]
        self.optimizer = build_optimizer(config.optimization, base=base, head=head)
        if checkpoint is not None:
            self._load_optimizer(checkpoint.path, random_state=True)
            self._restore_best(checkpoint)
        self._copy = MemoryCopy()
        self._obey_correction()

    def _report_rows(self) -> None:
        """Tell what became of the training texts when they were encoded."""
        facts = {} if self.rows is None else self.objective.facts(self.rows.order.rows)
        if facts:
            listed = ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in facts.items())
            self.attempt.event("rows_encoded", {"message": listed, **facts})

    def _calibrate(self) -> None:
        """Measure on the first process what the head needs to know, and let the others know it too."""
        if self.rows is not None:
            batch = self.objective.batch(sample(self.rows.order.rows, _CALIBRATION_ROWS, self.config.seed))
            self.model.eval().calibrate(self.objective.inputs(batch))
            few = self.objective.batch(self.rows.order.rows[:_LOGITS_ROWS])
            require_logits(self.model, self.objective.inputs(few), architecture=self.architecture.name)
        buffers = dict(self.model.named_buffers())
        load_parts(buffers, self.team.deal(lambda: {name: buffer.clone() for name, buffer in buffers.items()}))

    def finish(self) -> AgentResult:
        if self.team.agree(lambda: not self.measurements.results):
            model = self._whole_model()
            self.team.agree(lambda: self.measurements.measure("before", model, self._own_rows(), between=self._between))
        self._train()
        self._save(planned=False)
        self._take_best()
        model = self._whole_model()
        self.attempt.trained()
        return self._finish(model, self._own_rows())

    def _finish(self, model: AgentModel, rows: TrainingRows) -> AgentResult:
        """Measure and export, on the first process alone."""
        self.measurements.measure("after", model, rows, between=self._heed_stop)
        if self.validates:
            self.measurements.measure_validation(model, rows, between=self._heed_stop)
        count = count_parameters(model)
        events = self.recovery.events
        checks = self.measurements.judge(rows, trouble_left=bool(events) and events[-1].action == Action.LEAVE)
        folder = self.attempt.workdir / "agent"
        facts = RunFacts(
            steps=self.step,
            weights_of_step=self.stopping.best_step if self.best else self.step,
            count=count,
            evaluations=self.measurements.results,
            recovery=events,
            constraints_enforced=self.correction.enforced,
        )
        write_agent(
            folder,
            model,
            rows.test[:PROBE_ROWS],
            config=self.config,
            architecture=self.architecture,
            objective=self.objective,
            build=self._build,
            facts=facts,
        )
        return AgentResult(
            folder=folder,
            labels=model.labels,
            evaluations=tuple(self.measurements.results),
            trainable_parameters=count.trainable,
            total_parameters=count.total,
            steps=self.step,
            recovery=events,
            checks=checks,
        )

    def _own_rows(self) -> TrainingRows:
        if self.rows is None:
            raise RuntimeError("only the team's first process has rows")
        return self.rows

    def _whole_model(self) -> AgentModel:
        """Return the model, gathered where it is parted. Every process has to call it."""
        if not self.team.shards:
            return self.model
        state = whole(self.model.state_dict())
        model = self._build()
        model.load_state_dict(state)
        return model

    # Steps

    def _train(self) -> None:
        config = self.config
        self.model.train()
        while self.step < config.total_steps and not self._ends_early():
            self._heed_stop()
            taken = self._take_step()
            last = self.step == config.total_steps
            validated = self.validates and self._is_validated(self.step)
            measured = self._validate() if validated else {}
            if validated or last or self.step == 1 or self.step % config.progress_interval_steps == 0:
                self._report(taken, measured)
            if validated:
                self._heed_validation(measured)
            self._return_when_stable()
            if self.step % config.checkpoint_interval_steps == 0:
                self._save(planned=True)

    def _take_step(self) -> StepReport | None:
        """Take a step and look after it; None where it could not be taken, which counts as a step all the same."""
        started = time.monotonic()
        try:
            taken = self._optimize(self.step)
        except TrainingDivergedError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._recover(self.recovery.observe_not_finite(self.step, error.message))
            return None
        self.step += 1
        self.tracker.add(taken, seconds=time.monotonic() - started)
        self._recover(self.recovery.observe_step(self.step, taken.loss))
        return taken

    def _report(self, taken: StepReport | None, measured: Mapping[str, float]) -> None:
        metrics: dict[str, Json] = {f"validation_{name}": value for name, value in measured.items()}
        if taken is not None:
            metrics |= {"learning_rate": taken.lr, "gradient_norm": taken.norm}
        counts, units = self.tracker.counted
        if units:
            metrics |= self.objective.rates(counts, units)
        metrics |= self.tracker.take(self.step)
        loss = metrics.get("loss")
        if isinstance(loss, float) and "loss" in measured:
            metrics["generalization_gap"] = generalization_gap(loss, measured["loss"])
        self.attempt.progress(step=self.step, total_steps=self.config.total_steps, metrics=metrics)

    def _is_validated(self, step: int) -> bool:
        if step == self.config.total_steps:  # which is measured anyway, unless it has to compete with the best one
            return self.config.optimization.early_stopping is not None
        return step % self.config.validation_interval == 0

    def _heed_validation(self, measured: Mapping[str, float]) -> None:
        """Let the newest validation decide what it has a say in. Every process has heard the same figures."""
        optimization, higher = self.config.optimization, self.objective.higher_is_better
        score = self.validation_score
        if score is None:
            self._recover(self.recovery.observe_not_finite(self.step, f"validation {self.objective.score}"))
            return
        if optimization.schedule is Schedule.PLATEAU:
            self.plateau = self.plateau.after(score, higher_is_better=higher)
        found = measured.get("violation_share")
        limit = self.config.constraints.max_violation_share if self.config.constraints else 0.0
        violations = None if found is None or self.correction.enforced else (found, limit)
        self._recover(self.recovery.observe_validation(score if higher else -score, violations))
        if optimization.early_stopping is None:
            return
        self.stopping = self.stopping.after(
            score, step=self.step, config=optimization.early_stopping, higher_is_better=higher
        )
        if self.stopping.best_step == self.step:
            self.best = {name: value.detach().clone() for name, value in self.state.items()}
        elif self._ends_early() and self.step < self.config.total_steps:
            message = f"no better {self.objective.score} since step {self.stopping.best_step}"
            payload: dict[str, Json] = {"message": message, "step": self.step, **self.stopping.to_json()}
            self.attempt.event("stopped_early", payload)

    def _ends_early(self) -> bool:
        config = self.config.optimization.early_stopping
        return config is not None and self.stopping.ends(config)

    @torch.no_grad()
    def _take_best(self) -> None:
        """Make the best validation's weights the agent's, where a run may end early."""
        for name, value in self.best.items():
            self.state[name].copy_(value)

    def _optimize(self, step: int) -> StepReport:
        """Take one step."""
        optimization, team, total = self.config.optimization, self.team, self.config.total_steps
        rows = self.correction.batch_factor
        batch = team.deal(lambda: self.objective.batch(self._own_rows().rows_of(step, rows, total)))
        if team.size > 1:  # no two processes drop out the same, and a resumed run drops out as the uninterrupted one
            torch.manual_seed((self.config.seed * total + step) * team.size + team.rank)
        units = self.objective.units(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss, counts = self._add_gradients(pieces(batch, team, optimization.accumulation_steps * rows), units)
        names = sorted(counts)
        parts = torch.tensor([loss, *(counts[name] for name in names)], dtype=torch.float64)
        loss, *counted = team.total(parts).tolist()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss of step {step + 1} is {loss}")
        team.add_up_the_rest(self.trained.values())
        norm = team.clip(list(self.trained.values()), optimization.clip_norm * self.correction.clip_factor)
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the gradient norm of step {step + 1} is {norm}, and its loss {loss}")
        factor = lr_factor(
            step,
            total_steps=total,
            warmup_steps=warmup_steps(optimization, total),
            schedule=optimization.schedule,
            falls=self.plateau.falls,
        )
        factor *= self.correction.lr_factor
        set_lr(self.optimizer, factor)
        if self.correction.base_frozen:
            self._freeze_base()
        self.optimizer.step()
        return StepReport(
            loss=loss,
            units=units,
            counts=dict(zip(names, counted, strict=True)),
            rows=len(batch["tokens_BT"]),
            norm=norm,
            lr=optimization.lr * factor,
        )

    def _add_gradients(self, pieces: Sequence[Piece], units: float) -> tuple[float, dict[str, float]]:
        """Add up the gradients of this process's pieces; return their part of the loss, and what was counted.

        units: of the whole batch, over which the loss is a mean.
        """
        loss, counts = 0.0, dict[str, float]()
        for piece in pieces:
            own_units = self.objective.units(piece.batch) if piece.counts else 0.0
            with contextlib.nullcontext() if piece.last else self.team.unexchanged(self._parallel):
                with computing(self.config.optimization.precision):
                    mean = self._parallel(piece.batch)
                part = mean * (own_units / units if units else 0.0)
                with exchanging():
                    part.backward()
            loss += float(part.detach())
            for name, count in self._loss.found.counts.items():
                counts[name] = counts.get(name, 0.0) + (count if piece.counts else 0.0)
        return loss, counts

    # Recovery

    def _recover(self, finding: Finding | None) -> None:
        """Apply the first action that is left and possible.

        Errors: TrainingDivergedError, with the evidence, when there is none and the trouble leaves no agent.
        """
        if finding is None:
            return
        for action in self.recovery.choices(finding):
            change = self._apply(Action(action))
            if change is not None:
                self._tell(self.recovery.record(finding, action, change))
                return
        if voids(finding):
            raise TrainingDivergedError(
                f"{finding.detector} at step {self.step} ({finding.text}); {len(self.recovery.events)} recovery "
                "actions were taken and none is left for it: lower optimization.peak_learning_rate, or look at the data"
            )
        self._tell(self.recovery.record(finding, Action.LEAVE, Change(before={}, after={})))

    def _apply(self, action: Action) -> Change | None:
        """Change the run as an action says; None where there is nothing to change."""
        if action is Action.FREEZE_BASE and not self.model.head_parameters():
            return None
        if action is Action.PENALIZE and not self.objective.needs_reference:
            return None
        good = self._newest_good() if action is Action.ROLL_BACK else None
        if action is Action.ROLL_BACK and good is None:
            return None
        change = self.correction.apply(action)
        if good is not None:
            self._go_back_to(good)
            at_floor = change or Change(before={}, after={})  # the rate cannot fall further, and the weights still go
            change = Change(
                before={**at_floor.before, "weights_of_step": float(self.step)},
                after={**at_floor.after, "weights_of_step": float(good.step)},
            )
        self._obey_correction()
        return change

    def _obey_correction(self) -> None:
        """Tell the objective what recoveries ask of it."""
        self.objective.kl_weight, self.objective.mask_actions = self.correction.penalty, self.correction.enforced

    def _freeze_base(self) -> None:
        in_head = {id(p) for p in self.model.head_parameters()}
        for group in self.optimizer.param_groups:
            if not any(id(p) in in_head for p in group["params"]):
                group["lr"] = 0.0

    def _return_when_stable(self) -> None:
        """Undo what a recovery changed once training has been stable for long enough."""
        if not self.recovery.stable:
            return
        change = self.correction.go_back_to_plan()
        if change is None:
            self.recovery.start_anew()
        else:
            self._tell(self.recovery.record_return(change))

    def _tell(self, event: RecoveryEvent) -> None:
        self.attempt.event("recovery", event.payload())

    def _newest_good(self) -> GoodCheckpoint | None:
        """Return the newest checkpoint to go back to. Waits until the newest of all is durable.

        Every process has to ask for it. Errors: those of its save.
        """
        if self._saving is not None:
            self._good, self._saving = good_of(self._saving.result().path, _POSITION), None
        found = self.team.agree(lambda: None if self._good is None else (self._good.step, str(self._good.folder)))
        self._good = None if found is None else GoodCheckpoint(found[0], Path(found[1]))
        return self._good

    def _go_back_to(self, good: GoodCheckpoint) -> None:
        """Take weights and optimizer from a good checkpoint, and go on with the plan's next step and fresh rows."""
        load_parts(self.state, safetensors.torch.load_file(good.folder / _WEIGHTS))
        self._load_optimizer(good.folder, random_state=False)

    def _heed_stop(self) -> None:
        """Raise AttemptStopped when the job's owner asked for it, for PAUSE with the present step saved."""
        kind = self.attempt.stop_requested()
        if kind is None:
            return
        if kind.saves:
            self._save(planned=False)
        raise AttemptStopped(kind)

    def _heed_stop_early(self) -> None:
        """Raise AttemptStopped when it was asked for, before there is anything new to save."""
        kind = self.attempt.stop_requested() if self.team.size == 1 else None
        if kind is not None:
            raise AttemptStopped(kind)

    # Measuring

    def _between(self) -> None:
        # While the first of several processes measures, the others wait for it and could not save.
        if self.team.size == 1:
            self._heed_stop()

    def _validate(self) -> dict[str, float]:
        """Measure on the validation rows."""
        model = self._whole_model()

        def measured() -> dict[str, float]:
            found = measure(self.objective, model, self._own_rows().validation, between=self._between)
            return {m.metric: m.value for m in found}

        found = {name: value for name, value in self.team.agree(measured).items() if math.isfinite(value)}
        self.validation_score = found.get(self.objective.score)
        return found

    # Checkpoints

    def _save(self, *, planned: bool) -> None:
        """Save a checkpoint, and with it the newest good one.

        planned: only checkpoints of the plan can be good, so that a pause changes no later decision.
        """
        if self.saved_step == self.step:
            return
        good = self._newest_good()  # waits, so that what the copy overwrites is written
        is_good = planned and self.recovery.healthy and self._is_finite()
        kept = None if is_good else good
        parts = {
            "trained": {name: value.detach() for name, value in self.state.items()},
            "optimizer": {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()},
        }
        # Whole, whatever each process holds: any number of processes can go on from it.
        state: dict[str, Any] = (
            self._copy.take(parts) if self.attempt.saves_in_background else whole(parts, keep=self.team.leads)
        )
        # Never overwritten, so that it need not be copied.
        best: dict[str, Tensor] = whole(self.best, keep=self.team.leads)
        position = self._position(good_step=self.step if is_good else None)

        def write(folder: Path) -> None:
            _save_tensors(state["trained"], folder / _WEIGHTS)
            if best:
                _save_tensors(best, folder / _BEST)
            torch.save(state["optimizer"], folder / _OPTIMIZER)
            (folder / _POSITION).write_text(position, encoding="utf-8")
            if kept is not None:
                kept.link_into(folder, (_WEIGHTS, _OPTIMIZER))

        self._saving = self.attempt.save_checkpoint(step=self.step, write=write, score=self.validation_score)
        self.saved_step = self.step

    def _is_finite(self) -> bool:
        broken = sum(not bool(local(p).isfinite().all()) for p in self.trained.values())
        return not bool(self.team.total(torch.tensor(broken)))

    def _position(self, *, good_step: int | None) -> str:
        """Return the rest as JSON. good_step: the checkpoint's own step, when it is one to go back to."""
        position = {
            "format": _CHECKPOINT_FORMAT,
            "step": self.step,
            "config_digest": self.config.digest(),
            "evaluations": [asdict(e) for e in self.measurements.results],
            "validation_score": self.validation_score,
            "plateau": self.plateau.to_json(),
            "stopping": self.stopping.to_json(),
            "good_step": good_step,
            "recovery": self.recovery.state_dict(),
            "correction": asdict(self.correction),
        }
        return json.dumps(position)

    def _restore(self, checkpoint: CheckpointRef) -> None:
        """Take over a checkpoint's weights and position."""
        position = json.loads((checkpoint.path / _POSITION).read_text(encoding="utf-8"))
        if (position["format"], position["config_digest"]) != (_CHECKPOINT_FORMAT, self.config.digest()):
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} is of another training plan")
        stored = safetensors.torch.load_file(checkpoint.path / _WEIGHTS)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        own: dict[str, Tensor] = {**trained, **dict(self.model.named_buffers())}
        if stored.keys() != own.keys():
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} holds other parameters")
        load_parts(own, stored)
        self.step = self.saved_step = position["step"]
        self.measurements.load(Evaluation(**e) for e in position["evaluations"])
        self.validation_score = position["validation_score"]
        self.plateau = PlateauState.from_json(position["plateau"])
        self.stopping = StoppingState.from_json(position["stopping"])
        self.recovery.load_state_dict(position["recovery"])
        self.correction = Correction(**position["correction"])
        self._good = good_of(checkpoint.path, _POSITION)

    def _load_optimizer(self, folder: Path, *, random_state: bool) -> None:
        state = torch.load(folder / _OPTIMIZER, weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(parts_of_state(state["optimizer"], parameters))
        if random_state:
            torch.set_rng_state(state["random"])

    def _restore_best(self, checkpoint: CheckpointRef) -> None:
        file = checkpoint.path / _BEST
        if file.exists():
            stored = safetensors.torch.load_file(file)
            self.best = {name: part_of(stored[name], value) for name, value in self.state.items()}


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, file)
