"""What the agent tests share: a tiny Cognate on disk, and an attempt in memory.

A tiny model's head starts from random values here, as training from nothing is the pretraining service's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from agent_server.architectures.cognate import CognateArchitecture
from agent_server.architectures.factory import AgentArchitectureFactory, FoundationRequirement
from agent_server.data.examples import DataManifest, Labelled, PreparedData
from agent_server.trainer import AgentResult
from training_common.attempt import CheckpointRef, Json, StopKind
from training_common.findings import ProcessingReport
from training_common.models.cognate_v1 import CognateV1, CognateV1Config, config_to_json, save_state

_TOKENIZER_VOCABULARY = 400
TINY = CognateV1Config(
    vocabulary_size=_TOKENIZER_VOCABULARY,
    width=32,
    heads=2,
    feed_forward_width=64,
    prelude_blocks=1,
    core_blocks=1,
    coda_blocks=1,
    max_steps=3,
    memory_slots=4,
    memory_chunk=8,
)


def write_foundation(
    folder: Path, texts: Sequence[str], *, seed: int = 0, config: CognateV1Config = TINY, speaks: bool = False
) -> Path:
    """Write a random Cognate, a tiny one, with a tokenizer of those texts, as a fetch would leave it.

    speaks: with the tokens that begin and end a text.
    """
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_TOKENIZER_VOCABULARY,
            special_tokens=["<|bos|>", "<|eos|>"] if speaks else [],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    model, generator = CognateV1(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif not name.endswith("scale_D"):
                parameter.normal_(0, 0.1, generator=generator)
    save_state(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    return folder


def factory() -> AgentArchitectureFactory:
    """Return a factory with the cognate architecture, whatever is installed."""
    return AgentArchitectureFactory(given=[CognateArchitecture(FoundationRequirement(name="cognate_v1"))])


@dataclass
class MemoryAttempt:
    """An attempt whose rows are lists; `stop_at` asks for a stop once so many steps were taken."""

    workdir: Path
    stop_at: int | None = None
    stop_kind: StopKind = StopKind.PAUSE
    job: str = "jobs/00000000-0000-4000-8000-000000000000"
    # What a run is known to tell; anything else fails the test.
    expected_events: tuple[str, ...] = ("rows_encoded",)
    rows: list[tuple[int, dict[str, Json]]] = field(default_factory=list)
    checkpoints: list[CheckpointRef] = field(default_factory=list)
    rows_when_trained: int | None = None
    # Whether the trainer hands copies to save_checkpoint, as it has to where that goes on beside training.
    saves_in_background: bool = False

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        self.rows.append((step, dict(metrics)))

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        if kind in self.expected_events:
            return
        raise AssertionError(f"no event was expected, and {kind} came: {payload}")

    def trained(self) -> None:
        self.rows_when_trained = len(self.rows)

    def stop_requested(self) -> StopKind | None:
        reached = max((step for step, _ in self.rows), default=0)
        return self.stop_kind if self.stop_at is not None and reached >= self.stop_at else None

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        folder = self.workdir / "checkpoints" / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        self.checkpoints.append(CheckpointRef(step=step, path=folder))
        saved: Future[CheckpointRef] = Future()
        saved.set_result(self.checkpoints[-1])
        return saved

    def latest_checkpoint(self) -> CheckpointRef | None:
        return self.checkpoints[-1] if self.checkpoints else None


Rows = PreparedData[Any]


def prepared(
    train: Sequence[Any],
    test: Sequence[Any],
    validation: Sequence[Any] = (),
    *,
    name: str = "toy",
    labels: Sequence[str] = (),
) -> Rows:
    """Return examples as a data pipeline hands them to training."""
    report = ProcessingReport()
    rows = {"train": len(train), "validation": len(validation), "test": len(test)}
    manifest = DataManifest(
        name=name,
        kind="folder",
        source={},
        files=(),
        digest="sha256:" + "0" * 64,
        labels=tuple(labels),
        rows=rows,
        report=report,
        facts={},
    )
    return PreparedData(
        name=name, labels=tuple(labels), train=train, validation=validation, test=test, manifest=manifest
    )


def toy_rows(*, seed: int = 0) -> Rows:
    """Return three labels that single words tell apart, unevenly often, among words that tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    told = (("pay", "bill", "invoice"), ("fly", "plane", "airport"), ("sing", "song", "melody"))
    filler = ("the", "a", "please", "my", "now", "for", "today", "this", "one", "next")

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def row(i: int) -> Labelled:
        label = (0, 0, 1, 2)[i % 4]
        before, after = (
            int(torch.randint(4, (1,), generator=generator)),
            int(torch.randint(4, (1,), generator=generator)),
        )
        words = [pick(filler) for _ in range(before)] + [pick(told[label])] + [pick(filler) for _ in range(after)]
        return Labelled(" ".join(words), label)

    rows = [row(i) for i in range(240)]
    return prepared(rows[:160], rows[200:], rows[160:200], labels=("pay", "travel", "music"))


@dataclass
class ToldAttempt(MemoryAttempt):
    """An attempt that keeps its events."""

    events: list[tuple[str, dict[str, Json]]] = field(default_factory=list)

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        self.events.append((kind, dict(payload)))

    @property
    def told(self) -> list[tuple[int, str, str]]:
        """Step, trouble and action of every recovery."""
        return [
            (int(str(payload["step"])), str(payload["detector"]), str(payload["action"]))
            for kind, payload in self.events
            if kind == "recovery"
        ]


def measured(result: AgentResult) -> dict[str, float]:
    """Return what was measured of an agent, by metric."""
    return {evaluation.metric: evaluation.value for evaluation in result.evaluations}


def weights(result: AgentResult) -> dict[str, Tensor]:
    """Return an exported agent's weights."""
    return safetensors.torch.load_file(result.folder / "model.safetensors")
