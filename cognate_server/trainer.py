"""Pretraining: from a config, a token stream and an attempt to a model folder and what was measured about it.

RuntimeError
└── TrainingDivergedError       the loss is not finite
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
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from cognate_server.construct import CognateModelConstructor
from cognate_server.flops import peak_flops_per_s
from cognate_server.grokfast import GrokFastAdamW, LambdaDeparture, parameter_groups
from cognate_server.losses import PONDER_MEAN, PONDER_WEIGHT, forward, ponder_divergence, truncated_geometric
from cognate_server.metrics import checked
from cognate_server.stream import Batch, TokenStream
from cognate_server.tracker import CognateProgressTracker, StepOutcome, validation_metrics
from cognate_server.validation import ValidationReport, first_rows, row_losses, validate
from training_common.attempt import Attempt, AttemptStopped, Json, StopKind
from training_common.models.cognate_v1 import (
    CognateV1Config,
    MemoryState,
    config_to_json,
    load_state,
    save_state,
)

# The cosine ends here, as a share of the peak.
FINAL_LR_SHARE = 0.1
# Single steps are too noisy to compare a run's two ends.
CURVE_ENDS = 10
MAX_PEAK_LR = 1e-2
# GrokFast's EMA starts as a copy of the first gradient and forgets it with a time constant of 1 / (1 - alpha) = 50
# steps. Amplified in full before that, one stale gradient outweighs the present one: at a ramp of 4 steps the loss on
# real rows rose from 6.6 to 8.5 nats within 15 steps.
MIN_LAMBDA_RAMP_STEPS = 100


class TrainingDivergedError(RuntimeError):
    """The loss is not finite; the newest checkpoint is of before."""


class CheckpointMismatchError(ValueError):
    """The checkpoint belongs to another config, so going on from it would be another run."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run. GrokFast is not in it: it cannot be chosen.

    batch_tokens: tokens of one optimizer step, a multiple of sequence_length.
    validation_rows: how many rows of the stream's validation data are used.
    validation_interval_steps: validate after every so many steps as well as at the end; None: at the end only.
    model: Cognate-25M; tests use smaller ones.
    Errors: ValueError, naming the field.
    """

    seed: int
    total_steps: int
    batch_tokens: int = 512
    sequence_length: int = 128
    peak_lr: float = 1.5e-3
    warmup_steps: int = 20
    checkpoint_interval_steps: int = 100
    progress_interval_steps: int = 10
    validation_rows: int = 32
    validation_interval_steps: int | None = None
    model: CognateV1Config = field(default_factory=CognateV1Config)

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_tokens", "sequence_length", "warmup_steps", "checkpoint_interval_steps"):
            _require_positive(name, getattr(self, name))
        for name in ("progress_interval_steps", "validation_rows", "validation_interval_steps"):
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
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps must be at most total_steps ({self.total_steps}), got {self.warmup_steps}")

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch_tokens // self.sequence_length

    def digest(self) -> str:
        """Return a sha256 of all that decides the weights: a checkpoint may only be resumed under the same one."""
        deciding = dataclasses.asdict(self)
        for name in (
            "checkpoint_interval_steps",
            "progress_interval_steps",
            "validation_rows",
            "validation_interval_steps",
        ):
            del deciding[name]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A finished run.

    model_dir: holds model.safetensors and config.json.
    first_loss, last_loss: training loss, mean over the first and the last ten steps.
    lambda_departures: every lowering of GrokFast's lambda, for the manifest.
    """

    step: int
    model_dir: Path
    config: CognateV1Config
    parameters: int
    first_loss: float
    last_loss: float
    validation: ValidationReport
    lambda_departures: tuple[LambdaDeparture, ...]


def learning_rate(config: PretrainConfig, finished_steps: int) -> float:
    """Return the rate for the step after `finished_steps`: linear warm-up, then a cosine to a tenth of the peak."""
    if finished_steps < config.warmup_steps:
        return config.peak_lr * (finished_steps + 1) / config.warmup_steps
    done = (finished_steps - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    return config.peak_lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


class PretrainingRun:
    """All that changes while a run goes on: how a step changes it, and how it is saved and restored."""

    def __init__(self, config: PretrainConfig, data: TokenStream) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.data = data
        self.model = CognateModelConstructor(config.model).construct(
            config.model, seed=config.seed, unigram_counts=data.unigram_counts()
        )
        self.optimizer = GrokFastAdamW(
            parameter_groups(self.model),
            lr=config.peak_lr,
            warmup_steps=max(config.warmup_steps, MIN_LAMBDA_RAMP_STEPS),
        )
        self.prior_N = truncated_geometric(config.model.max_steps, PONDER_MEAN)
        self.step = 0
        self.memory: MemoryState | None = None
        self.first_losses: list[float] = []
        self.last_losses: collections.deque[float] = collections.deque(maxlen=CURVE_ENDS)

    def train_step(self, *, measure: bool) -> StepOutcome:
        """Take one optimizer step; `measure` adds the telemetry that costs time.

        Errors: TrainingDivergedError, GrokFastDiverged; nothing is updated then.
        """
        batch = self.data.next_batch()
        lr = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        outcome = self.backward(batch, measure=measure)
        if measure:
            self.optimizer.measure_next_step()
        self.optimizer.step()
        self.memory = outcome.output.memory.detach() if batch.fresh_rows is not None else None
        self.step += 1
        if len(self.first_losses) < CURVE_ENDS:
            self.first_losses.append(outcome.loss)
        self.last_losses.append(outcome.loss)
        return outcome

    def backward(self, batch: Batch, *, measure: bool) -> StepOutcome:
        """Replace the gradients by those of this batch: cross-entropy and the ponder prior.

        Errors: TrainingDivergedError; ValueError, when the batch's shape is not the config's.
        """
        _check_shape(batch, self.config)
        found = forward(self.model, batch, self.memory, statistics=measure)
        total = F.cross_entropy(found.logits_XV, found.targets_X, reduction="sum")
        mean_loss = total / max(1, found.targets_X.shape[0])
        divergence = ponder_divergence(found.output, self.prior_N)
        objective = mean_loss + PONDER_WEIGHT * divergence
        loss = float(mean_loss.detach())
        if not math.isfinite(float(objective.detach())):
            raise TrainingDivergedError(f"the loss of step {self.step + 1} is {loss}; nothing was updated")
        self.optimizer.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        return StepOutcome(
            loss=loss, divergence=float(divergence.detach()), targets=len(found.targets_X), output=found.output
        )

    def write(self, folder: Path) -> None:
        """Fill a checkpoint's folder."""
        save_state(self.model, folder / "model.safetensors")
        tensors = {
            "optimizer": self.optimizer.state_dict(),
            "memory": None if self.memory is None else self.memory.contents_BMD,
            "random_state": torch.get_rng_state(),
        }
        torch.save(tensors, folder / "optimizer.pt")
        state: dict[str, Json] = {
            "step": self.step,
            "config_digest": self.config.digest(),
            "data_position": dict(self.data.state_dict()),
            "first_losses": list(self.first_losses),
            "last_losses": list(self.last_losses),
        }
        (folder / "trainer.json").write_text(json.dumps(state))

    def restore(self, folder: Path) -> None:
        """Go to where a checkpoint was written.

        Errors: CheckpointMismatchError.
        """
        state = json.loads((folder / "trainer.json").read_text())
        if state["config_digest"] != self.config.digest():
            raise CheckpointMismatchError(f"the checkpoint of step {state['step']} was written under another config")
        load_state(self.model, folder / "model.safetensors")
        tensors = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.memory = None if tensors["memory"] is None else MemoryState(tensors["memory"])
        torch.set_rng_state(tensors["random_state"])
        self.data.load_state_dict(state["data_position"])
        self.step = state["step"]
        self.first_losses = state["first_losses"]
        self.last_losses.extend(state["last_losses"])


def _check_shape(batch: Batch, config: PretrainConfig) -> None:
    expected = (config.rows, config.sequence_length + 1)
    if tuple(batch.tokens.shape) != expected:
        raise ValueError(f"the stream's batches are {tuple(batch.tokens.shape)}, the config asks for {expected}")


def pretrain(config: PretrainConfig, data: TokenStream, attempt: Attempt) -> PretrainResult:
    """Train from random values, or go on from the attempt's newest checkpoint, to the end of the plan.

    A resumed run is bitwise equal to an uninterrupted one on the same hardware with the same number of threads.

    Errors: AttemptStopped, when the job's owner asked for it: after PAUSE there is a checkpoint of the last finished
        step, after CANCEL and REVOKED nothing more was written. TrainingDivergedError, GrokFastDiverged,
        CheckpointMismatchError, ConstructionError.
    """
    run = PretrainingRun(config, data)
    checkpoint = attempt.latest_checkpoint()
    saved_step = -1
    if checkpoint is not None:
        run.restore(checkpoint.path)
        saved_step = run.step
    validation_batches = first_rows(data.validation_batches(), config.validation_rows)
    tracker = CognateProgressTracker(
        config.model,
        total_steps=config.total_steps,
        batch_tokens=config.batch_tokens,
        step=run.step,
        peak_flops_per_s=peak_flops_per_s("cpu", torch.float32),
    )
    while run.step < config.total_steps:
        saved_step = _obey(attempt, run, saved_step)
        reports = (run.step + 1) % config.progress_interval_steps == 0 or run.step + 1 in (1, config.total_steps)
        outcome = run.train_step(measure=reports)
        tracker.count(outcome)
        if reports:
            lr = learning_rate(config, run.step - 1)
            _report(attempt, run, tracker.step_metrics(outcome, run.optimizer.report, step=run.step, learning_rate=lr))
        if run.step % config.checkpoint_interval_steps == 0 or run.step == config.total_steps:
            saved_step = attempt.save_checkpoint(step=run.step, write=run.write).step
        if config.validation_interval_steps and run.step % config.validation_interval_steps == 0 < (
            config.total_steps - run.step
        ):
            loss = row_losses(run.model, validation_batches).mean
            _report(attempt, run, {"validation_loss": loss})
    _obey(attempt, run, saved_step)
    return _finish(run, attempt, validation_batches)


def _obey(attempt: Attempt, run: PretrainingRun, saved_step: int) -> int:
    """Raise AttemptStopped if the attempt is to end; return the step of the newest checkpoint."""
    kind = attempt.stop_requested()
    if kind is None:
        return saved_step
    if kind is StopKind.PAUSE and run.step != saved_step:
        attempt.save_checkpoint(step=run.step, write=run.write)
    raise AttemptStopped(kind)


def _report(attempt: Attempt, run: PretrainingRun, metrics: dict[str, Json]) -> None:
    attempt.progress(step=run.step, total_steps=run.config.total_steps, metrics=checked(metrics))


def _finish(run: PretrainingRun, attempt: Attempt, validation_batches: list[Batch]) -> PretrainResult:
    """Validate, write the model folder and sum the run up."""
    attempt.trained()
    report = validate(run.model, validation_batches, run.data.unigram_counts())
    _report(attempt, run, validation_metrics(report))
    model_dir = attempt.workdir / "final"
    model_dir.mkdir(parents=True, exist_ok=True)
    save_state(run.model, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(config_to_json(run.config.model), indent=2) + "\n")
    return PretrainResult(
        step=run.step,
        model_dir=model_dir,
        config=run.config.model,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        first_loss=sum(run.first_losses) / len(run.first_losses),
        last_loss=sum(run.last_losses) / len(run.last_losses),
        validation=report,
        lambda_departures=run.optimizer.departures,
    )
