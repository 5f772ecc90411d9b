"""What each of two processes does in test_architectures_parallel, and the same training in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.settings import SettingValue
from agent_server.data.examples import Segment, Written, texts_of
from agent_server.optim import Optimization
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import train_agent
from tests.agent._support import MemoryAttempt, prepared, toy_rows
from training_common.attempt import PartDone
from training_common.team import ALONE, Strategy, Team
from training_common.team_attempt import TeamAttempt

PROCESSES = 2
STEPS = 6
ROWS = toy_rows()
TALK = prepared(
    [Written((Segment("user: "), Segment(row.text, trained=True))) for row in ROWS.train[:41]],
    [Written((Segment("user: "), Segment(row.text, trained=True))) for row in ROWS.test[:8]],
    name="toy-talk",
)
TEXTS = list(texts_of(ROWS.train))
RECURRENT: dict[str, SettingValue] = {
    "cell": "gru",
    "width": 16,
    "layers": 2,
    "dropout": 0.0,
    "bidirectional": True,
    "vocabulary_size": 300,
}
BASE = AgentTrainConfig(
    agent="toy",
    total_steps=STEPS,
    batch_size=8,
    seed=3,
    checkpoint_interval_steps=100,
    progress_interval_steps=1,
    validation_interval_steps=100,
    optimization=Optimization(lr=5e-3),
)
# By the kind of model folder, where there is one.
CONFIGS: Mapping[str, AgentTrainConfig] = {
    "scratch": dataclasses.replace(BASE, architecture="recurrent", settings=RECURRENT),
    "bert": dataclasses.replace(BASE, architecture="sequence_classifier", settings={"pooling": "auto", "dropout": 0.0}),
    "gpt2": dataclasses.replace(BASE, architecture="causal_lm", task="dialogue"),
}


def train(folder: Path, name: str, place: Path, team: Team = ALONE) -> Mapping[str, Any] | None:
    """Train to the end and return what was reported, on the first process."""
    config = CONFIGS[name]
    own = MemoryAttempt(place) if team.leads else None
    data = None if own is None else ROWS if config.task == "classification" else TALK
    attempt = TeamAttempt(team, own, job="jobs/1", workdir=place)
    base = None if name == "scratch" else folder / name
    try:
        train_agent(config, base, data, attempt, factory=AgentArchitectureFactory(), team=team)
    except PartDone:
        return None
    return {"rows": [] if own is None else own.rows}


def run(rank: int, folder: str) -> None:
    """Train each configuration under DDP and under fully_shard, and leave what the first process saw in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    team = Team(rank=rank, size=PROCESSES)
    for kind in Strategy:
        for name in CONFIGS:
            seen = train(Path(folder), name, Path(folder) / kind / name, team.using(kind))
            if seen is not None:
                torch.save(seen, Path(folder) / f"{kind}-{name}.pt")
    dist.destroy_process_group()
