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
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server.construct import CognateModelConstructor, log_frequency
from cognate_server.grokfast import GrokFastAdamW, LambdaDeparture, parameter_groups
from cognate_server.metrics import checked
from cognate_server.stream import Batch, TokenStream
from training_common.attempt import Attempt, AttemptStopped, Json, StopKind
from training_common.models.cognate_v1 import (
    CognateOutput,
    CognateV1,
    CognateV1Config,
    MemoryState,
    config_to_json,
    load_state,
    save_state,
)

PONDER_WEIGHT = 0.1
PONDER_MEAN = 2.0
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
class ValidationReport:
    """What the validation rows say. Losses in nats per token.

    unigram_loss: what the training data's token frequencies alone reach on these rows. It is where training starts.
    memory_gain_error, pondering_gain_error: standard error of loss_memory_off - loss and of loss_one_step - loss, from
        how much that difference varies among the rows. A single row varies by nothing known: the gain's size stands in.
    """

    tokens: int
    loss: float
    loss_memory_off: float
    loss_one_step: float
    memory_gain_error: float
    pondering_gain_error: float
    unigram_loss: float
    mean_ponder_steps: float
    halting_histogram: tuple[float, ...]


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


def truncated_geometric(steps: int, mean: float) -> Tensor:
    """Return the geometric distribution over 1 to `steps` whose mean, after truncation, is `mean`: (N,).

    A mean beyond the middle has no decreasing geometric; the flat distribution is returned then.
    """
    numbers_N = torch.arange(steps, dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings: the ratio is exact to float64
        ratio = (low + high) / 2
        weights_N = ratio**numbers_N
        low, high = (ratio, high) if (weights_N * (numbers_N + 1)).sum() / weights_N.sum() < mean else (low, ratio)
    weights_N = high**numbers_N
    return (weights_N / weights_N.sum()).float()


def ponder_divergence(output: CognateOutput, prior_N: Tensor) -> Tensor:
    """Return KL(mean halting distribution || prior). Padding counts for nothing: its distribution is zero."""
    tokens = (output.steps_BT > 0).sum().clamp(min=1)
    mean_N = output.halting_BTN.sum((0, 1)) / tokens
    return torch.xlogy(mean_N, mean_N).sum() - (mean_N * prior_N.log()).sum()


@dataclass(frozen=True)
class _Masks:
    """What a batch's segment ids say about its inputs and targets; None where all is plain."""

    segment_ids_BT: Tensor | None
    valid_BT: Tensor | None
    targets_BT: Tensor  # -100 where the target is not trained on


def _masks(batch: Batch) -> _Masks:
    targets_BT = batch.tokens[:, 1:]
    if batch.segment_ids is None:
        return _Masks(None, None, targets_BT)
    here_BT, next_BT = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    trained_BT = (here_BT == next_BT) & (here_BT >= 0)
    return _Masks(here_BT, here_BT >= 0, targets_BT.masked_fill(~trained_BT, -100))


@dataclass(frozen=True)
class _Predictions:
    """A batch's output, and the logits of the X positions that have a target."""

    output: CognateOutput
    logits_XV: Tensor
    targets_X: Tensor
    trained_BT: Tensor


def _forward(model: CognateV1, batch: Batch, memory: MemoryState | None, **options: Any) -> _Predictions:
    masks = _masks(batch)
    output: CognateOutput = model(
        batch.tokens[:, :-1],
        memory=_starting_memory(model, batch, memory),
        valid_BT=masks.valid_BT,
        segment_ids_BT=masks.segment_ids_BT,
        **options,
    )
    trained_BT = masks.targets_BT >= 0
    hidden_XD, targets_X = output.hidden_BTD.flatten(0, 1), masks.targets_BT.reshape(-1)
    if not bool(trained_BT.all()):
        hidden_XD, targets_X = hidden_XD[trained_BT.reshape(-1)], targets_X[trained_BT.reshape(-1)]
    return _Predictions(output, model.logits(hidden_XD), targets_X, trained_BT)


def _starting_memory(model: CognateV1, batch: Batch, memory: MemoryState | None) -> MemoryState | None:
    """Carry the memory over in the rows that go on, and start afresh in the others."""
    if memory is None or batch.fresh_rows is None or bool(batch.fresh_rows.all()):
        return None
    fresh_B11 = batch.fresh_rows.view(-1, 1, 1)
    carried_BMD = memory.contents_BMD[: len(fresh_B11)]  # the last validation batch may be cut
    return MemoryState(torch.where(fresh_B11, model.memory.initial_MD, carried_BMD))


@dataclass(frozen=True)
class _RowLosses:
    """Sum of the cross-entropy and number of targets of each of R rows, and how many tokens took 0, 1, ... steps."""

    sums_R: Tensor
    targets_R: Tensor
    steps_N: Tensor

    @property
    def mean(self) -> float:
        return float(self.sums_R.sum() / self.targets_R.sum().clamp(min=1))

    def error_of_gain(self, without: _RowLosses) -> float:
        """Return the standard error of `without.mean - self.mean`, both on the same rows."""
        gains_R = without.sums_R - self.sums_R
        gain = float(gains_R.sum() / self.targets_R.sum())
        rows = len(gains_R)
        if rows == 1:
            return abs(gain)
        deviations_R = gains_R - gain * self.targets_R
        return math.sqrt(rows / (rows - 1) * float(deviations_R.square().sum())) / float(self.targets_R.sum())


@torch.no_grad()
def _row_losses(model: CognateV1, batches: Iterable[Batch], **options: Any) -> _RowLosses:
    memory: MemoryState | None = None
    sums, targets = [], []
    steps_N = torch.zeros(model.config.max_steps + 1, dtype=torch.int64)
    for batch in batches:
        found = _forward(model, batch, memory, **options)
        memory = found.output.memory
        losses_BT = torch.zeros(found.trained_BT.shape, dtype=torch.float64)
        losses_BT[found.trained_BT] = F.cross_entropy(found.logits_XV, found.targets_X, reduction="none").double()
        sums.append(losses_BT.sum(1))
        targets.append(found.trained_BT.sum(1))
        steps_N += torch.bincount(found.output.steps_BT.reshape(-1), minlength=len(steps_N))
    return _RowLosses(torch.cat(sums), torch.cat(targets), steps_N)


def unigram_loss(batches: Iterable[Batch], unigram_counts_V: Tensor) -> float:
    """Return the targets' mean cross-entropy under the counts' smoothed distribution, in nats per token.

    Not the entropy of the targets' own counts: of a few thousand tokens that is far too low, since it knows them.
    """
    targets = torch.cat([targets_BT[targets_BT >= 0] for targets_BT in (_masks(batch).targets_BT for batch in batches)])
    return -float(log_frequency(unigram_counts_V).double()[targets].mean())


def validate(model: CognateV1, batches: list[Batch], unigram_counts_V: Tensor) -> ValidationReport:
    """Measure the model on whole batches: as it is, with the memory's reads off, and with one core step.

    unigram_counts_V: how often the training data has each token.

    Errors: ValueError, when the batches have no target.
    """
    if not any(bool((_masks(batch).targets_BT >= 0).any()) for batch in batches):
        raise ValueError("the validation batches have no token to predict")
    whole = _row_losses(model, batches)
    memory_off = _row_losses(model, batches, read_memory=False)
    one_step = _row_losses(model, batches, fixed_steps=1)
    histogram = _histogram(whole.steps_N)
    return ValidationReport(
        tokens=int(whole.targets_R.sum()),
        loss=whole.mean,
        loss_memory_off=memory_off.mean,
        loss_one_step=one_step.mean,
        memory_gain_error=whole.error_of_gain(memory_off),
        pondering_gain_error=whole.error_of_gain(one_step),
        unigram_loss=unigram_loss(batches, unigram_counts_V),
        mean_ponder_steps=_mean_steps(histogram),
        halting_histogram=tuple(histogram),
    )


def _histogram(counts_N: Tensor) -> list[float]:
    """Turn counts of 0, 1, 2, ... steps into shares of 1, 2, ...: padding takes 0 steps and does not count."""
    shares: list[float] = (counts_N[1:] / counts_N[1:].sum().clamp(min=1)).tolist()
    return shares


def _mean_steps(histogram: list[float]) -> float:
    return sum(share * (index + 1) for index, share in enumerate(histogram))


def _first_rows(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """Take whole batches until there are so many rows, and cut the last one."""
    taken: list[Batch] = []
    for batch in batches:
        left = rows - sum(len(one.tokens) for one in taken)
        if left <= 0:
            break
        taken.append(
            Batch(
                tokens=batch.tokens[:left],
                segment_ids=None if batch.segment_ids is None else batch.segment_ids[:left],
                fresh_rows=None if batch.fresh_rows is None else batch.fresh_rows[:left],
            )
        )
    return taken


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
        found = _forward(self.model, batch, self.memory, statistics=measure)
        total = F.cross_entropy(found.logits_XV, found.targets_X, reduction="sum")
        mean_loss = total / max(1, found.targets_X.shape[0])
        divergence = ponder_divergence(found.output, self.prior_N)
        objective = mean_loss + PONDER_WEIGHT * divergence
        loss = float(mean_loss.detach())
        if not math.isfinite(float(objective.detach())):
            raise TrainingDivergedError(f"the loss of step {self.step + 1} is {loss}; nothing was updated")
        self.optimizer.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        return StepOutcome(loss=loss, divergence=float(divergence.detach()), output=found.output)

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


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one batch gave: its loss in nats per token, the ponder prior's part unweighted, and the forward's output."""

    loss: float
    divergence: float
    output: CognateOutput


def _check_shape(batch: Batch, config: PretrainConfig) -> None:
    expected = (config.rows, config.sequence_length + 1)
    if tuple(batch.tokens.shape) != expected:
        raise ValueError(f"the stream's batches are {tuple(batch.tokens.shape)}, the config asks for {expected}")


class _Clock:
    """Speed since the progress event before; absent until there is one to measure from."""

    def __init__(self, step: int) -> None:
        self._step, self._at_s = step, time.perf_counter()

    def lap(self, step: int, config: PretrainConfig) -> dict[str, Json]:
        now_s = time.perf_counter()
        elapsed_s, steps = now_s - self._at_s, step - self._step
        self._step, self._at_s = step, now_s
        if steps == 0 or elapsed_s <= 0:
            return {}
        return {
            "tokens_per_s": steps * config.batch_tokens / elapsed_s,
            "seconds_left": (config.total_steps - step) * elapsed_s / steps,
        }


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
    validation_batches = _first_rows(data.validation_batches(), config.validation_rows)
    clock = _Clock(run.step)
    while run.step < config.total_steps:
        saved_step = _obey(attempt, run, saved_step)
        reports = (run.step + 1) % config.progress_interval_steps == 0 or run.step + 1 in (1, config.total_steps)
        outcome = run.train_step(measure=reports)
        if reports:
            attempt.progress(step=run.step, total_steps=config.total_steps, metrics=_step_metrics(run, outcome, clock))
        if run.step % config.checkpoint_interval_steps == 0 or run.step == config.total_steps:
            saved_step = attempt.save_checkpoint(step=run.step, write=run.write).step
        if config.validation_interval_steps and run.step % config.validation_interval_steps == 0 < (
            config.total_steps - run.step
        ):
            loss = _row_losses(run.model, validation_batches).mean
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


def _step_metrics(run: PretrainingRun, outcome: StepOutcome, clock: _Clock) -> dict[str, Json]:
    output, report = outcome.output, run.optimizer.report
    max_steps = run.config.model.max_steps
    histogram = _histogram(torch.bincount(output.steps_BT.reshape(-1), minlength=max_steps + 1))
    metrics: dict[str, Json] = {
        "loss": outcome.loss,
        "ponder_divergence": outcome.divergence,
        "learning_rate": learning_rate(run.config, run.step - 1),
        "mean_ponder_steps": _mean_steps(histogram),
        "halting_histogram": list(histogram),
        "halting_entropy_nats": -sum(share * math.log(share) for share in histogram if share),
        "compute_saved_ratio": 1 - _mean_steps(histogram) / max_steps,
        "peak_memory_bytes": _peak_memory_bytes(),
        **clock.lap(run.step, run.config),
    }
    if report is not None:
        metrics |= dataclasses.asdict(report)
    if output.memory_statistics is not None:
        used = output.memory_statistics
        entropy = used.read_entropy_nats
        metrics["memory_write_rate"] = float(used.write_rate)
        metrics["memory_slot_utilization_ratio"] = float(used.slot_utilization)
        metrics["memory_read_entropy_nats"] = None if entropy is None else float(entropy)
    return checked(metrics)


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _finish(run: PretrainingRun, attempt: Attempt, validation_batches: list[Batch]) -> PretrainResult:
    """Validate, write the model folder and sum the run up."""
    attempt.trained()
    report = validate(run.model, validation_batches, run.data.unigram_counts())
    _report(
        attempt,
        run,
        {
            "validation_loss": report.loss,
            "validation_loss_memory_off": report.loss_memory_off,
            "validation_loss_one_step": report.loss_one_step,
        },
    )
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
