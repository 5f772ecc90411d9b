"""A pretraining run: its config, all that changes while it goes on, and how that is saved and restored.

RuntimeError
└── TrainingDivergedError       the loss is not finite, or recoveries did not help
    (GrokFastDiverged of cognate_server.grokfast: a gradient is not finite)
ValueError
└── CheckpointMismatchError     a checkpoint is of another config
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cognate_server.acceleration import AccelerationControl
from cognate_server.construct import CognateModelConstructor
from cognate_server.detectors import RecoveryLimits
from cognate_server.grokfast import EMA_RAMP_STEPS, GrokFastAdamW, parameter_groups
from cognate_server.losses import PONDER_MEAN, PONDER_WEIGHT, ObjectiveModule, truncated_geometric
from cognate_server.precision import Precision
from cognate_server.recovery import CognateRecoveryManager
from cognate_server.stream import Batch, DealtStream, TokenStream
from cognate_server.tracker import StepOutcome, memory_use
from training_common.attempt import Attempt, CheckpointRef, Json
from training_common.good_checkpoint import GoodCheckpoint, good_of
from training_common.memory_copy import MemoryCopy
from training_common.models.cognate_v1 import CognateV1, CognateV1Config, MemoryState, load_state, save_tensors
from training_common.team import ALONE, Strategy, Team, exchanging, load_parts, local, parts_of_state, whole

# The cosine ends here, as a share of the peak.
FINAL_LR_SHARE = 0.1
# Single steps are too noisy to compare a run's two ends.
CURVE_ENDS = 10
MAX_PEAK_LR = 1e-2
# Each rate costs a whole training. GrokFast's steps are at most 1 + lambda = 3 times plain ones: 8 is well beyond.
MAX_CONTROL_RATES = 4
MAX_CONTROL_RATE = 8.0


class TrainingDivergedError(RuntimeError):
    """The loss is not finite, or training went astray beyond what recoveries may do."""


class CheckpointMismatchError(ValueError):
    """The checkpoint belongs to another config, so going on from it would be another run."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run. GrokFast is not in it: it cannot be chosen.

    batch_tokens: tokens of one optimizer step, a multiple of sequence_length.
    validation_rows: how many rows of the stream's validation data are used.
    validation_interval_steps: validate after every so many steps as well as at the end; None: at the end only.
    score_interval_steps: least number of steps between scores of reasoning, which wait for a validation; None: one at
        every validation.
    control_rates: learning rates of the plain AdamW control, over peak_lr; none: there is no control.
    model: Cognate-25M; tests use smaller ones. recovery: the detectors' numbers; tests use shorter windows.
    Errors: ValueError, naming the field.
    """

    seed: int
    total_steps: int
    batch_tokens: int = 512
    sequence_length: int = 128
    peak_lr: float = 7.5e-4
    warmup_steps: int = 20
    precision: Precision = Precision.FLOAT32
    checkpoint_interval_steps: int = 100
    progress_interval_steps: int = 10
    validation_rows: int = 32
    validation_interval_steps: int | None = None
    score_interval_steps: int | None = None
    control_rates: tuple[float, ...] = ()
    model: CognateV1Config = field(default_factory=CognateV1Config)
    recovery: RecoveryLimits = field(default_factory=RecoveryLimits)

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_tokens", "sequence_length", "warmup_steps", "checkpoint_interval_steps"):
            _require_positive(name, getattr(self, name))
        for name in ("progress_interval_steps", "validation_rows", "validation_interval_steps", "score_interval_steps"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be within 0 and 2**63 - 1, got {self.seed}")
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens must be a multiple of sequence_length ({self.sequence_length}), got {self.batch_tokens}"
            )
        if not 0 < self.peak_lr <= MAX_PEAK_LR:
            raise ValueError(f"peak_lr must be above 0 and at most {MAX_PEAK_LR}, got {self.peak_lr}")
        if len(self.control_rates) > MAX_CONTROL_RATES or not all(
            0 < rate <= MAX_CONTROL_RATE for rate in self.control_rates
        ):
            raise ValueError(
                f"control_rates must be at most {MAX_CONTROL_RATES} factors above 0 and at most {MAX_CONTROL_RATE:g}, "
                f"got {self.control_rates}"
            )
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps must be at most total_steps ({self.total_steps}), got {self.warmup_steps}")

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch_tokens // self.sequence_length

    def digest(self) -> str:
        """Return a sha256 of all that decides the weights: a checkpoint may only be resumed under the same one."""
        deciding = dataclasses.asdict(self)
        # All else can decide: a recovery goes back to a planned checkpoint, and may rest on a validation.
        del deciding["progress_interval_steps"]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


def learning_rate(config: PretrainConfig, finished_steps: int) -> float:
    """Return the rate for the step after `finished_steps`: linear warm-up, then a cosine to a tenth of the peak."""
    if finished_steps < config.warmup_steps:
        return config.peak_lr * (finished_steps + 1) / config.warmup_steps
    done = (finished_steps - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    return config.peak_lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def lambda_ramp_steps(config: PretrainConfig) -> int:
    """Return over how many steps GrokFast's lambda rises to 2.0: the whole plan, and no less than the EMA needs.

    Over 300 steps of Cognate-25M the loss ended 0.08 nats lower when lambda rose to the end than when it was 2.0 from
    step 100 on, where learning rates are still high. With a ramp of 4 steps one stale gradient outweighed the present
    ones, and the loss on real rows rose from 6.6 to 8.5 nats within 15 steps (docs/log.md).
    """
    return max(config.total_steps, EMA_RAMP_STEPS)


class PretrainingRun:
    """All that changes while a run goes on: how a step changes it, and how it is saved and restored."""

    def __init__(self, config: PretrainConfig, data: TokenStream | None, team: Team = ALONE) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.team = team
        self.data = DealtStream(data, team, rows=config.rows, length=config.sequence_length)
        self.unigram_counts_V = self.data.unigram_counts()
        self.prior_N = truncated_geometric(config.model.max_steps, PONDER_MEAN)
        self.model = CognateModelConstructor(config.model).construct(
            config.model, seed=config.seed, unigram_counts=self.unigram_counts_V
        )
        self._objective = ObjectiveModule(self.model, self.prior_N, precision=config.precision, team=team)
        # Only these are run once by every forward pass. The core runs as often as this process's tokens want, so what
        # gathers its parts must not wait for others.
        blocks = (*self.model.prelude, *self.model.coda)
        self._parallel = team.parallel(self._objective, blocks=blocks)
        self.optimizer = GrokFastAdamW(
            parameter_groups(self.model),
            lr=config.peak_lr,
            ramp_steps=lambda_ramp_steps(config),
        )
        self.control = self._build_control()
        self.recovery = CognateRecoveryManager(config.recovery)
        self.lr_factor = 1.0
        self.ponder_weight = PONDER_WEIGHT
        self.validation_loss: float | None = None
        self._good: GoodCheckpoint | None = None
        self._saving: Future[CheckpointRef] | None = None
        self._copy = MemoryCopy()
        self.step = 0
        self.memory: MemoryState | None = None
        self.first_losses: list[float] = []
        self.last_losses: collections.deque[float] = collections.deque(maxlen=CURVE_ENDS)

    def _build_control(self) -> AccelerationControl | None:
        if not self.config.control_rates:
            return None
        return AccelerationControl(
            self.config.model,
            seed=self.config.seed,
            unigram_counts=self.unigram_counts_V,
            prior_N=self.prior_N,
            rates=self.config.control_rates,
            precision=self.config.precision,
            # Whole on every process: a yardstick is not worth parting.
            team=self.team.using(Strategy.DDP),
        )

    @property
    def good(self) -> GoodCheckpoint | None:
        """The newest checkpoint to go back to. Waits until the newest of all is durable. Errors: those of its save.

        Every process has to ask for it.
        """
        if self._saving is not None:
            self._good, self._saving = good_of(self._saving.result().path, _POSITION), None
        found = self.team.agree(lambda: None if self._good is None else (self._good.step, str(self._good.folder)))
        self._good = None if found is None else GoodCheckpoint(found[0], Path(found[1]))
        return self._good

    def whole_model(self) -> CognateV1:
        """Return the model, gathered where it is parted. Every process has to call it."""
        if not self.team.shards:
            return self.model
        state = whole(self.model.state_dict())
        model = CognateV1(self.config.model)
        model.load_state_dict(state)
        return model

    @property
    def next_lr(self) -> float:
        """The learning rate of the next step: the schedule's, less what recoveries took."""
        return learning_rate(self.config, self.step) * self.lr_factor

    def pass_over(self) -> None:
        """Count a step that could not be taken, so that the plan's length and schedule hold."""
        self.optimizer.zero_grad()
        self.step += 1

    def train_step(self, *, measure: bool) -> StepOutcome:
        """Take one optimizer step; `measure` adds the telemetry that costs time.

        Errors: TrainingDivergedError, GrokFastDiverged; nothing is updated then, and the batch is used up.
        """
        batch = self.data.next_batch()
        if self.control is not None:
            self.control.train_step(batch, learning_rate(self.config, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.next_lr
        outcome = self.backward(batch, measure=measure)
        if measure:
            self.optimizer.measure_next_step()
        self.optimizer.step()
        self.memory = outcome.memory.detach() if batch.fresh_rows is not None else None
        self.step += 1
        if len(self.first_losses) < CURVE_ENDS:
            self.first_losses.append(outcome.loss)
        self.last_losses.append(outcome.loss)
        return outcome

    def backward(self, batch: Batch, *, measure: bool) -> StepOutcome:
        """Replace the gradients by those of the whole batch's objective.

        batch: this process's rows of it.
        Errors: TrainingDivergedError; TeamBrokenError.
        """
        total = self._parallel(batch, self.memory, self.ponder_weight, measure)
        found = self._objective.found
        loss = float(found.cross_entropy.detach())
        if not math.isfinite(float(total.detach())):
            raise TrainingDivergedError(f"the loss of step {self.step + 1} is {loss}; nothing was updated")
        self.optimizer.zero_grad()
        with exchanging():
            total.backward()
        self.team.add_up_the_rest(self.model.parameters())
        return StepOutcome(
            loss=loss,
            divergence=float(found.divergence.detach()),
            allotment=float(found.allotment.detach()),
            targets=found.targets,
            rows=self.config.rows,
            taken_N=found.taken_N,
            use=memory_use(found.output, self.team),
            memory=found.output.memory,
        )

    def save(self, attempt: Attempt, *, planned: bool) -> int:
        """Save a checkpoint, and with it the newest good one; return its step.

        planned: only checkpoints of the plan can be good, so that a pause changes no later decision.
        Errors: those of the save before.
        """
        good = self.good  # waits, so that what the copy overwrites is written
        is_good = planned and self.recovery.healthy and self._is_finite()
        kept = None if is_good else good
        parts, trainer = self._tensors(), self._trainer(good_step=self.step if is_good else None)
        # Whole, whatever each process holds: any number of processes can go on from it.
        tensors = self._copy.take(parts) if attempt.saves_in_background else whole(parts, keep=self.team.leads)

        def write(folder: Path) -> None:
            _write(folder, tensors, trainer, self.config.model)
            if kept is not None:
                kept.link_into(folder, _GOOD_FILES)

        self._saving = attempt.save_checkpoint(step=self.step, write=write, score=self.validation_loss)
        return self.step

    def _is_finite(self) -> bool:
        broken = sum(not bool(local(p).isfinite().all()) for p in self.model.parameters())
        return not bool(self.team.total(torch.tensor(broken)))

    def _tensors(self) -> dict[str, Any]:
        """Return what changes in place while training goes on, by the file that it goes into; parted as it is here."""
        memory = None if self.memory is None else self.memory.map(self.team.gather)
        tensors: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": {
                "optimizer": self.optimizer.state_dict(),
                "memory": None if memory is None else memory.tensors(),
                "random_state": torch.get_rng_state(),
            },
        }
        if self.control is not None:
            tensors["control"] = self.control.state_dict()
        return tensors

    def _trainer(self, *, good_step: int | None) -> str:
        """Return the rest as JSON. good_step: the checkpoint's own step, when it is one to go back to."""
        state: dict[str, Json] = {
            "step": self.step,
            "good_step": good_step,
            "config_digest": self.config.digest(),
            "data_position": dict(self.data.state_dict()),
            "first_losses": list(self.first_losses),
            "last_losses": list(self.last_losses),
            "lr_factor": self.lr_factor,
            "ponder_weight": self.ponder_weight,
            "recovery": self.recovery.state_dict(),
            "validation_loss": self.validation_loss,
        }
        return json.dumps(state)

    def restore(self, folder: Path) -> None:
        """Go to where a checkpoint was written.

        Errors: CheckpointMismatchError.
        """
        state = json.loads((folder / _POSITION).read_text())
        if state["config_digest"] != self.config.digest():
            raise CheckpointMismatchError(f"the checkpoint of step {state['step']} was written under another config")
        tensors = torch.load(folder / "optimizer.pt", weights_only=True)
        self._load(folder / "model.safetensors", tensors["optimizer"])
        if self.control is not None:
            self.control.load_state_dict(torch.load(folder / "control.pt", weights_only=True))
        self.memory = None if tensors["memory"] is None else MemoryState(**tensors["memory"]).map(self.team.mine)
        torch.set_rng_state(tensors["random_state"])
        self.data.load_state_dict(state["data_position"])
        self.step = state["step"]
        self.first_losses = state["first_losses"]
        self.last_losses.extend(state["last_losses"])
        self.lr_factor, self.ponder_weight = state["lr_factor"], state["ponder_weight"]
        self.recovery.load_state_dict(state["recovery"])
        self.validation_loss = state.get("validation_loss")  # unknown to checkpoints of before
        self._good, self._saving = good_of(folder, _POSITION), None

    def _load(self, weights: Path, optimizer: Mapping[str, Any]) -> None:
        """Take over stored weights and the optimizer's stored state, as far as this process holds them."""
        if self.team.shards:
            stored = CognateV1(self.config.model)
            load_state(stored, weights)
            load_parts(dict(self.model.named_parameters()), stored.state_dict())
        else:
            load_state(self.model, weights)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(parts_of_state(optimizer, parameters))

    def go_back_to(self, good: GoodCheckpoint) -> None:
        """Take weights and optimizer from a good checkpoint, and go on with the plan's next step and fresh data.

        Going on instead of training the same batches again leaves out those that led astray (as for PaLM, Chowdhery et
        al. 2022, arXiv:2204.02311, section 5.1). What recoveries did to lambda stays.
        """
        kept = [{name: group[name] for name in _KEPT_IN_ROLL_BACK} for group in self.optimizer.param_groups]
        stored = torch.load(good.folder / "optimizer.pt", weights_only=True)
        self._load(good.folder / "model.safetensors", stored["optimizer"])
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(values)
        self.memory = None


def _write(folder: Path, tensors: Mapping[str, Any], trainer: str, config: CognateV1Config) -> None:
    """Fill a checkpoint's folder."""
    save_tensors(tensors["model"], config, folder / "model.safetensors")
    torch.save(tensors["optimizer"], folder / "optimizer.pt")
    if "control" in tensors:
        torch.save(tensors["control"], folder / "control.pt")
    (folder / _POSITION).write_text(trainer)


_KEPT_IN_ROLL_BACK = ("lambda_limit", "lambda_departures")
_POSITION = "trainer.json"
# What a roll-back takes.
_GOOD_FILES = ("model.safetensors", "optimizer.pt")
