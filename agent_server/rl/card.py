"""The model card of a published policy: where it acts, what it was made of, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent_server.evaluation import Evaluation
from agent_server.rl.config import PolicyConfig
from agent_server.rl.spaces import AgentSpaces

_MEANINGS: Mapping[str, str] = {
    "return_before": "mean return of the untrained policy",
    "return_random": "mean return of random actions",
    "return_after": "mean return",
    "coordination": "return that is lost when each agent acts on another episode's observations",
}


def policy_card(
    config: PolicyConfig,
    *,
    agents: Sequence[AgentSpaces],
    parameters: int,
    environment_steps: int,
    evaluations: Sequence[Evaluation],
) -> str:
    """Return the card as Markdown. Every number in it was measured or counted in this run."""
    measured = "\n".join(
        f"| {_MEANINGS.get(e.metric, e.metric)} | {e.dataset} | {e.value:.4f} | {e.rows} |" for e in evaluations
    )
    acting = "\n".join(f"- {a.name}: sees {_told(a, 'observation')}, gives {_told(a, 'action')}" for a in agents)
    together = "" if len(agents) == 1 else f", {config.coordination.replace('_', ' ')}"
    made_of = f"{config.parent} ({config.parent_digest})" if config.parent else "Random values"
    optimization = config.optimization
    return f"""# {config.agent}

Acts in {config.environment}{together}.

{acting}

## Made of

- {made_of}, architecture {config.architecture}
- Proximal policy optimization over {environment_steps:,} steps of {config.environments} environments side by side: \
{config.updates} rollouts of {config.rollout_steps} steps, {config.epochs} passes over each, \
{config.minibatches} parts
- {parameters:,} parameters, all of them trained; {optimization.optimizer.value}, peak learning rate \
{optimization.lr:g}, schedule {optimization.schedule.value}, seed {config.seed}

## Measured

| what | where | value | episodes |
| --- | --- | --- | --- |
{measured}

It acts by its likeliest action; the same episodes, begun by the same seeds, were played by all. The files, read back,
gave exactly the trained policy's actions.

## Limits

The figures are of the environment as it was installed. Another version, other rewards or other dynamics may be acted in
worse, and nothing keeps the policy from actions that the environment's rewards did not punish.
"""


def _told(agent: AgentSpaces, what: str) -> str:
    space = agent.observation if what == "observation" else agent.action
    if space.kind in ("box", "multi_binary"):
        numbers = space.width if what == "observation" or space.kind == "box" else space.parts
        return f"{numbers} {'numbers' if space.kind == 'box' else 'bits'}"
    choices = " x ".join(map(str, space.counts))
    return f"one of {choices}" if space.kind == "discrete" else f"one of each of {choices}"
