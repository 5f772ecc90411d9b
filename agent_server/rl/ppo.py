"""Proximal policy optimization: a rollout, its advantages, and the update they lead to.

    ratio    = exp(log pi(a|o) - log pi_old(a|o))
    loss     = mean(max(-A ratio, -A clip(ratio, 1 - c, 1 + c))) + mean((R - V)^2) / 2 - w mean(entropy)

Each learner has a loss of its own, over what its agents did, and a gradient clipped by itself: learners share nothing.
Sources: Schulman et al. 2017, arXiv:1707.06347; the advantages are those of Schulman et al. 2016, arXiv:1506.02438, and
an episode that time cut short is worth what the critic expects of its last observation (Pardo et al. 2018,
arXiv:1712.00378).
"""

# R steps of a rollout, E environments, N agents, F numbers of a joint observation, K parts of a joint action.
# B = R E rows.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from agent_server.architectures.policy_model import Moments, PolicyModel
from agent_server.rl.config import PolicyConfig
from agent_server.rl.worlds import Episodes

# The squared error enters with a half, as in the method's paper and its references.
_VALUE_WEIGHT = 0.5
_LEAST_DEVIATION = 1e-8


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What the policy did and what came of it.

    present: who acted. returns: of the episodes that ended, the mean over the agents.
    """

    observation_BF: Tensor
    action_BK: Tensor
    log_probability_BN: Tensor
    value_BN: Tensor
    advantage_BN: Tensor
    target_BN: Tensor
    present_BN: Tensor
    returns: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.observation_BF)


class RewardScale:
    """Divides rewards by the deviation of the discounted return, one for each agent; `state` goes into checkpoints."""

    def __init__(self, environments: int, agents: int, discount: float) -> None:
        self._discount = discount
        self._running_EN = torch.zeros(environments, agents, dtype=torch.float64)
        self._moments = Moments(agents)

    def scale(self, reward_EN: Tensor, done_EN: Tensor) -> Tensor:
        """Take in rewards and return them scaled. Before anything is known they stay as they are."""
        self._running_EN = self._running_EN * self._discount + reward_EN.double()
        self._moments.add(self._running_EN)
        self._running_EN = self._running_EN * ~done_EN
        return (reward_EN * (self._moments.variance_F + _LEAST_DEVIATION).rsqrt()).float()

    def state(self) -> dict[str, Tensor]:
        """Return all that it has seen."""
        held = {name: value.clone() for name, value in self._moments.named_buffers()}
        return {**held, "running_EN": self._running_EN.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what another one has seen."""
        self._running_EN = state["running_EN"].clone()
        self._moments.load_state_dict({name: value for name, value in state.items() if name != "running_EN"})


@torch.no_grad()
def collect(
    model: PolicyModel,
    episodes: Episodes,
    config: PolicyConfig,
    generator: torch.Generator,
    scale: RewardScale | None,
    *,
    between: Callable[[], None],
) -> Rollout:
    """Let the policy act for a rollout. `between` runs before each step and may raise."""
    seen, taken, rewards, presents, ends, futures, returns = [], [], [], [], [], [], list[float]()
    for _ in range(config.rollout_steps):
        between()
        observation_EF = torch.from_numpy(episodes.observation_EF)
        presents.append(torch.from_numpy(episodes.present_EN))
        action_EK = model.draw(observation_EF, generator)
        led_to = episodes.step(action_EK.numpy())
        terminated_EN, truncated_EN = torch.from_numpy(led_to.terminated_EN), torch.from_numpy(led_to.truncated_EN)
        done_EN = terminated_EN | truncated_EN
        reward_EN = torch.from_numpy(led_to.reward_EN)
        future_EN = torch.zeros_like(reward_EN)
        if truncated_EN.any():
            future_EN = model.values(torch.from_numpy(led_to.final_EF)) * truncated_EN
        seen.append(observation_EF)
        taken.append(action_EK)
        rewards.append(reward_EN if scale is None else scale.scale(reward_EN, done_EN))
        ends.append(done_EN)
        futures.append(future_EN)
        returns += led_to.returns
    observation_BF, action_BK = torch.cat(seen), torch.cat(taken)
    judged = model.judge(observation_BF, action_BK)
    value_REN = judged.value_BN.view(config.rollout_steps, config.environments, -1)
    present_REN = torch.stack(presents)
    advantage_REN = advantages(
        torch.stack(rewards), value_REN, model.values(torch.from_numpy(episodes.observation_EF)), torch.stack(ends),
        torch.stack(futures), present_REN, discount=config.discount, decay=config.advantage_decay,
    )  # fmt: skip
    return Rollout(
        observation_BF=observation_BF,
        action_BK=action_BK,
        log_probability_BN=judged.log_probability_BN,
        value_BN=judged.value_BN,
        advantage_BN=advantage_REN.flatten(0, 1),
        target_BN=(advantage_REN + value_REN).flatten(0, 1),
        present_BN=present_REN.flatten(0, 1),
        returns=tuple(returns),
    )


def advantages(
    reward_REN: Tensor,
    value_REN: Tensor,
    last_value_EN: Tensor,
    done_REN: Tensor,
    future_REN: Tensor,
    present_REN: Tensor,
    *,
    discount: float,
    decay: float,
) -> Tensor:
    """Return generalized advantage estimates, [R, E, N]; 0 where an agent did not act.

    last_value: of what is seen after the rollout. future: what an agent's part that was cut off in this step would
    still have been worth; 0 elsewhere.
    """
    advantage_REN = torch.zeros_like(reward_REN)
    running_EN, next_value_EN = torch.zeros_like(last_value_EN), last_value_EN
    for r in reversed(range(len(reward_REN))):
        goes_on_EN = (~done_REN[r]).float()
        after_EN = next_value_EN * goes_on_EN + future_REN[r]
        delta_EN = reward_REN[r] + discount * after_EN - value_REN[r]
        running_EN = (delta_EN + discount * decay * goes_on_EN * running_EN) * present_REN[r]
        advantage_REN[r] = running_EN
        next_value_EN = value_REN[r]
    return advantage_REN


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update was like: means over its steps, by learner and then over the learners.

    drift_N: mean of (ratio - 1) - log ratio over what each agent did: an estimate of KL(old || new) of the whole
    update, in nats and never negative (Schulman 2020, "Approximating KL Divergence", k3).
    lost: learners whose gradient was not finite at some step, and who were not moved by it.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    clip_share: float
    explained_variance: float | None
    gradient_norm: float
    drift_N: tuple[float, ...]
    lost: tuple[int, ...]


class Updater:
    """Takes the gradient steps of an update."""

    def __init__(self, model: PolicyModel, optimizer: optim.Optimizer, config: PolicyConfig) -> None:
        self._model, self._optimizer, self._config = model, optimizer, config
        self._groups = model.groups()

    def update(
        self,
        rollout: Rollout,
        generator: torch.Generator,
        set_rate: Callable[[int], None],
        *,
        between: Callable[[], None],
    ) -> Update:
        """Learn from a rollout. set_rate: sets the learning rate of the update's step, counted from 0."""
        totals, lost, steps = _Totals(), set[int](), 0
        for _ in range(self._config.epochs):
            order = torch.randperm(len(rollout), generator=generator)
            for rows in order.tensor_split(self._config.minibatches):
                between()
                set_rate(steps)
                lost |= self._step(rollout, rows, totals)
                steps += 1
        return totals.mean(drift_N=self._drift(rollout), explained=_explained(rollout), lost=tuple(sorted(lost)))

    def _step(self, rollout: Rollout, rows: Tensor, totals: _Totals) -> set[int]:
        judged = self._model.judge(rollout.observation_BF[rows], rollout.action_BK[rows])
        ratio_BN = (judged.log_probability_BN - rollout.log_probability_BN[rows]).exp()
        lost, losses = set[int](), list[Tensor]()
        for number, (members, _) in enumerate(self._groups):
            present = rollout.present_BN[rows][:, members]
            if not present.any():
                continue
            ratio = ratio_BN[:, members][present]
            advantage = rollout.advantage_BN[rows][:, members][present]
            if len(advantage) > 1:
                advantage = (advantage - advantage.mean()) / (advantage.std() + _LEAST_DEVIATION)
            c = self._config.clip_range
            policy_loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - c, 1 + c)).mean()
            error = (rollout.target_BN[rows][:, members] - judged.value_BN[:, members])[present]
            value_loss, entropy = error.square().mean(), judged.entropy_BN[:, members][present].mean()
            loss = policy_loss + _VALUE_WEIGHT * value_loss - self._config.entropy_weight * entropy
            if not math.isfinite(loss.item()):
                lost.add(number)
                continue
            losses.append(loss)
            clipped = ((ratio - 1).abs() > c).float().mean()
            totals.add(policy_loss.item(), value_loss.item(), entropy.item(), clipped.item())
        self._optimizer.zero_grad(set_to_none=True)
        if losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            lost |= self._clip(totals)
            self._optimizer.step()
        return lost

    def _clip(self, totals: _Totals) -> set[int]:
        """Clip each learner's gradient. One that is not finite is dropped; return whose."""
        lost, squares = set[int](), 0.0
        for number, (_, parameters) in enumerate(self._groups):
            norm = float(nn.utils.clip_grad_norm_(parameters, self._config.optimization.clip_norm))
            if math.isfinite(norm):
                squares += norm**2
                continue
            lost.add(number)
            for parameter in parameters:
                parameter.grad = None
        totals.norms.append(math.sqrt(squares))
        return lost

    @torch.no_grad()
    def _drift(self, rollout: Rollout) -> tuple[float, ...]:
        judged = self._model.judge(rollout.observation_BF, rollout.action_BK)
        log_BN = judged.log_probability_BN - rollout.log_probability_BN
        drift_BN = torch.expm1(log_BN) - log_BN
        drifts = []
        for i in range(drift_BN.shape[1]):
            mine = drift_BN[:, i][rollout.present_BN[:, i]]
            drifts.append(float(mine.mean()) if len(mine) else 0.0)
        return tuple(drifts)


class _Totals:
    """Sums over an update's steps and learners."""

    def __init__(self) -> None:
        self.sums = [0.0] * 4
        self.count = 0
        self.norms: list[float] = []

    def add(self, *values: float) -> None:
        self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        self.count += 1

    def mean(self, *, drift_N: tuple[float, ...], explained: float | None, lost: tuple[int, ...]) -> Update:
        policy, value, entropy, clipped = (total / self.count if self.count else math.nan for total in self.sums)
        return Update(
            policy_loss=policy,
            value_loss=value,
            entropy=entropy,
            clip_share=clipped,
            explained_variance=explained,
            gradient_norm=sum(self.norms) / len(self.norms) if self.norms else math.nan,
            drift_N=drift_N,
            lost=lost,
        )


def _explained(rollout: Rollout) -> float | None:
    """Return the share of the targets' variance that the critics had foreseen; None where they do not vary."""
    target, value = rollout.target_BN[rollout.present_BN], rollout.value_BN[rollout.present_BN]
    variance = float(target.var(correction=0))
    return 1 - float((target - value).var(correction=0)) / variance if variance > 0 else None
