"""Shared return of three agents in PettingZoo's simple_spread_v3 (mpe2): after training, over independent random play.

`value` is the mean shared return over 100 whole episodes by the likeliest actions, of the way to coordinate that ended
best; `yardstick` that of random play in the same episodes. Both are below 0, so a `ratio` below 1 is better. Beside
them stand every way's figures: return before and after, the coordination metric (`agent_server.rl.measure`), and how
often the agents had to be brought back into step.
Usage: python tests/benchmarks/bench_spread.py [--steps N] [--seed N] [COORDINATION...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.policy import PolicyArchitecture
from agent_server.architectures.policy_model import COORDINATIONS
from agent_server.optim import Optimization, OptimizerKind, Schedule
from agent_server.rl.config import PolicyConfig
from agent_server.rl.trainer import train_policy
from tests.benchmarks.acting_runs import BenchAttempt
from tests.benchmarks.common import print_result


def train(coordination: str, *, steps: int, seed: int) -> dict[str, Any]:
    """Return what was measured of one way to coordinate."""
    config = PolicyConfig(
        agent="spreaders",
        task="multi_agent",
        environment="mpe2/simple_spread_v3",
        modules=("mpe2",),
        agents=3,
        coordination=coordination,
        rollout_steps=125,  # five episodes
        environments=16,
        epochs=10,
        minibatches=4,
        discount=0.95,
        environment_steps=steps,
        evaluation_episodes=100,
        entropy_weight=0.01,
        optimization=Optimization(
            optimizer=OptimizerKind.ADAM, lr=1e-3, schedule=Schedule.LINEAR, warmup_steps=0, clip_norm=0.5
        ),
        seed=seed,
        validation_interval_steps=10**6,
        checkpoint_interval_steps=200,
        settings={"normalize_rewards": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        attempt, begun = BenchAttempt(Path(folder)), time.perf_counter()
        result = train_policy(config, attempt, factory=AgentArchitectureFactory(given=[PolicyArchitecture()]))
        seconds = time.perf_counter() - begun
    measured: dict[str, Any] = {e.metric: round(e.value, 2) for e in result.evaluations}
    measured["resynchronizations"] = sum(kind == "recovery" for kind, _ in attempt.events)
    measured["seconds"] = round(seconds, 1)
    print(f"{coordination}: {measured}", flush=True)
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("coordinations", nargs="*", default=COORDINATIONS)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {way: train(way, steps=options.steps, seed=options.seed) for way in options.coordinations}
    best = max(found, key=lambda way: float(found[way]["return_after"]))
    print_result(
        "spread",
        found[best]["return_after"],
        found[best]["return_random"],
        unit="reward",
        best=best,
        environment_steps=options.steps,
        ways=found,
    )


if __name__ == "__main__":
    main()
