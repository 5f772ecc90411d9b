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
from agent_server.architectures.model import AgentBatch, AgentModel, LossModule
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
from training_common.team import ALONE, Team, exchanging, load_parts, parts_of_state, whole

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
    data: LabelledData | None,
    attempt: Attempt,
    *,
    factory: AgentArchitectureFactory | None = None,
    team: Team = ALONE,
) -> AgentResult:
    """Train an agent, or go on from the attempt's newest checkpoint, and export it.

    data: read by the team's first process alone. attempt: a `TeamAttempt` where there are others.
    Errors: ArchitectureNotFoundError, IncompatibleError, DataUnavailableError, TrainingDivergedError,
    IntegrityCheckFailedError; AttemptStopped, for PAUSE with a checkpoint saved; PartDone, after the last step on
    processes that are not the first; TeamBrokenError.
    """
    architecture = (factory or AgentArchitectureFactory()).get(config.architecture)
    if config.task not in architecture.tasks:
        served = ", ".join(architecture.tasks)
        raise IncompatibleError(f"the architecture {architecture.name} serves {served}, not {config.task}")
    if data is not None:
        _check_data(data)
    labels = team.agree(lambda: [] if data is None else list(data.labels))
    torch.manual_seed(config.seed)

    def build() -> AgentModel:
        return architecture.build(
            foundation_dir=foundation_dir,
            task=config.task,
            labels=labels,
            adaptation=config.adaptation,
            seed=config.seed,
        )

    return _Run(config, architecture, build, data, attempt, team).finish()


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
        build: Callable[[], AgentModel],
        data: LabelledData | None,
        attempt: Attempt,
        team: Team,
    ) -> None:
        self.config, self.architecture, self.attempt, self.team = config, architecture, attempt, team
        self._build = build
        self.model = build()
        self.rows = None if data is None else _Rows(data, self.model, config)
        self.validates = team.agree(lambda: self.rows is not None and len(self.rows.validation) > 0)
        self.step = 0
        self.saved_step = -1
        self.evaluations: list[Evaluation] = []
        self.validation_accuracy: float | None = None
        checkpoint = attempt.latest_checkpoint()
        if checkpoint is None:
            self._calibrate()
        else:
            self._restore(checkpoint)
        self._loss = LossModule(self.model)
        self._parallel = team.parallel(self._loss, blocks=self.model.blocks())
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # What a checkpoint holds of the model; all the rest is the foundation's.
        self.state: dict[str, Tensor] = {**self.trained, **dict(self.model.named_buffers())}
        head = self.model.head_parameters()
        in_head = {id(p) for p in head}
        base = [p for p in self.trained.values() if id(p) not in in_head]
        self.optimizer = build_optimizer(config.optimization, base=base, head=head)
        if checkpoint is not None:
            self._restore_optimizer(checkpoint)
        self._copy = MemoryCopy()
        self._saving: Future[CheckpointRef] | None = None

    def _calibrate(self) -> None:
        """Measure on the first process what the head needs to know, and let the others know it too."""
        if self.rows is not None:
            rows = self.rows.order.rows.sample(_CALIBRATION_ROWS, self.config.seed)
            self.model.eval().calibrate(rows.all())
        buffers = dict(self.model.named_buffers())
        load_parts(buffers, self.team.deal(lambda: {name: buffer.clone() for name, buffer in buffers.items()}))

    def finish(self) -> AgentResult:
        if self.team.agree(lambda: not self.evaluations):
            model = self._whole_model()
            self.team.agree(lambda: self._measure("before", model, between=self._between))
        self._train()
        self._save()
        model = self._whole_model()
        self.attempt.trained()
        return self._finish(model, self._own_rows())

    def _finish(self, model: AgentModel, rows: _Rows) -> AgentResult:
        """Measure and export, on the first process alone."""
        self._measure("after", model, between=self._heed_stop)
        if self.validates:
            accuracy = evaluate(model, rows.validation, between=self._heed_stop).accuracy
            self._record("validation_accuracy", rows.validation, accuracy)
        count = count_parameters(model)
        folder = self._export(model, rows, count)
        return AgentResult(
            folder=folder,
            labels=model.labels,
            evaluations=tuple(self.evaluations),
            trainable_parameters=count.trainable,
            total_parameters=count.total,
            steps=self.step,
        )

    def _own_rows(self) -> _Rows:
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
            if self.validates and not last and self.step % validation_interval == 0:
                measured["validation_accuracy"] = self.validation_accuracy = self._validate()
            if measured or last or self.step == 1 or self.step % config.progress_interval_steps == 0:
                metrics = meter.take(self.step) | {"learning_rate": lr, "gradient_norm": norm} | measured
                self.attempt.progress(step=self.step, total_steps=config.total_steps, metrics=metrics)
            if self.step % config.checkpoint_interval_steps == 0:
                self._save()

    def _optimize(self, step: int) -> tuple[float, int, int, float, float]:
        """Take one step; return loss, rows answered rightly, rows, gradient norm and learning rate."""
        optimization, team, total = self.config.optimization, self.team, self.config.total_steps
        batch = AgentBatch(**team.deal(lambda: vars(self._own_rows().order.batch(step))))
        if team.size > 1:  # no two processes drop out the same, and a resumed run drops out as the uninterrupted one
            torch.manual_seed((self.config.seed * total + step) * team.size + team.rank)
        mine, weight = _share(batch, team)
        part = self._parallel(mine) * weight
        parts = torch.stack((part.detach().double(), torch.tensor(self._loss.found.correct * (weight > 0))))
        loss, correct = team.total(parts).tolist()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss of step {step + 1} is {loss}; lower optimization.peak_learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        with exchanging():
            part.backward()
        team.add_up_the_rest(self.trained.values())
        norm = team.clip(list(self.trained.values()), optimization.clip_norm)
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the gradient norm of step {step + 1} is {norm}, and its loss {loss}")
        factor = lr_factor(
            step, total_steps=total, warmup_steps=warmup_steps(optimization, total), schedule=optimization.schedule
        )
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        return loss, int(correct), len(batch.tokens_BT), norm, optimization.lr * factor

    def _heed_stop(self) -> None:
        """Raise AttemptStopped when the job's owner asked for it, for PAUSE with the present step saved."""
        kind = self.attempt.stop_requested()
        if kind is None:
            return
        if kind.saves:
            self._save()
        raise AttemptStopped(kind)

    # Measuring

    def _between(self) -> None:
        # While the first of several processes measures, the others wait for it and could not save.
        if self.team.size == 1:
            self._heed_stop()

    def _measure(self, when: str, model: AgentModel, *, between: Callable[[], None]) -> None:
        rows = self._own_rows().test
        result = evaluate(model, rows, between=between)
        self._record(f"accuracy_{when}", rows, result.accuracy)
        self._record(f"macro_f1_{when}", rows, result.macro_f1)
        if when == "before":
            self._record("majority_share", rows, majority_share(rows))

    def _validate(self) -> float:
        model = self._whole_model()
        return self.team.agree(lambda: evaluate(model, self._own_rows().validation, between=self._between).accuracy)

    def _record(self, metric: str, rows: EncodedRows, value: float) -> None:
        own = self._own_rows()
        split = "validation" if rows is own.validation else "test"
        self.evaluations.append(Evaluation(metric=metric, dataset=f"{own.name}/{split}", value=value, rows=len(rows)))

    # Checkpoints

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        if self._saving is not None:
            self._saving.result()  # what the copy overwrites is written
        parts = {
            "trained": {name: value.detach() for name, value in self.state.items()},
            "optimizer": {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()},
        }
        # Whole, whatever each process holds: any number of processes can go on from it.
        state: dict[str, Any] = (
            self._copy.take(parts) if self.attempt.saves_in_background else whole(parts, keep=self.team.leads)
        )
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

    def _restore(self, checkpoint: CheckpointRef) -> None:
        """Take over a checkpoint's weights and position."""
        position = json.loads((checkpoint.path / "position.json").read_text(encoding="utf-8"))
        if (position["format"], position["config_digest"]) != (_CHECKPOINT_FORMAT, self.config.digest()):
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} is of another training plan")
        stored = safetensors.torch.load_file(checkpoint.path / "trained.safetensors")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        own: dict[str, Tensor] = {**trained, **dict(self.model.named_buffers())}
        if stored.keys() != own.keys():
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} holds other parameters")
        load_parts(own, stored)
        self.step = self.saved_step = position["step"]
        self.evaluations = [Evaluation(**e) for e in position["evaluations"]]
        self.validation_accuracy = position.get("validation_accuracy")  # unknown to checkpoints of before

    def _restore_optimizer(self, checkpoint: CheckpointRef) -> None:
        state = torch.load(checkpoint.path / "optimizer.pt", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(parts_of_state(state["optimizer"], parameters))
        torch.set_rng_state(state["random"])

    # Export

    def _export(self, model: AgentModel, rows: _Rows, count: ParameterCount) -> Path:
        """Merge, write the folder, read it back, and hold both against the trained model's logits."""
        model.eval()
        probe = rows.test.batch(range(min(_PROBE_ROWS, len(rows.test))))

        @torch.no_grad()
        def logits() -> Tensor:
            return model.comparable_logits(probe)

        change = merge_checked(model.base_model(), logits)
        folder = self.attempt.workdir / "agent"
        if folder.exists():
            shutil.rmtree(folder)  # an earlier attempt's, cut off before it was published
        folder.mkdir(parents=True)
        model.save(folder, extra=self._export_config(count, change))
        card = model_card(
            self.config, data=rows.name, labels=model.labels, count=count, change=change,
            evaluations=self.evaluations, training_rows=rows.training_rows,
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        with torch.no_grad():
            read_back = self.architecture.load(folder).eval().comparable_logits(probe)
        if not torch.equal(read_back, logits()):
            raise IntegrityCheckFailedError("the exported agent, read back, gives other logits than the trained one")
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


class _Rows:
    """The rows of prepared data, encoded: those to train on in their order, and samples of the others."""

    def __init__(self, data: LabelledData, model: AgentModel, config: AgentTrainConfig) -> None:
        self.name = data.name
        self.training_rows = len(data.train)

        def encode(rows: Sequence[tuple[str, int]]) -> EncodedRows:
            tokens = model.encode([text for text, _ in rows], max_tokens=config.max_tokens)
            return EncodedRows(tokens=tokens, labels=[label for _, label in rows])

        self.order = TrainingOrder(encode(data.train), batch_size=config.batch_size, seed=config.seed)
        self.validation = encode(data.validation).sample(config.validation_rows, config.seed)
        self.test = encode(data.test).sample(config.evaluation_rows, config.seed)


def _share(batch: AgentBatch, team: Team) -> tuple[AgentBatch, float]:
    """Return this process's rows, and their share of the batch.

    A process without a row takes the first one and counts it for nothing: it has to take part in every exchange.
    """
    rows = len(batch.tokens_BT)
    mine = team.rows(rows)
    count = mine.stop - mine.start
    taken = mine if count else slice(0, 1)
    return AgentBatch(**{name: part[taken] for name, part in vars(batch).items()}), count / rows


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
