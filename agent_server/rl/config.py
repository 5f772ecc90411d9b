"""What policy optimization is told: `PolicyConfig`, free of torch, with every default of the contract filled in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from agent_server.architectures.factory import SettingValue
from agent_server.optim import Optimization
from agent_server.train_config import default_validation_interval
from cognateforge.exceptions import FieldViolation, InvalidFieldError

_MOST_STEPS = 10_000_000  # the contract's bound on total_steps


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Everything that decides a run, besides the environment's code.

    agent: family of the agent. parent: the agent that it goes on from, for the card, and its digest.
    environment, modules: its name, and the modules that it may be in. agents: how many act.
    coordination: independent, shared_parameters or centralized_critic.
    rollout_steps: of each environment between two updates. environment_steps: of all environments together; the last
    rollout is whole. clip_range, discount, advantage_decay, entropy_weight: of the method (`agent_server.rl.ppo`).
    checkpoint_interval_steps: gradient steps after which the next rollout's end is saved.
    validation_interval_steps: the same for measuring on the way; 0 means a quarter of the run.
    evaluation_episodes: whole episodes of each measurement.
    settings: the architecture's, with every default filled in.

    Errors: InvalidFieldError, naming every field that breaks a rule.
    """

    agent: str
    environment: str
    task: str = "reinforcement"
    architecture: str = "policy"
    modules: tuple[str, ...] = ()
    agents: int = 1
    coordination: str = "shared_parameters"
    rollout_steps: int = 128
    environments: int = 8
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    advantage_decay: float = 0.95
    clip_range: float = 0.2
    entropy_weight: float = 0.0
    environment_steps: int = 100_000
    evaluation_episodes: int = 20
    optimization: Optimization = field(default_factory=Optimization)
    seed: int = 0
    checkpoint_interval_steps: int = 100
    validation_interval_steps: int = 0
    settings: dict[str, SettingValue] = field(default_factory=dict)
    parent: str = ""
    parent_digest: str = ""

    def __post_init__(self) -> None:
        samples = self.rollout_steps * self.environments
        rules = (
            ("agent", bool(self.agent), "must not be empty"),
            ("task", self.task in ("reinforcement", "multi_agent"), "must be reinforcement or multi_agent"),
            ("agents", 1 <= self.agents <= 64, "must be 1 to 64"),
            ("rollout_steps", 1 <= self.rollout_steps <= 65_536, "must be 1 to 65,536"),
            ("environments", 1 <= self.environments <= 1024, "must be 1 to 1,024"),
            ("epochs", 1 <= self.epochs <= 64, "must be 1 to 64"),
            (
                "minibatches",
                samples < 1 or 1 <= self.minibatches <= samples,
                f"must be 1 to the samples of a rollout ({samples}, rollout_steps times environments)",
            ),
            ("discount", 0 < self.discount <= 1, "must be above 0 and at most 1"),
            ("advantage_decay", 0 < self.advantage_decay <= 1, "must be above 0 and at most 1"),
            ("clip_range", 0 < self.clip_range <= 1, "must be above 0 and at most 1"),
            ("entropy_weight", 0 <= self.entropy_weight <= 1, "must be 0 to 1"),
            ("environment_steps", 1 <= self.environment_steps <= 10**10, "must be 1 to 10,000,000,000"),
            ("evaluation_episodes", 1 <= self.evaluation_episodes <= 10_000, "must be 1 to 10,000"),
            ("seed", 0 <= self.seed < 2**32, "must be 0 to 4,294,967,295"),
            ("checkpoint_interval_steps", self.checkpoint_interval_steps >= 1, "must be at least 1"),
            ("validation_interval_steps", self.validation_interval_steps >= 0, "must be at least 0"),
        )
        violations = [
            FieldViolation(field=name, description=f"{rule}, not {getattr(self, name)!r}")
            for name, holds, rule in rules
            if not holds
        ]
        if not violations and self.total_steps > _MOST_STEPS:
            description = f"make {self.total_steps:,} gradient steps, more than {_MOST_STEPS:,}; take longer rollouts"
            violations.append(FieldViolation(field="environment_steps", description=description))
        if not violations:
            violations += self.optimization.violations("optimization.", self.total_steps)
        if violations:
            text = "; ".join(f"{v.field} {v.description}" for v in violations)
            raise InvalidFieldError(f"the training plan cannot be run: {text}", violations=violations)

    @property
    def updates(self) -> int:
        """How often the policy is updated: once for each rollout."""
        return -(-self.environment_steps // (self.rollout_steps * self.environments))

    @property
    def validation_interval(self) -> int:
        """Gradient steps between validations, with the default filled in."""
        return self.validation_interval_steps or default_validation_interval(self.total_steps)

    @property
    def steps_of_update(self) -> int:
        """Gradient steps of an update."""
        return self.epochs * self.minibatches

    @property
    def total_steps(self) -> int:
        """Gradient steps of the run."""
        return self.updates * self.steps_of_update

    def digest(self) -> str:
        """Return a digest that two runs share when their steps are the same ones: a checkpoint is bound to it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
