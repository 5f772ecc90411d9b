"""What a training run is told: `AgentTrainConfig`, free of torch, with every default of the contract filled in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_server.adaptation import Adaptation, Bottleneck, Freezing, Lora
from agent_server.architectures.settings import SettingValue
from agent_server.optim import EarlyStopping, Optimization, OptimizerKind, Precision, Schedule
from agent_server.recovery import RecoveryLimits
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import FieldViolation, InvalidFieldError

_SCHEDULES = {
    pb.SCHEDULE_UNSPECIFIED: Schedule.COSINE,
    pb.SCHEDULE_CONSTANT: Schedule.CONSTANT,
    pb.SCHEDULE_LINEAR: Schedule.LINEAR,
    pb.SCHEDULE_COSINE: Schedule.COSINE,
    pb.SCHEDULE_ONE_CYCLE: Schedule.ONE_CYCLE,
    pb.SCHEDULE_PLATEAU: Schedule.PLATEAU,
}
_PRECISIONS = {
    pb.PRECISION_UNSPECIFIED: Precision.FLOAT32,
    pb.PRECISION_FLOAT32: Precision.FLOAT32,
    pb.PRECISION_BFLOAT16: Precision.BFLOAT16,
}
# The contract's bounds.
_MAX_REHEARSAL_SHARE = 0.9
_MAX_BETA = 10


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What an agent's actions have to keep to, measured at every validation.

    allowed_actions: kinds of actions; empty means those that the demonstrations show.
    max_violation_share: largest share of validation actions that may break them.
    """

    allowed_actions: tuple[str, ...] = ()
    max_violation_share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class AgentTrainConfig:
    """Everything that decides a run, besides the data and the foundation's bytes.

    agent: family of the agent. foundation, foundation_digest: what it is made of, for the model card.
    settings: the architecture's.
    total_steps: optimizer steps. batch_size: rows in a step.
    seed: of the head, the adapters, the row order and dropout.
    checkpoint_interval_steps, progress_interval_steps: finished steps between two checkpoints, two progress rows.
    validation_interval_steps: 0 means a quarter of the run.
    evaluation_rows: test rows that before and after are measured on, the same ones for both; 0 means all.
    validation_rows: as evaluation_rows, for each measurement on the way.
    max_tokens: longer texts are cut off.
    rehearsal_share: share of each step's rows that come from an earlier set.
    beta: how strongly preference training holds the agent to its base.
    constraints: on an agent's behaviour, or None where none are measured.
    recovery: the detectors' numbers; tests use shorter windows.

    Errors: InvalidFieldError, naming every field that breaks a rule.
    """

    agent: str
    total_steps: int
    architecture: str = "cognate"
    task: str = "classification"
    foundation: str = ""
    foundation_digest: str = ""
    settings: dict[str, SettingValue] = field(default_factory=dict)
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
    rehearsal_share: float = 0.0
    beta: float = 0.1
    constraints: Constraints | None = None
    recovery: RecoveryLimits = field(default_factory=RecoveryLimits)

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
            (
                "rehearsal_share",
                0 <= self.rehearsal_share <= _MAX_REHEARSAL_SHARE,
                f"must be 0 to {_MAX_REHEARSAL_SHARE}",
            ),
            ("beta", 0 < self.beta <= _MAX_BETA, f"must be above 0 and at most {_MAX_BETA}"),
            (
                "constraints",
                self.constraints is None or 0 < self.constraints.max_violation_share <= 1,
                "must allow a share of violations above 0 and at most 1",
            ),
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

    @property
    def validation_interval(self) -> int:
        """Steps between validations, with the default filled in."""
        return self.validation_interval_steps or default_validation_interval(self.total_steps)

    def digest(self) -> str:
        """Return a digest that two runs share when their steps are the same ones: a checkpoint is bound to it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def default_validation_interval(total_steps: int) -> int:
    """Return a quarter of the run."""
    return max(1, total_steps // 4)


def from_plan(
    plan: pb.TrainingPlan,
    *,
    foundation: str = "",
    foundation_digest: str = "",
    settings: Mapping[str, SettingValue] | None = None,
) -> AgentTrainConfig:
    """Return the configuration of a plan, with the contract's defaults where the plan has zeros.

    settings: all of the architecture's, checked and with its defaults; None means as the plan gives them.
    Errors: InvalidFieldError.
    """
    return AgentTrainConfig(
        agent=plan.agent,
        architecture=plan.architecture,
        task=plan.WhichOneof("task") or "",
        foundation=foundation,
        foundation_digest=foundation_digest,
        settings=_given_settings(plan) if settings is None else dict(settings),
        adaptation=adaptation_of(plan),
        optimization=optimization_of(plan),
        total_steps=plan.total_steps,
        batch_size=plan.batch_size or AgentTrainConfig.batch_size,
        seed=plan.seed,
        checkpoint_interval_steps=plan.checkpoint_interval_steps or AgentTrainConfig.checkpoint_interval_steps,
        validation_interval_steps=plan.validation_interval_steps,
        max_tokens=plan.max_tokens or AgentTrainConfig.max_tokens,
        rehearsal_share=plan.rehearsal.share,
        beta=plan.preference.beta or AgentTrainConfig.beta,
        constraints=_constraints_of(plan.behavioural),
    )


def _given_settings(plan: pb.TrainingPlan) -> dict[str, SettingValue]:
    return {setting.name: getattr(setting, setting.WhichOneof("value") or "word") for setting in plan.settings}


def adaptation_of(plan: pb.TrainingPlan) -> Adaptation:
    """Return how much of the base a plan trains."""
    asked = plan.adaptation
    unfreeze = asked.unfreeze_act_ltm
    match asked.WhichOneof("method"):
        case "lora":
            lora = Lora(
                rank=asked.lora.rank or Lora.rank,
                alpha=asked.lora.alpha,
                dropout=asked.lora.dropout,
                weight_decomposed=asked.lora.weight_decomposed,
            )
            return Adaptation(lora=lora, unfreeze_act_ltm=unfreeze)
        case "head":
            return Adaptation(head=True, unfreeze_act_ltm=unfreeze)
        case "freezing":
            freezing = Freezing(trained_blocks=asked.freezing.trained_blocks or Freezing.trained_blocks)
            return Adaptation(freezing=freezing, unfreeze_act_ltm=unfreeze)
        case "bottleneck":
            bottleneck = Bottleneck(width=asked.bottleneck.width or Bottleneck.width)
            return Adaptation(bottleneck=bottleneck, unfreeze_act_ltm=unfreeze)
        case _:
            return Adaptation(unfreeze_act_ltm=unfreeze)


def optimization_of(plan: pb.TrainingPlan) -> Optimization:
    """Return which optimizer a plan asks for, how fast, and how a step is computed."""
    asked = plan.optimization
    stopping = None
    if asked.HasField("early_stopping"):
        stopping = EarlyStopping(
            patience=asked.early_stopping.patience or EarlyStopping.patience,
            min_improvement=asked.early_stopping.min_improvement,
        )
    return Optimization(
        optimizer=OptimizerKind(asked.WhichOneof("optimizer") or OptimizerKind.ADAMW),
        lr=asked.peak_learning_rate or Optimization.lr,
        weight_decay=asked.adamw.weight_decay or Optimization.weight_decay,
        momentum=asked.sgd.momentum,
        schedule=_SCHEDULES[asked.schedule],
        warmup_steps=asked.warmup_steps or None,
        clip_norm=asked.gradient_clip_norm or Optimization.clip_norm,
        accumulation_steps=asked.accumulation_steps or Optimization.accumulation_steps,
        precision=_PRECISIONS[asked.precision],
        early_stopping=stopping,
    )


def _constraints_of(task: pb.BehaviouralTask) -> Constraints | None:
    if not task.HasField("constraints"):
        return None
    return Constraints(
        allowed_actions=tuple(task.constraints.allowed_actions),
        max_violation_share=task.constraints.max_violation_share or Constraints.max_violation_share,
    )
