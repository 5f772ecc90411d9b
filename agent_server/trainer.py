"""Train an agent: fetched foundation and prepared data in, a folder that is ready to publish out.

    encode -> build -> [restore] -> measure before -> steps -> measure after -> merge, checked -> export, checked

A run is a pure function of its configuration, foundation and data. What a checkpoint holds (trained parameters,
optimizer, random state, step) continues it bit for bit on the same hardware and threads; the learning rate and the
order of rows are functions of the step.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from agent_server.adaptation import ParameterCount, count_parameters, merge_checked
from agent_server.architectures.factory import AgentArchitecture, AgentArchitectureFactory
from agent_server.architectures.model import AgentModel
from agent_server.card import model_card
from agent_server.evaluation import EncodedRows, Evaluation, TrainingOrder, evaluate, majority_share
from agent_server.optim import build_optimizer, lr_factor, set_lr, warmup_steps
from agent_server.train_config import AgentTrainConfig
from cognateforge.exceptions import (
    ArtifactCorruptError,
    DataUnavailableError,
    IncompatibleError,
    IntegrityCheckFailedError,
    TrainingDivergedError,
)
from training_common.attempt import Attempt, AttemptStopped, CheckpointRef, Json
from training_common.memory_copy import MemoryCopy

# Rows that the merge and the export are checked on: one batch, over in a fraction of a second.
_PROBE_ROWS = 32
_CHECKPOINT_FORMAT = 1
# Training rows that a model may calibrate itself on: deviations are then known to about 6 %.
_CALIBRATION_ROWS = 128
# Weight of the newest step in the running mean of a step's time, which `seconds_left` is told from.
_TIME_SMOOTHING = 0.1


class LabelledData(Protocol):
    """What the trainer reads of prepared classification data."""

    @property
    def name(self) -> str:
        """Name of the set, for instance "forge-intents"."""

    @property
    def labels(self) -> Sequence[str]:
        """Label names; a row's number points into them."""

    @property
    def train(self) -> Sequence[tuple[str, int]]:
        """Rows to train on: text and label."""

    @property
    def validation(self) -> Sequence[tuple[str, int]]:
        """Rows to measure on while training. May be empty."""

    @property
    def test(self) -> Sequence[tuple[str, int]]:
        """Rows to measure on before and after."""


@dataclass(frozen=True, kw_only=True)
class AgentResult:
    """A trained agent: a folder of files to publish, and what was measured."""

    folder: Path
    labels: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    trainable_parameters: int
    total_parameters: int
    steps: int


def train_agent(
    config: AgentTrainConfig,
    foundation_dir: Path,
    data: LabelledData,
    attempt: Attempt,
    *,
    factory: AgentArchitectureFactory | None = None,
) -> AgentResult:
    """Train an agent, or go on from the attempt's newest checkpoint, and export it.

    Errors: ArchitectureNotFoundError, IncompatibleError, DataUnavailableError, TrainingDivergedError,
    IntegrityCheckFailedError; AttemptStopped, for PAUSE with a checkpoint saved.
    """
    architecture = (factory or AgentArchitectureFactory()).get(config.architecture)
    if config.task not in architecture.tasks:
        served = ", ".join(architecture.tasks)
        raise IncompatibleError(f"the architecture {architecture.name} serves {served}, not {config.task}")
    _check_data(data)
    torch.manual_seed(config.seed)
    model = architecture.build(
        foundation_dir=foundation_dir,
        task=config.task,
        labels=data.labels,
        adaptation=config.adaptation,
        seed=config.seed,
    )
    return _Run(config, architecture, model, data, attempt).finish()


def _check_data(data: LabelledData) -> None:
    for split, rows in (("train", data.train), ("test", data.test)):
        if not rows:
            raise DataUnavailableError(f"{data.name} has no {split} rows")
    for split, rows in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if not all(0 <= label < len(data.labels) for _, label in rows):
            raise DataUnavailableError(f"{data.name} has {split} rows whose label is not among its {len(data.labels)}")
    if len(data.labels) < 2:
        raise DataUnavailableError(f"{data.name} has {len(data.labels)} labels; a classifier needs two or more")


class _Run:
    """One attempt's walk from build to export."""

    def __init__(
        self,
        config: AgentTrainConfig,
        architecture: AgentArchitecture,
        model: AgentModel,
        data: LabelledData,
        attempt: Attempt,
    ) -> None:
        self.config, self.architecture, self.model, self.data, self.attempt = config, architecture, model, data, attempt
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # What a checkpoint holds of the model; all the rest is the foundation's.
        self.state: dict[str, Tensor] = {**self.trained, **dict(model.named_buffers())}
        head = model.head_parameters()
        in_head = {id(p) for p in head}
        base = [p for p in self.trained.values() if id(p) not in in_head]
        self.optimizer = build_optimizer(config.optimization, base=base, head=head)
        self.order = TrainingOrder(self._encode(data.train), batch_size=config.batch_size, seed=config.seed)
        self.validation = self._encode(data.validation).sample(config.validation_rows, config.seed)
        self.test = self._encode(data.test).sample(config.evaluation_rows, config.seed)
        self.step = 0
        self.saved_step = -1
        self.evaluations: list[Evaluation] = []
        self.validation_accuracy: float | None = None
        self._copy = MemoryCopy()
        self._saving: Future[CheckpointRef] | None = None

    def _encode(self, rows: Sequence[tuple[str, int]]) -> EncodedRows:
        tokens = self.model.encode([text for text, _ in rows], max_tokens=self.config.max_tokens)
        return EncodedRows(tokens=tokens, labels=[label for _, label in rows])

    def finish(self) -> AgentResult:
        if not self._restore():
            self.model.eval().calibrate(self.order.rows.sample(_CALIBRATION_ROWS, self.config.seed).all())
        if not self.evaluations:
            self._measure("before")
            share = majority_share(self.test)
            self._record("majority_share", self.test, share)
        self._train()
        self._save()
        self.attempt.trained()
        self._measure("after")
        if len(self.validation):
            self._record("validation_accuracy", self.validation, self._validate())
        count = count_parameters(self.model)
        folder = self._export(count)
        return AgentResult(
            folder=folder,
            labels=self.model.labels,
            evaluations=tuple(self.evaluations),
            trainable_parameters=count.trainable,
            total_parameters=count.total,
            steps=self.step,
        )

    # Steps

    def _train(self) -> None:
        config, meter = self.config, _Meter(self.config.total_steps)
        self.model.train()
        validation_interval = config.validation_interval_steps or max(1, config.total_steps // 4)
        while self.step < config.total_steps:
            self._heed_stop()
            started = time.monotonic()
            loss, correct, rows, norm, lr = self._optimize(self.step)
            self.step += 1
            meter.add(loss=loss, correct=correct, rows=rows, seconds=time.monotonic() - started)
            last = self.step == config.total_steps
            measured: dict[str, Json] = {}
            if len(self.validation) and not last and self.step % validation_interval == 0:
                measured["validation_accuracy"] = self.validation_accuracy = self._validate()
            if measured or last or self.step == 1 or self.step % config.progress_interval_steps == 0:
                metrics = meter.take(self.step) | {"learning_rate": lr, "gradient_norm": norm} | measured
                self.attempt.progress(step=self.step, total_steps=config.total_steps, metrics=metrics)
            if self.step % config.checkpoint_interval_steps == 0:
                self._save()

    def _optimize(self, step: int) -> tuple[float, int, int, float, float]:
        """Take one step; return loss, rows answered rightly, rows, gradient norm and learning rate."""
        optimization = self.config.optimization
        batch = self.order.batch(step)
        result = self.model.loss(batch)
        loss = float(result.mean.detach())
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss of step {step + 1} is {loss}; lower optimization.peak_learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        result.mean.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), optimization.clip_norm))
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the gradient norm of step {step + 1} is {norm}, and its loss {loss}")
        total = self.config.total_steps
        factor = lr_factor(
            step, total_steps=total, warmup_steps=warmup_steps(optimization, total), schedule=optimization.schedule
        )
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        return loss, result.correct, batch.tokens_BT.shape[0], norm, optimization.lr * factor

    def _heed_stop(self) -> None:
        """Raise AttemptStopped when the job's owner asked for it, for PAUSE with the present step saved."""
        kind = self.attempt.stop_requested()
        if kind is None:
            return
        if kind.saves:
            self._save()
        raise AttemptStopped(kind)

    # Measuring

    def _measure(self, when: str) -> None:
        result = evaluate(self.model, self.test, between=self._heed_stop)
        self._record(f"accuracy_{when}", self.test, result.accuracy)
        self._record(f"macro_f1_{when}", self.test, result.macro_f1)

    def _validate(self) -> float:
        return evaluate(self.model, self.validation, between=self._heed_stop).accuracy

    def _record(self, metric: str, rows: EncodedRows, value: float) -> None:
        split = "validation" if rows is self.validation else "test"
        self.evaluations.append(
            Evaluation(metric=metric, dataset=f"{self.data.name}/{split}", value=value, rows=len(rows))
        )

    # Checkpoints

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        if self._saving is not None:
            self._saving.result()  # what the copy overwrites is written
        state: dict[str, Any] = {
            "trained": {name: value.detach() for name, value in self.state.items()},
            "optimizer": {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()},
        }
        if self.attempt.saves_in_background:
            state = self._copy.take(state)
        position = self._position()

        def write(folder: Path) -> None:
            tensors = {name: value.contiguous() for name, value in state["trained"].items()}
            safetensors.torch.save_file(tensors, folder / "trained.safetensors")
            torch.save(state["optimizer"], folder / "optimizer.pt")
            (folder / "position.json").write_text(position, encoding="utf-8")

        self._saving = self.attempt.save_checkpoint(step=self.step, write=write, score=self.validation_accuracy)
        self.saved_step = self.step

    def _position(self) -> str:
        position = {
            "format": _CHECKPOINT_FORMAT,
            "step": self.step,
            "config_digest": self.config.digest(),
            "evaluations": [asdict(e) for e in self.evaluations],
            "validation_accuracy": self.validation_accuracy,
        }
        return json.dumps(position)

    def _restore(self) -> bool:
        """Take over the newest checkpoint; return whether there is one."""
        checkpoint = self.attempt.latest_checkpoint()
        if checkpoint is None:
            return False
        position = json.loads((checkpoint.path / "position.json").read_text(encoding="utf-8"))
        if (position["format"], position["config_digest"]) != (_CHECKPOINT_FORMAT, self.config.digest()):
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} is of another training plan")
        stored = safetensors.torch.load_file(checkpoint.path / "trained.safetensors")
        if stored.keys() != self.state.keys():
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} holds other parameters")
        with torch.no_grad():
            for name, value in self.state.items():
                value.copy_(stored[name])
        state = torch.load(checkpoint.path / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step = self.saved_step = position["step"]
        self.evaluations = [Evaluation(**e) for e in position["evaluations"]]
        self.validation_accuracy = position.get("validation_accuracy")  # unknown to checkpoints of before
        return True

    # Export

    def _export(self, count: ParameterCount) -> Path:
        """Merge, write the folder, read it back, and hold both against the trained model's logits."""
        model = self.model.eval()
        probe = self.test.batch(range(min(_PROBE_ROWS, len(self.test))))

        @torch.no_grad()
        def logits() -> Tensor:
            return model.comparable_logits(probe)

        change = merge_checked(model.base_model(), logits)
        folder = self.attempt.workdir / "agent"
        if folder.exists():
            shutil.rmtree(folder)  # an earlier attempt's, cut off before it was published
        folder.mkdir(parents=True)
        model.save(folder, extra=self._export_config(count, change))
        self._write_card(folder, count, change)
        self._check_export(folder, logits)
        return folder

    def _export_config(self, count: ParameterCount, change: float) -> dict[str, Json]:
        return {
            "agent": self.config.agent,
            "foundation": self.config.foundation,
            "foundation_digest": self.config.foundation_digest,
            "max_tokens": self.config.max_tokens,
            "training": json.loads(json.dumps(asdict(self.config))),
            "trainable_parameters": count.trainable,
            "total_parameters": count.total,
            "merge_logit_change": change,
            "evaluations": [asdict(e) for e in self.evaluations],
        }

    def _write_card(self, folder: Path, count: ParameterCount, change: float) -> None:
        card = model_card(
            self.config, data=self.data.name, labels=self.model.labels, count=count, change=change,
            evaluations=self.evaluations, training_rows=len(self.data.train),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _check_export(self, folder: Path, logits: Callable[[], Tensor]) -> None:
        probe = self.test.batch(range(min(_PROBE_ROWS, len(self.test))))
        with torch.no_grad():
            read_back = self.architecture.load(folder).eval().comparable_logits(probe)
        if not torch.equal(read_back, logits()):
            raise IntegrityCheckFailedError("the exported agent, read back, gives other logits than the trained one")


class _Meter:
    """Means over the steps since the last progress row."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.step_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self.loss, self.correct, self.rows, self.seconds = 0.0, 0, 0, 0.0

    def add(self, *, loss: float, correct: int, rows: int, seconds: float) -> None:
        self.loss += loss * rows
        self.correct += correct
        self.rows += rows
        self.seconds += seconds
        weight = _TIME_SMOOTHING if self.step_seconds else 1.0
        self.step_seconds += weight * (seconds - self.step_seconds)

    def take(self, step: int) -> dict[str, Json]:
        metrics: Mapping[str, Json] = {
            "loss": self.loss / self.rows,
            "train_accuracy": self.correct / self.rows,
            "samples_per_s": self.rows / max(self.seconds, 1e-9),
            "seconds_left": self.step_seconds * (self.total_steps - step),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        self._reset()
        return dict(metrics)


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
