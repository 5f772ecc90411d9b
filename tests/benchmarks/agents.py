"""Training small agents on real rows, for benches of what they learn: recurrent networks from random values, or a
pretrained encoder out of a model folder of `transformers`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agent_server.adaptation import Adaptation
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.model import AgentModel
from agent_server.data.examples import PreparedData
from agent_server.data.processor import AgentDataProcessor
from agent_server.optim import Optimization
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.attempt import CheckpointRef, Json, StopKind
from training_common.settings import DataSettings

ROOT = Path(__file__).resolve().parents[2]
REAL_ROWS = Path(os.environ.get("FORGE_DATA", ROOT.parent / "shared" / "data"))
# One: a recurrence is a chain of small steps, which a second thread hardly speeds up and a busy machine holds up.
THREADS = 1
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An agent, read back from its folder, what was measured around its training, and how long that took."""

    model: AgentModel
    measured: Mapping[str, float]
    rows: Mapping[str, int]
    train_seconds: float
    parameters: int


class _Attempt:
    """An attempt that prints how the loss goes."""

    job = "jobs/00000000-0000-4000-8000-000000000000"
    saves_in_background = False

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.started_s = time.perf_counter()

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        print(f"step {step}/{total_steps}: loss {metrics.get('loss', 0):.3f}", flush=True)

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        print(f"{kind}: {payload.get('message', payload)}", flush=True)

    def trained(self) -> None:
        """Nothing has to be waited for."""

    def stop_requested(self) -> StopKind | None:
        return None

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef] | None:
        return None  # nothing is resumed here

    def latest_checkpoint(self) -> CheckpointRef | None:
        return None


def real_set(task: str, path: str, **fields: object) -> PreparedData[Any]:
    """Return real rows of a task. fields: of its message. Ends the process where there are none."""
    if not (REAL_ROWS / path).exists():
        sys.exit(f"this bench needs real rows and there is no {REAL_ROWS / path}: set FORGE_DATA to a folder with them")
    wish = getattr(pb.TrainingPlan(), task).__class__(file=pb.FileSource(path=path), **fields)
    data = AgentDataProcessor(DataSettings(folder=REAL_ROWS)).prepare_set(task, wish)
    print(f"{data.name}: {len(data.train)} / {len(data.validation)} / {len(data.test)} examples", flush=True)
    return data


@contextmanager
def trained(
    task: str, data: PreparedData[Any], *, steps: int, base: Path | None = None, **asked: Any
) -> Iterator[Trained]:
    """Train a recurrent agent, or all of a pretrained encoder.

    base: the encoder's model folder. asked: settings of the architecture, and fields of the configuration.
    """
    torch.set_num_threads(THREADS)
    factory = AgentArchitectureFactory()
    architecture = factory.get("recurrent" if base is None else "sequence_classifier")
    settings = {name: asked.pop(name, setting.default) for name, setting in architecture.settings.items()}
    config = AgentTrainConfig(
        agent="bench",
        architecture=architecture.name,
        task=task,
        settings=settings,
        adaptation=Adaptation(),
        total_steps=steps,
        seed=SEED,
        progress_interval_steps=max(1, steps // 10),
        validation_interval_steps=steps,  # none on the way
        checkpoint_interval_steps=steps,
        evaluation_rows=0,
        optimization=Optimization(lr=asked.pop("lr")),
        **asked,
    )
    folder = Path(tempfile.mkdtemp(prefix="bench-agent-"))
    try:
        attempt = _Attempt(folder)
        result = train_agent(config, base, data, attempt, factory=factory)
        seconds = time.perf_counter() - attempt.started_s
        yield Trained(
            model=architecture.load(result.folder).eval(),
            measured={e.metric: e.value for e in result.evaluations},
            rows={e.metric: e.rows for e in result.evaluations},
            train_seconds=seconds,
            parameters=result.total_parameters,
        )
    finally:
        shutil.rmtree(folder)
