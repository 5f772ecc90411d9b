"""A small model, a stream that can be learnt, and an attempt without a server."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cognate_server.run import PretrainConfig
from cognate_server.stream import Batch
from cognate_server.trainer import PretrainResult
from training_common.attempt import CheckpointRef, Json, StopKind
from training_common.models.cognate_v1 import CognateV1Config

TINY = CognateV1Config(vocabulary_size=40, width=32, heads=4, feed_forward_width=48, memory_slots=6, memory_chunk=8)
CONFIG = PretrainConfig(
    seed=7,
    total_steps=12,
    batch_tokens=32,
    sequence_length=16,
    warmup_steps=3,
    checkpoint_interval_steps=5,
    progress_interval_steps=4,
    validation_rows=3,
    model=TINY,
)


class CountingStream:
    """Rows that count upwards in steps of the row's own: learnable, endless, resumable.

    carried: some rows go on where they ended, one in two. endless: all of them do, always.
    """

    def __init__(self, *, packed: bool = False, carried: bool = False, endless: bool = False) -> None:
        self.position = 0
        self.packed = packed
        self.carried = carried
        self.endless = endless

    def _batch(self, seed: int, rows: int = 2) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 40, (rows, 1), generator=generator)
        stride = torch.randint(1, 3, (rows, 1), generator=generator)
        tokens = (start + stride * torch.arange(17)) % 40
        segment_ids = (torch.arange(17) // 6).expand(rows, -1) if self.packed else None
        if segment_ids is not None:
            segment_ids = segment_ids.masked_fill(torch.arange(17) >= 15, -1)
        fresh = torch.arange(rows) == seed % 2 if self.carried else None
        if self.endless:
            fresh = torch.zeros(rows, dtype=torch.bool)
        return Batch(tokens=tokens, segment_ids=segment_ids, fresh_rows=fresh)

    def row(self, seed: int) -> Tensor:
        """Return one row of tokens that `next_batch` does not give before that many batches."""
        return self._batch(seed, rows=1).tokens

    def next_batch(self) -> Batch:
        self.position += 1
        return self._batch(self.position)

    def state_dict(self) -> Mapping[str, Json]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        assert isinstance(state["position"], int)
        self.position = state["position"]

    def validation_batches(self) -> Iterable[Batch]:
        return [self._batch(10_000 + index) for index in range(4)]

    def unigram_counts(self) -> Tensor:
        return torch.full((40,), 100)


class MemoryAttempt:
    """An attempt without a server: the newest two checkpoints are folders, and a stop can be asked for at any poll."""

    job = "jobs/00000000-0000-0000-0000-000000000000"

    def __init__(self, workdir: Path, *, stop: tuple[int, StopKind] | None = None) -> None:
        self.workdir = workdir
        self.events: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.saved: list[int] = []
        self.rows_when_trained: int | None = None
        self._stop = stop
        self._polls = 0

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        self.rows.append((step, json.loads(json.dumps(metrics, allow_nan=False))))

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        assert kind == "recovery"
        self.events.append(json.loads(json.dumps(payload, allow_nan=False)))

    def trained(self) -> None:
        self.rows_when_trained = len(self.rows)

    def stop_requested(self) -> StopKind | None:
        self._polls += 1
        return self._stop[1] if self._stop is not None and self._polls >= self._stop[0] else None

    saves_in_background = False

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        path = self.workdir / f"checkpoint-{step:06d}"
        path.mkdir(parents=True)
        write(path)
        self.saved.append(step)
        for old in sorted(self.workdir.glob("checkpoint-*"))[:-2]:
            shutil.rmtree(old)
        saved: Future[CheckpointRef] = Future()
        saved.set_result(CheckpointRef(step=step, path=path))
        return saved

    def latest_checkpoint(self) -> CheckpointRef | None:
        paths = sorted(self.workdir.glob("checkpoint-*"))
        return CheckpointRef(step=int(paths[-1].name[-6:]), path=paths[-1]) if paths else None


def weights(result: PretrainResult) -> bytes:
    return (result.model_dir / "model.safetensors").read_bytes()
