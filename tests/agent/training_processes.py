"""What each of two processes does in test_data_parallel, and the same training in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agent_server.adaptation import Adaptation, Bottleneck, Lora
from agent_server.data.examples import Labelled
from agent_server.optim import EarlyStopping, Optimization, OptimizerKind, Schedule
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import train_agent
from tests.agent._support import MemoryAttempt, factory, prepared
from training_common.attempt import AttemptStopped, CheckpointRef, PartDone
from training_common.team import ALONE, Strategy, Team
from training_common.team_attempt import TeamAttempt

PROCESSES = 2
STEPS = 12
CUT_AT = 9
WORDS = ("alpha", "beta", "gamma", "delta")
# 49 rows in batches of 8: every seventh batch has one row, which leaves one of two processes nothing.
DATA = prepared(
    [Labelled(f"{WORDS[i % 4]} {'number ' * (i % 5)}{i}", int(i % 4 > 1)) for i in range(49)],
    [Labelled(f"a {WORDS[i % 4]} {i}", int(i % 4 > 1)) for i in range(12)],
    [Labelled(f"the {WORDS[i % 4]} {i}", int(i % 4 > 1)) for i in range(12)],
    labels=("left", "right"),
)
BASE = AgentTrainConfig(
    agent="toy",
    total_steps=STEPS,
    batch_size=8,
    seed=3,
    checkpoint_interval_steps=5,
    progress_interval_steps=1,
    validation_interval_steps=8,
    optimization=Optimization(lr=5e-3),
)
CONFIGS = {
    "full": BASE,
    "lora": dataclasses.replace(BASE, adaptation=Adaptation(lora=Lora(rank=4), unfreeze_act_ltm=True)),
    # Three parts of each process's rows, of which the last batches of an epoch leave some empty.
    "dora": dataclasses.replace(
        BASE,
        adaptation=Adaptation(lora=Lora(rank=4, weight_decomposed=True)),
        optimization=Optimization(lr=5e-3, accumulation_steps=3),
    ),
    # What validations decide has to be decided alike, and the best one's weights are the agent's.
    "best": dataclasses.replace(
        BASE,
        adaptation=Adaptation(bottleneck=Bottleneck(width=8)),
        validation_interval_steps=2,
        optimization=Optimization(
            lr=5e-2, accumulation_steps=2, schedule=Schedule.PLATEAU, early_stopping=EarlyStopping(patience=100)
        ),
    ),
    "sgd": dataclasses.replace(BASE, optimization=Optimization(optimizer=OptimizerKind.SGD, lr=5e-2, momentum=0.9)),
}
KINDS = tuple(Strategy)


def train(
    foundation: Path, folder: Path, name: str, team: Team = ALONE, *, stop_at: int | None = None
) -> Mapping[str, Any] | None:
    """Train to the end, or until `stop_at` steps were taken, and return what was reported and exported."""
    own = None
    if team.leads:
        # What is cut is compared with what is not, so that copies are compared with what they are made of.
        own = MemoryAttempt(folder, stop_at=stop_at, saves_in_background=stop_at is not None)
        steps = sorted(int(path.name) for path in folder.glob("checkpoints/*"))
        own.checkpoints = [_checkpoint(folder, step) for step in steps]
    attempt = TeamAttempt(team, own, job="jobs/1", workdir=folder)
    data = DATA if team.leads else None
    try:
        result = train_agent(CONFIGS[name], foundation, data, attempt, factory=factory(), team=team)
    except (AttemptStopped, PartDone):
        result = None
    if own is None:
        return None
    exported = None if result is None else (result.folder / "model.safetensors").read_bytes()
    return {"rows": own.rows, "weights": exported, "evaluations": None if result is None else result.evaluations}


def _checkpoint(folder: Path, step: int) -> CheckpointRef:
    return CheckpointRef(step=step, path=folder / "checkpoints" / str(step))


def run(rank: int, folder: str) -> None:
    """Train under DDP and under fully_shard, whole and cut, and leave what the first process saw in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    team, foundation = Team(rank=rank, size=PROCESSES), Path(folder) / "foundation"
    for kind in KINDS:
        ours, place = team.using(kind), Path(folder) / kind
        for name in CONFIGS:
            _keep(train(foundation, place / name, name, ours), place / f"{name}.pt")
        for part, stop_at in (("begun", CUT_AT), ("begun-alone", None), ("cut", CUT_AT), ("cut", None)):
            _keep(train(foundation, place / part, "full", ours, stop_at=stop_at), place / f"{part}.pt")
        for stop_at in (CUT_AT, None):
            _keep(train(foundation, place / "best-cut", "best", ours, stop_at=stop_at), place / "best-cut.pt")
    dist.destroy_process_group()


def _keep(seen: Mapping[str, Any] | None, file: Path) -> None:
    if seen is not None:
        torch.save(seen, file)
