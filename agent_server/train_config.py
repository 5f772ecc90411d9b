"""What a training run is told: `AgentTrainConfig`, free of torch, with every default of the contract filled in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from agent_server.adaptation import Adaptation, Lora
from agent_server.optim import Optimization, OptimizerKind, Schedule
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import FieldViolation, InvalidFieldError

_SCHEDULES = {
    pb.SCHEDULE_UNSPECIFIED: Schedule.COSINE,
    pb.SCHEDULE_CONSTANT: Schedule.CONSTANT,
    pb.SCHEDULE_LINEAR: Schedule.LINEAR,
    pb.SCHEDULE_COSINE: Schedule.COSINE,
}


@dataclass(frozen=True, kw_only=True)
class AgentTrainConfig:
    """Everything that decides a run, besides the data and the foundation's bytes.

    agent: family of the agent. foundation, foundation_digest: what it is made of, for the model card.
    total_steps: optimizer steps. batch_size: rows in a step.
    seed: of the head, the adapters, the row order and dropout.
    checkpoint_interval_steps, progress_interval_steps: finished steps between two checkpoints, two progress rows.
    validation_interval_steps: 0 means a quarter of the run.
    evaluation_rows: test rows that before and after are measured on, the same ones for both; 0 means all.
    validation_rows: as evaluation_rows, for each measurement on the way.
    max_tokens: longer texts are cut off.

    Errors: InvalidFieldError, naming every field that breaks a rule.
    """

    agent: str
    total_steps: int
    architecture: str = "cognate"
    task: str = "classification"
    foundation: str = ""
    foundation_digest: str = ""
    adaptation: Adaptation = field(default_factory=Adaptation)
    optimization: Optimization = field(default_factory=Optimization)
    batch_size: int = 32
    seed: int = 0
    checkpoint_interval_steps: int = 100
    progress_interval_steps: int = 10
    validation_interval_steps: int = 0
    evaluation_rows: int = 1000
    validation_rows: int = 200
    max_tokens: int = 128

    def __post_init__(self) -> None:
        rules = (
            ("agent", bool(self.agent), "must not be empty"),
            ("architecture", bool(self.architecture), "must not be empty"),
            ("total_steps", 1 <= self.total_steps <= 10_000_000, "must be 1 to 10,000,000"),
            ("batch_size", 1 <= self.batch_size <= 4096, "must be 1 to 4,096"),
            ("seed", 0 <= self.seed < 2**32, "must be 0 to 4,294,967,295"),
            ("checkpoint_interval_steps", self.checkpoint_interval_steps >= 1, "must be at least 1"),
            ("progress_interval_steps", self.progress_interval_steps >= 1, "must be at least 1"),
            ("validation_interval_steps", self.validation_interval_steps >= 0, "must be at least 0"),
            ("evaluation_rows", self.evaluation_rows >= 0, "must be at least 0"),
            ("validation_rows", self.validation_rows >= 0, "must be at least 0"),
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
        )
        violations = [
            FieldViolation(field=name, description=f"{rule}, not {getattr(self, name)!r}")
            for name, holds, rule in rules
            if not holds
        ]
        violations += self.adaptation.violations("adaptation.")
        violations += self.optimization.violations("optimization.", self.total_steps)
        if violations:
            text = "; ".join(f"{v.field} {v.description}" for v in violations)
            raise InvalidFieldError(f"the training plan cannot be run: {text}", violations=violations)

    def digest(self) -> str:
        """Return a digest that two runs share when their steps are the same ones: a checkpoint is bound to it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def from_plan(plan: pb.TrainingPlan, *, foundation: str = "", foundation_digest: str = "") -> AgentTrainConfig:
    """Return the configuration of a plan, with the contract's defaults where the plan has zeros.

    Errors: InvalidFieldError.
    """
    optimization = plan.optimization
    return AgentTrainConfig(
        agent=plan.agent,
        architecture=plan.architecture,
        task=plan.WhichOneof("task") or "",
        foundation=foundation,
        foundation_digest=foundation_digest,
        adaptation=adaptation_of(plan),
        optimization=Optimization(
            optimizer=OptimizerKind(optimization.WhichOneof("optimizer") or OptimizerKind.ADAMW),
            lr=optimization.peak_learning_rate or Optimization.lr,
            weight_decay=optimization.adamw.weight_decay or Optimization.weight_decay,
            momentum=optimization.sgd.momentum,
            schedule=_SCHEDULES[optimization.schedule],
            warmup_steps=optimization.warmup_steps or None,
            clip_norm=optimization.gradient_clip_norm or Optimization.clip_norm,
        ),
        total_steps=plan.total_steps,
        batch_size=plan.batch_size or AgentTrainConfig.batch_size,
        seed=plan.seed,
        checkpoint_interval_steps=plan.checkpoint_interval_steps or AgentTrainConfig.checkpoint_interval_steps,
    )


def adaptation_of(plan: pb.TrainingPlan) -> Adaptation:
    """Return how much of the base a plan trains."""
    adaptation, lora = plan.adaptation, None
    if adaptation.WhichOneof("method") == "lora":
        asked = adaptation.lora
        lora = Lora(rank=asked.rank or Lora.rank, alpha=asked.alpha, dropout=asked.dropout)
    return Adaptation(lora=lora, unfreeze_act_ltm=adaptation.unfreeze_act_ltm)
