"""Steps in CartPole-v1 until it is solved: ours over those of stable-baselines3's PPO, in the same run.

Solved: a mean return of 475 or more over 100 whole episodes, by the likeliest actions, measured every 5,120 steps of
the environment, in episodes that no training saw. Both get the values that stable-baselines3's zoo has tuned for this
environment (rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1): 8 environments, 32 steps, 256 samples in one part,
20 passes, discount 0.98, decay 0.8, a rate of 0.001 that falls in a straight line over 100,000 steps. The zoo lets the
clip range of 0.2 fall as well; ours stays. A run that is not solved counts as the whole budget.
Usage: python tests/benchmarks/bench_cartpole.py [--seeds N] [--steps N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.policy import PolicyArchitecture
from agent_server.optim import Optimization, OptimizerKind, Schedule
from agent_server.rl.config import PolicyConfig
from agent_server.rl.trainer import train_policy
from tests.benchmarks.acting_runs import BenchAttempt
from tests.benchmarks.common import print_result
from training_common.attempt import AttemptStopped

SOLVED, EPISODES, EVERY = 475.0, 100, 5120
ENVIRONMENT = "CartPole-v1"
SIDE_BY_SIDE, ROLLOUT_STEPS, PASSES = 8, 32, 20
Measured = list[tuple[int, float]]  # steps in the environment, mean return


def ours(seed: int, steps: int) -> Measured:
    """Train with this project's policy optimization."""
    config = PolicyConfig(
        agent="balancer",
        environment=ENVIRONMENT,
        rollout_steps=ROLLOUT_STEPS,
        environments=SIDE_BY_SIDE,
        epochs=PASSES,
        minibatches=1,
        discount=0.98,
        advantage_decay=0.8,
        environment_steps=steps,
        evaluation_episodes=EPISODES,
        optimization=Optimization(
            optimizer=OptimizerKind.ADAM, lr=1e-3, schedule=Schedule.LINEAR, warmup_steps=0, clip_norm=0.5
        ),
        seed=seed,
        validation_interval_steps=EVERY // (ROLLOUT_STEPS * SIDE_BY_SIDE) * PASSES,
        checkpoint_interval_steps=10**6,
    )

    def solved(row: Any) -> bool:
        return bool(row.get("validation_return", 0.0) >= SOLVED)

    with tempfile.TemporaryDirectory() as folder:
        attempt = BenchAttempt(Path(folder), enough=solved)
        measured: Measured = []
        try:
            result = train_policy(config, attempt, factory=AgentArchitectureFactory(given=[PolicyArchitecture()]))
            after = next(e.value for e in result.evaluations if e.metric == "return_after")
            measured = [(config.updates * ROLLOUT_STEPS * SIDE_BY_SIDE, after)]
        except AttemptStopped:
            pass
    rows: list[dict[str, Any]] = [row for row in attempt.rows if "validation_return" in row]
    return [(row["environment_steps"], row["validation_return"]) for row in rows] + measured


class Evaluating(BaseCallback):
    """Measure every so many steps, in environments of its own, and end when it is solved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.measured: Measured = []
        self._environments = DummyVecEnv([lambda: Monitor(gymnasium.make(ENVIRONMENT))] * 50)
        self._environments.seed(1_000_000 + 1000 * seed)

    def _on_step(self) -> bool:
        return not (self.measured and self.measured[-1][1] >= SOLVED)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps and self.num_timesteps % EVERY == 0:
            self.measure()

    def measure(self) -> None:
        """Measure now."""
        mean, _ = evaluate_policy(self.model, self._environments, n_eval_episodes=EPISODES, deterministic=True)
        self.measured.append((self.num_timesteps, float(mean)))  # type: ignore[arg-type]


def theirs(seed: int, steps: int) -> Measured:
    """Train with stable-baselines3."""
    environments = DummyVecEnv([lambda: gymnasium.make(ENVIRONMENT)] * SIDE_BY_SIDE)
    model = PPO(
        "MlpPolicy",
        environments,
        n_steps=ROLLOUT_STEPS,
        batch_size=ROLLOUT_STEPS * SIDE_BY_SIDE,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=PASSES,
        ent_coef=0.0,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )
    callback = Evaluating(seed)
    model.learn(steps, callback=callback)
    if not (callback.measured and callback.measured[-1][1] >= SOLVED):
        callback.measure()
    return callback.measured


def steps_to_solve(train: Callable[[int, int], Measured], name: str, seed: int, budget: int) -> tuple[int, bool, float]:
    """Return the steps, whether it was solved, and the seconds that it took, measuring included."""
    begun = time.perf_counter()
    measured = train(seed, budget)
    seconds = time.perf_counter() - begun
    steps = next((steps for steps, mean in measured if mean >= SOLVED), None)
    told = f"{steps:,} steps" if steps else f"not solved in {budget:,} steps"
    print(f"{name}, seed {seed}: {told}, last mean return {measured[-1][1]:.1f}, {seconds:.0f} s", flush=True)
    return steps or budget, steps is not None, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        (steps_to_solve(ours, "ours", seed, options.steps), steps_to_solve(theirs, "yardstick", seed, options.steps))
        for seed in range(options.seeds)
    ]
    print_result(
        "cartpole",
        statistics.median(mine[0] for mine, _ in rows),
        statistics.median(other[0] for _, other in rows),
        unit="steps",
        runs=len(rows),
        steps=[mine[0] for mine, _ in rows],
        yardstick_steps=[other[0] for _, other in rows],
        solved=sum(mine[1] for mine, _ in rows),
        yardstick_solved=sum(other[1] for _, other in rows),
        seconds=[round(mine[2], 1) for mine, _ in rows],
        yardstick_seconds=[round(other[2], 1) for _, other in rows],
    )


if __name__ == "__main__":
    main()
