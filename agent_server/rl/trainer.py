"""Train a policy: an environment in, a folder that is ready to publish out.

    build -> [restore] -> measure before and random play -> (rollout -> update) x n -> measure after -> export, checked

A run is a pure function of its configuration and the environment. Between two rollouts everything that it goes on from
is known: parameters, optimizer, random state, each episode's seed and actions. That border is what a checkpoint holds,
and where a stop inside a rollout or an update goes back to, so a run that was cut continues bit for bit on the same
hardware and threads. An environment that does not repeat itself is told of by an event; its episodes begin anew.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.model import AgentBatch
from agent_server.architectures.policy import PolicyArchitecture, PolicyRequest
from agent_server.architectures.policy_model import PolicyModel
from agent_server.evaluation import Evaluation
from agent_server.optim import build_optimizer, lr_factor, set_lr, warmup_steps
from agent_server.package import as_before, write_package
from agent_server.rl.card import policy_card
from agent_server.rl.config import PolicyConfig
from agent_server.rl.measure import Played, Stage
from agent_server.rl.ppo import RewardScale, Rollout, Update, Updater, collect
from agent_server.rl.recovery import TeamLimits, TeamRecoveryManager
from agent_server.rl.worlds import Episodes, EpisodesState, World, world_maker
from agent_server.tracker import NO_COST, Check, Cost, peak_memory_bytes, readiness
from agent_server.trainer import AgentResult
from cognateforge.exceptions import (
    ArtifactCorruptError,
    IncompatibleError,
    IntegrityCheckFailedError,
    TrainingDivergedError,
)
from training_common.attempt import Attempt, AttemptStopped, CheckpointRef, Json

_CHECKPOINT_FORMAT = 1
_ANCHOR = "anchor_"  # before the names of its files
# Observations that the exported policy is compared with the trained one on.
_PROBE_ROWS = 64
# Weight of the newest update in the running mean of an update's time, which `seconds_left` is told from.
_TIME_SMOOTHING = 0.1
# Adam's usual 1e-8 makes whole steps of gradients that are nearly nothing, as a new policy's are: CartPole then took
# half as many steps again (docs/log.md). Source: Huang et al. 2022, "The 37 Implementation Details of PPO", detail 3.
_ADAM_EPSILON = 1e-5
# What is beyond so many standard errors is chance in one case of forty.
_ERRORS = 1.96


@dataclass(frozen=True, kw_only=True)
class _State:
    """All that a run goes on from, as copies: what a checkpoint holds of one border between rollouts."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: Tensor
    reward_scale: dict[str, Tensor] | None
    episodes: EpisodesState
    update: int
    versions: tuple[int, ...]


def train_policy(
    config: PolicyConfig,
    attempt: Attempt,
    *,
    parent_dir: Path | None = None,
    cost: Cost = NO_COST,
    limits: TeamLimits | None = None,
    factory: AgentArchitectureFactory | None = None,
) -> AgentResult:
    """Train a policy, or go on from the attempt's newest checkpoint, and export it.

    parent_dir: a published policy to begin with, whose settings take the place of the plan's.
    limits: of bringing agents back into step.
    Errors: InvalidFieldError, IncompatibleError, TrainingDivergedError, IntegrityCheckFailedError,
    ArtifactCorruptError; AttemptStopped, for PAUSE with a checkpoint saved.
    """
    architecture = (factory or AgentArchitectureFactory()).get(config.architecture)
    if config.task not in architecture.tasks or not isinstance(architecture, PolicyArchitecture):
        served = ", ".join(architecture.tasks)
        raise IncompatibleError(f"the architecture {architecture.name} serves {served}, not {config.task}")
    make = world_maker(config.task, config.environment, config.agents, modules=config.modules)
    run = _Run(config, architecture, make, attempt, parent_dir, cost, limits or TeamLimits())
    try:
        return run.finish()
    finally:
        run.close()


class _Run:
    """One attempt's walk from build to export."""

    def __init__(
        self,
        config: PolicyConfig,
        architecture: PolicyArchitecture,
        make: Callable[[], World],
        attempt: Attempt,
        parent_dir: Path | None,
        cost: Cost,
        limits: TeamLimits,
    ) -> None:
        self.config, self.architecture, self.attempt = config, architecture, attempt
        self.episodes = Episodes(make, config.environments, config.seed)
        self.stage = Stage(make, episodes=config.evaluation_episodes, seed=config.seed)
        agents = self.episodes.agents
        self._parent_dir = parent_dir
        self.model = self._build(parent_dir)
        self.optimizer = build_optimizer(config.optimization, base=list(self.model.parameters()), head=[])
        for group in self.optimizer.param_groups:
            if "eps" in group:
                group["eps"] = _ADAM_EPSILON
        self.updater = Updater(self.model, self.optimizer, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        normalizes = self.model.settings["normalize_rewards"]
        self.scale = RewardScale(config.environments, len(agents), config.discount) if normalizes else None
        self.recovery = TeamRecoveryManager([agent.name for agent in agents], limits)
        self.learner_of = {i: n for n, (members, _) in enumerate(self.model.groups()) for i in members}
        self.update = 0
        self.versions = [0] * len(self.model.groups())
        self.evaluations: list[Evaluation] = []
        self.chance_error: float | None = None
        self.validation_return: float | None = None
        self.meter = _Meter(config, cost)
        self._saving: Future[CheckpointRef] | None = None
        self.saved_update = -1
        # The border that a stop goes back to, and the checkpoint that agents out of step go back to.
        self.border = self.anchor = self._capture()
        checkpoint = attempt.latest_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)

    def _build(self, parent_dir: Path | None) -> PolicyModel:
        config, agents = self.config, self.episodes.agents
        request = PolicyRequest(
            agents=agents, coordination=config.coordination, seed=config.seed, settings=config.settings
        )
        model = self.architecture.build_policy(request)
        if parent_dir is None:
            return model
        parent = self.architecture.load(parent_dir)
        if (parent.agents, parent.coordination) != (model.agents, model.coordination):
            raise IncompatibleError(
                f"{config.parent or 'the agent to go on with'} does not fit {config.environment}: its spaces or its "
                "coordination are others; train from scratch, or choose what it was trained with"
            )
        return parent.train()

    @property
    def step(self) -> int:
        """Finished gradient steps, at a border."""
        return self.update * self.config.steps_of_update

    def close(self) -> None:
        """Close the environments."""
        self.episodes.close()
        self.stage.close()

    def finish(self) -> AgentResult:
        if not self.evaluations:
            before = self.stage.policy(self.model, between=self._heed_stop)
            chance = self.stage.random_play(between=self._heed_stop)
            self._record("return_before", before.mean_return)
            self._record("return_random", chance.mean_return)
            self.chance_error = chance.standard_error
        self._train()
        self._save()
        self.attempt.trained()
        after = self.stage.policy(self.model, between=self._heed_stop)
        self._record("return_after", after.mean_return)
        coordination = self.stage.coordination(after, between=self._heed_stop)
        if coordination is not None:
            self._record("coordination", coordination)
        checks = self._judge(after)
        parameters = sum(p.numel() for p in self.model.parameters())
        return AgentResult(
            folder=self._export(parameters),
            evaluations=tuple(self.evaluations),
            trainable_parameters=parameters,
            total_parameters=parameters,
            steps=self.step,
            labels=(),
            recovery=self.recovery.events,
            checks=checks,
        )

    def _judge(self, after: Played) -> tuple[Check, ...]:
        """Return the checks of readiness, and record their share.

        Better than chance: by more than 1.96 standard errors of the difference of two means, as Welch's test has it.
        """
        values = {e.metric: e.value for e in self.evaluations}
        checks = [Check(name="return_improved", value=after.mean_return, floor=values["return_before"])]
        if self.chance_error is not None and after.standard_error is not None:
            margin = _ERRORS * math.hypot(self.chance_error, after.standard_error)
            floor = values["return_random"] + margin
            checks.append(Check(name="return_beats_random_play", value=after.mean_return, floor=floor))
        share = readiness(checks)
        if share is not None:
            self._record("deployment_readiness", share)
        return tuple(checks)

    def _record(self, metric: str, value: float) -> None:
        dataset, rows = self.config.environment, self.config.evaluation_episodes
        self.evaluations.append(Evaluation(metric=metric, dataset=dataset, value=value, rows=rows))

    def _environment_steps(self) -> int:
        return self.update * self.config.rollout_steps * self.config.environments

    # Rollouts and updates

    def _train(self) -> None:
        config = self.config
        # A replay counts on being asked once for each gradient step (training_common.replay): half of the times, and no
        # more, in the rollout.
        in_rollout = min(config.rollout_steps, config.steps_of_update // 2)
        while self.update < config.updates:
            started = time.monotonic()
            between = self._heeding(in_rollout, of=config.rollout_steps)
            rollout = collect(self.model, self.episodes, config, self.generator, self.scale, between=between)
            between = self._heeding(config.steps_of_update - in_rollout, of=config.steps_of_update)
            done = self.updater.update(rollout, self.generator, self._set_rate, between=between)
            self._follow(rollout)
            self._finish_update(done)
            if self._went_back(done):
                continue
            self.border = self._capture()
            self.meter.add(seconds=time.monotonic() - started, returns=rollout.returns)
            measured: dict[str, Json] = {}
            if self._passed(config.validation_interval) and self.update < config.updates:
                self.validation_return = self.stage.policy(self.model, between=self._heed_stop).mean_return
                measured["validation_return"] = self.validation_return
            self._report(done, measured)
            if self._passed(config.checkpoint_interval_steps):
                self.anchor = self.border
                self._save()

    def _heeding(self, times: int, *, of: int) -> Callable[[], None]:
        """Return a function that asks so many times, evenly over its calls, whether to stop."""
        calls = 0

        def between() -> None:
            nonlocal calls
            if (calls + 1) * times // of > calls * times // of:
                self._heed_stop()
            calls += 1

        return between

    def _passed(self, interval_steps: int) -> bool:
        """Whether the last update went past a multiple of so many steps."""
        return self.step // interval_steps > (self.step - self.config.steps_of_update) // interval_steps

    def _set_rate(self, step_of_update: int) -> None:
        config = self.config
        factor = lr_factor(
            self.step + step_of_update,
            total_steps=config.total_steps,
            warmup_steps=warmup_steps(config.optimization, config.total_steps),
            schedule=config.optimization.schedule,
        )
        set_lr(self.optimizer, factor * self.recovery.rate_factor)

    def _follow(self, rollout: Rollout) -> None:
        """Learn what observations look like, after the update that read them as they were seen."""
        if self.model.moments is not None:
            self.model.moments.add(rollout.observation_BF)

    def _finish_update(self, done: Update) -> None:
        self.update += 1
        if len(done.lost) == len(self.versions):
            raise TrainingDivergedError(
                f"the loss of update {self.update} is not finite; lower optimization.peak_learning_rate, or bound the "
                "environment's rewards"
            )
        for learner in range(len(self.versions)):
            self.versions[learner] += learner not in done.lost

    def _went_back(self, done: Update) -> bool:
        """Bring agents that are out of step back to one checkpoint.

        Errors: TrainingDivergedError, when the budget is spent.
        """
        versions = [self.versions[self.learner_of[i]] for i in range(len(self.episodes.agents))]
        finding = self.recovery.observe_update(self.step, versions, done.drift_N)
        if finding is None:
            return False
        if not self.recovery.choices(finding):
            raise TrainingDivergedError(
                f"{finding.detector} at step {self.step} ({finding.text}): {len(self.recovery.events)} "
                "resynchronizations did not keep the agents in step; lower optimization.peak_learning_rate"
            )
        event = self.recovery.resynchronized(finding).payload()
        self._take_up(self.anchor)
        self.saved_update = -1  # what is saved next knows of it
        message = f"{event['message']}: all agents went back to the checkpoint of step {self.step}"
        self.attempt.event("recovery", {**event, "message": message, "back_to_step": self.step})
        return True

    def _report(self, done: Update, measured: Mapping[str, Json]) -> None:
        metrics: dict[str, Json] = {
            "policy_loss": done.policy_loss,
            "value_loss": done.value_loss,
            "entropy": done.entropy,
            "clip_share": done.clip_share,
            "policy_drift": max(done.drift_N),
            "gradient_norm": done.gradient_norm,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "environment_steps": self._environment_steps(),
            **self.meter.take(self.update),
            **measured,
        }
        if done.explained_variance is not None:
            metrics["explained_variance"] = done.explained_variance
        self.attempt.progress(step=self.step, total_steps=self.config.total_steps, metrics=metrics)

    def _heed_stop(self) -> None:
        """Raise AttemptStopped when the job's owner asked for it, for PAUSE with the last border saved."""
        kind = self.attempt.stop_requested()
        if kind is None:
            return
        if kind.saves:
            self._save()
        raise AttemptStopped(kind)

    # Checkpoints

    def _capture(self) -> _State:
        return _State(
            policy={name: value.detach().clone() for name, value in self.model.state_dict().items()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            random=self.generator.get_state(),
            reward_scale=None if self.scale is None else self.scale.state(),
            episodes=self.episodes.state(),
            update=self.update,
            versions=tuple(self.versions),
        )

    def _take_up(self, state: _State) -> None:
        """Go on from a state, which becomes the border; tell where the environment does not."""
        self.model.load_state_dict(state.policy)
        self.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        self.generator.set_state(state.random)
        if self.scale is not None and state.reward_scale is not None:
            self.scale.restore(state.reward_scale)
        self.update, self.versions = state.update, list(state.versions)
        self.border = state
        if not self.episodes.restore(state.episodes):
            self.border = self._capture()
            self.attempt.event(
                "episodes_renewed",
                {
                    "message": f"{self.config.environment} does not repeat an episode from its seed and its actions: "
                    f"all began anew at step {self.step}, and the run is not bit for bit the uninterrupted one",
                    "step": self.step,
                },
            )

    def _save(self) -> None:
        """Save the last border, once."""
        if self.saved_update == self.border.update:
            return
        if self._saving is not None:
            self._saving.result()
        border, anchor = self.border, self.anchor
        position = json.dumps(
            {
                "format": _CHECKPOINT_FORMAT,
                "config_digest": self.config.digest(),
                "evaluations": [asdict(e) for e in self.evaluations],
                "chance_error": self.chance_error,
                "validation_return": self.validation_return,
                "recovery": self.recovery.state_dict(),
                # A stop saves between planned checkpoints: what agents out of step go back to has to come along.
                "has_anchor": anchor.update != border.update,
            }
        )

        def write(folder: Path) -> None:
            _write(border, folder, "")
            if anchor.update != border.update:
                _write(anchor, folder, _ANCHOR)
            (folder / "position.json").write_text(position, encoding="utf-8")

        step = border.update * self.config.steps_of_update
        self._saving = self.attempt.save_checkpoint(step=step, write=write, score=self.validation_return)
        self.saved_update = border.update

    def _restore(self, checkpoint: CheckpointRef) -> None:
        """Go on from a checkpoint."""
        position = json.loads((checkpoint.path / "position.json").read_text(encoding="utf-8"))
        if (position["format"], position["config_digest"]) != (_CHECKPOINT_FORMAT, self.config.digest()):
            raise ArtifactCorruptError(f"the checkpoint of step {checkpoint.step} is of another training plan")
        self.evaluations = [Evaluation(**e) for e in position["evaluations"]]
        self.chance_error = position["chance_error"]
        self.validation_return = position["validation_return"]
        self.recovery.load_state_dict(position["recovery"])
        state = _read(checkpoint.path, "")
        self.anchor = _read(checkpoint.path, _ANCHOR) if position["has_anchor"] else state
        self._take_up(state)
        self.saved_update = self.update

    # Export

    def _export(self, parameters: int) -> Path:
        """Write the folder, read it back, and hold it against the trained policy."""
        folder = self.attempt.workdir / "agent"
        if folder.exists():
            shutil.rmtree(folder)  # an earlier attempt's, cut off before it was published
        folder.mkdir(parents=True)
        self.model.eval().save(folder, extra=self._export_config(parameters))
        card = policy_card(
            self.config, agents=self.model.agents, parameters=parameters,
            environment_steps=self._environment_steps(), evaluations=self.evaluations,
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        probe = AgentBatch(
            tokens_BT=torch.zeros(_PROBE_ROWS, 0, dtype=torch.int64),
            valid_BT=torch.zeros(_PROBE_ROWS, 0, dtype=torch.bool),
            features_BF=torch.randn(
                _PROBE_ROWS,
                sum(agent.observation.width for agent in self.model.agents),
                generator=torch.Generator().manual_seed(self.config.seed),
            ),
        )
        with torch.no_grad():
            if not torch.equal(self.architecture.load(folder)(probe), self.model(probe)):
                raise IntegrityCheckFailedError("the exported policy, read back, acts otherwise than the trained one")
        untrained = as_before(self.model, lambda: self._build(self._parent_dir))
        write_package(folder, self.model, untrained, architecture=self.config.architecture)
        return folder

    def _export_config(self, parameters: int) -> dict[str, Json]:
        return {
            "agent": self.config.agent,
            "task": self.config.task,
            "environment": self.config.environment,
            "training": json.loads(json.dumps(asdict(self.config))),
            "trainable_parameters": parameters,
            "total_parameters": parameters,
            "evaluations": [asdict(e) for e in self.evaluations],
        }


def _write(state: _State, folder: Path, prefix: str) -> None:
    safetensors.torch.save_file(state.policy, folder / f"{prefix}policy.safetensors")
    rest = {
        "optimizer": state.optimizer,
        "random": state.random,
        "reward_scale": state.reward_scale,
        "numbers": list(state.episodes.numbers),
        "actions": [torch.from_numpy(taken) for taken in state.episodes.actions],
        "observation_EF": torch.from_numpy(state.episodes.observation_EF),
        "update": state.update,
        "versions": list(state.versions),
    }
    torch.save(rest, folder / f"{prefix}state.pt")


def _read(folder: Path, prefix: str) -> _State:
    rest = torch.load(folder / f"{prefix}state.pt", weights_only=True)
    return _State(
        policy=safetensors.torch.load_file(folder / f"{prefix}policy.safetensors"),
        optimizer=rest["optimizer"],
        random=rest["random"],
        reward_scale=rest["reward_scale"],
        episodes=EpisodesState(
            numbers=tuple(rest["numbers"]),
            actions=tuple(taken.numpy() for taken in rest["actions"]),
            observation_EF=rest["observation_EF"].numpy(),
        ),
        update=rest["update"],
        versions=tuple(rest["versions"]),
    )


class _Meter:
    """What is told of the updates since the last progress row."""

    def __init__(self, config: PolicyConfig, cost: Cost) -> None:
        self._updates, self._steps = config.updates, config.rollout_steps * config.environments
        self._cost, self._spent_seconds = cost, cost.earlier_seconds
        self._update_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._count, self._returns = 0.0, 0, list[float]()

    def add(self, *, seconds: float, returns: Sequence[float]) -> None:
        self._seconds += seconds
        self._spent_seconds += seconds
        self._count += 1
        self._returns += returns
        weight = _TIME_SMOOTHING if self._update_seconds else 1.0
        self._update_seconds += weight * (seconds - self._update_seconds)

    def take(self, update: int) -> dict[str, Json]:
        metrics: dict[str, Json] = {
            "environment_steps_per_s": self._count * self._steps / max(self._seconds, 1e-9),
            "seconds_left": self._update_seconds * (self._updates - update),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self._cost.worker_hour is not None:
            metrics["cost_so_far"] = self._cost.worker_hour * self._spent_seconds / 3600
        if self._returns:
            metrics["return"] = sum(self._returns) / len(self._returns)
        self._reset()
        return metrics
