"""Optimizers are torch's own, rates are those that the contract names, and what validations decide is a state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from agent_server.adaptation import Adaptation, Bottleneck, Freezing, Lora
from agent_server.optim import (
    EarlyStopping,
    Optimization,
    OptimizerKind,
    PlateauState,
    Precision,
    Schedule,
    StoppingState,
    build_optimizer,
    computing,
    lr_factor,
    set_lr,
    warmup_steps,
)
from agent_server.plan import with_defaults
from agent_server.train_config import AgentTrainConfig, Constraints, from_plan
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import InvalidFieldError


def factors(schedule: Schedule, *, total_steps: int = 20, warmup_steps: int = 4) -> list[float]:
    return [
        lr_factor(step, total_steps=total_steps, warmup_steps=warmup_steps, schedule=schedule)
        for step in range(total_steps + 1)
    ]


@pytest.mark.parametrize("schedule", [one for one in Schedule if one is not Schedule.ONE_CYCLE])
def test_schedules_start_warm(schedule: Schedule) -> None:
    """The factor rises over the warm-up and is 1 at its end."""
    assert factors(schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_schedules_end_low() -> None:
    """After the warm-up the factor falls as the contract says."""
    assert factors(Schedule.CONSTANT)[-1] == 1.0
    assert factors(Schedule.LINEAR)[-1] == 0.0
    assert pytest.approx(factors(Schedule.COSINE)[-1]) == 0.1
    assert factors(Schedule.COSINE)[4:] == sorted(factors(Schedule.COSINE)[4:], reverse=True)


@pytest.mark.parametrize("steps", [7, 10, 100, 333])
def test_one_cycle_is_torchs(steps: int) -> None:
    """Every step's rate is that of OneCycleLR with a peak at 30 % and an end at a ten-thousandth of it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=0.3, final_div_factor=400, cycle_momentum=False
    )
    expected = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        expected.append(float(optimizer.param_groups[0]["lr"]))
    assert pytest.approx(expected, rel=1e-9) == factors(Schedule.ONE_CYCLE, total_steps=steps)[:steps]
    assert pytest.approx(1e-4) == expected[-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_cycle_of_few_steps_stays_within_its_bounds(steps: int) -> None:
    """Where there is no room for a rise the run begins at the peak, and no step has a rate of nothing."""
    got = factors(Schedule.ONE_CYCLE, total_steps=steps)[:steps]
    assert all(1e-4 <= factor <= 1 for factor in got)
    assert (1.0 if steps == 1 else pytest.approx(1e-4)) == got[-1]


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_is_torchs(seed: int, higher_is_better: bool) -> None:
    """On random validations, with ties and values that are no numbers, the rate is that of ReduceLROnPlateau."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max" if higher_is_better else "min", factor=0.1, patience=2, threshold=0.0, eps=0.0
    )
    scores = (torch.randint(0, 21, (40,), generator=torch.Generator().manual_seed(seed)) / 20).tolist()
    state = PlateauState()
    for number, score in enumerate([*scores[:7], math.nan, *scores[7:]]):
        scheduler.step(score)
        state = state.after(score, higher_is_better=higher_is_better)
        factor = lr_factor(number, total_steps=50, warmup_steps=0, schedule=Schedule.PLATEAU, falls=state.falls)
        assert pytest.approx(float(optimizer.param_groups[0]["lr"])) == factor
    assert state.falls >= 3
    assert state == PlateauState.from_json(json.loads(json.dumps(state.to_json())))


def after(scores: Sequence[float], config: EarlyStopping, *, higher_is_better: bool = True) -> StoppingState:
    state = StoppingState()
    for step, score in enumerate(scores, 1):
        state = state.after(score, step=step, config=config, higher_is_better=higher_is_better)
    return state


@pytest.mark.parametrize(
    ("scores", "config", "higher", "expected", "ends"),
    [
        ([0.5, 0.6, 0.6, 0.5], EarlyStopping(patience=3), True, StoppingState(best=0.6, best_step=2, misses=2), False),
        ([0.5, 0.6, 0.6, 0.5], EarlyStopping(patience=2), True, StoppingState(best=0.6, best_step=2, misses=2), True),
        ([2.0, 1.5, 1.9], EarlyStopping(patience=1), False, StoppingState(best=1.5, best_step=2, misses=1), True),
        (
            [0.5, 0.625, 0.75],
            EarlyStopping(patience=2, min_improvement=0.25),
            True,
            StoppingState(best=0.75, best_step=3),
            False,
        ),
        (
            [0.5, 0.625, 0.6875],
            EarlyStopping(patience=2, min_improvement=0.25),
            True,
            StoppingState(best=0.5, best_step=1, misses=2),
            True,
        ),
        ([math.nan, 0.1], EarlyStopping(patience=1), True, StoppingState(best=0.1, best_step=2), False),
    ],
)
def test_a_run_ends_when_its_patience_is_over(
    scores: list[float], config: EarlyStopping, higher: bool, expected: StoppingState, ends: bool
) -> None:
    """Misses count in a row; an improvement below the least one is a miss; the best one and its step are kept."""
    state = after(scores, config, higher_is_better=higher)
    assert (expected, ends) == (state, state.ends(config))
    assert state == StoppingState.from_json(json.loads(json.dumps(state.to_json())))


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        (OptimizerKind.ADAMW, torch.optim.AdamW),
        (OptimizerKind.ADAM, torch.optim.Adam),
        (OptimizerKind.SGD, torch.optim.SGD),
    ],
)
def test_only_standard_optimizers_are_built(kind: OptimizerKind, cls: type[torch.optim.Optimizer]) -> None:
    """Each kind is torch's own class; decay goes to AdamW's matrices alone, and the head has its own rate."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    config = Optimization(optimizer=kind, lr=0.1, head_lr_scale=2.0, weight_decay=0.5)
    optimizer = build_optimizer(config, base=list(model[0].parameters()), head=list(model[1].parameters()))
    assert cls is type(optimizer)
    decay = 0.5 if kind is OptimizerKind.ADAMW else 0.0
    set_lr(optimizer, 0.5)
    assert [(0.05, decay), (0.05, 0.0), (0.1, decay), (0.1, 0.0)] == [
        (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    ]


def test_bfloat16_is_for_products_and_float32_for_losses() -> None:
    """Under autocast a linear map gives 16 bits and a cross-entropy 32; without, everything has 32."""
    model, x = nn.Linear(4, 3), torch.ones(2, 4)
    with computing(Precision.BFLOAT16):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert (torch.bfloat16, torch.float32) == (logits.dtype, loss.dtype)
    with computing(Precision.FLOAT32):
        assert torch.float32 is model(x).dtype


def test_a_bad_configuration_names_every_field() -> None:
    """All violations come at once, each under its field's name."""
    with pytest.raises(InvalidFieldError) as error:
        AgentTrainConfig(
            agent="",
            total_steps=0,
            batch_size=0,
            rehearsal_share=1.0,
            beta=0,
            constraints=Constraints(max_violation_share=0),
            adaptation=Adaptation(
                lora=Lora(rank=0), freezing=Freezing(trained_blocks=0), bottleneck=Bottleneck(width=0)
            ),
            optimization=Optimization(
                lr=2.0,
                warmup_steps=5,
                accumulation_steps=0,
                early_stopping=EarlyStopping(patience=0, min_improvement=-1),
            ),
        )
    assert [violation.field for violation in error.value.violations] == [
        "agent",
        "total_steps",
        "batch_size",
        "rehearsal_share",
        "beta",
        "constraints",
        "adaptation.method",
        "adaptation.lora.rank",
        "adaptation.freezing.trained_blocks",
        "adaptation.bottleneck.width",
        "optimization.lr",
        "optimization.warmup_steps",
        "optimization.accumulation_steps",
        "optimization.early_stopping.patience",
        "optimization.early_stopping.min_improvement",
    ]


def plan(**fields: object) -> pb.TrainingPlan:
    asked = pb.TrainingPlan(
        agent="intent-router",
        architecture="cognate",
        classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=1)),
        adaptation=pb.Adaptation(full=pb.FullAdaptation()),
        optimization=pb.Optimization(adamw=pb.AdamW()),
        total_steps=50,
        seed=7,
    )
    asked.MergeFrom(pb.TrainingPlan(**fields))  # type: ignore[arg-type]
    return asked


def test_a_plan_becomes_a_configuration_with_defaults() -> None:
    """Zeros of the contract mean its documented defaults, and what is set stays as it is."""
    asked = plan(
        adaptation=pb.Adaptation(lora=pb.LoraAdaptation(weight_decomposed=True)),
        optimization=pb.Optimization(
            sgd=pb.Sgd(momentum=0.9),
            schedule=pb.SCHEDULE_PLATEAU,
            accumulation_steps=4,
            precision=pb.PRECISION_BFLOAT16,
            early_stopping=pb.EarlyStopping(min_improvement=0.25),
        ),
        validation_interval_steps=5,
        max_tokens=64,
        rehearsal=pb.Rehearsal(file=pb.FileSource(path="old.jsonl"), share=0.25),
        settings=[pb.ArchitectureSetting(name="layers", integer=2), pb.ArchitectureSetting(name="cell", word="gru")],
    )
    assert from_plan(asked, foundation="cognate-25m@7", foundation_digest="sha256:00") == AgentTrainConfig(
        agent="intent-router",
        architecture="cognate",
        task="classification",
        foundation="cognate-25m@7",
        foundation_digest="sha256:00",
        settings={"layers": 2, "cell": "gru"},
        adaptation=Adaptation(lora=Lora(rank=8, alpha=0, dropout=0, weight_decomposed=True)),
        optimization=Optimization(
            optimizer=OptimizerKind.SGD,
            lr=1e-3,
            momentum=0.9,
            schedule=Schedule.PLATEAU,
            accumulation_steps=4,
            precision=Precision.BFLOAT16,
            early_stopping=EarlyStopping(patience=3, min_improvement=0.25),
        ),
        total_steps=50,
        batch_size=32,
        seed=7,
        checkpoint_interval_steps=100,
        validation_interval_steps=5,
        max_tokens=64,
        rehearsal_share=0.25,
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (pb.Adaptation(head=pb.HeadAdaptation(), unfreeze_act_ltm=True), Adaptation(head=True, unfreeze_act_ltm=True)),
        (pb.Adaptation(freezing=pb.FreezingAdaptation()), Adaptation(freezing=Freezing(trained_blocks=1))),
        (
            pb.Adaptation(bottleneck=pb.BottleneckAdaptation(width=7)),
            Adaptation(bottleneck=Bottleneck(width=7)),
        ),
        (pb.Adaptation(full=pb.FullAdaptation()), Adaptation()),
    ],
)
def test_every_method_comes_out_of_its_plan(asked: pb.Adaptation, expected: Adaptation) -> None:
    """Each field of the contract's oneof gives its method, with the default where it has 0."""
    got = from_plan(plan(adaptation=asked)).adaptation
    assert (expected, asked.WhichOneof("method")) == (got, got.method)


def test_defaults_are_those_of_the_contract() -> None:
    """What a caller left at 0 is answered with what will be used."""
    filled = with_defaults(plan(total_steps=80, optimization=pb.Optimization(early_stopping=pb.EarlyStopping())))
    assert (32, 100, 20, 128, 0.1) == (
        filled.batch_size,
        filled.checkpoint_interval_steps,
        filled.validation_interval_steps,
        filled.max_tokens,
        filled.data_limits.max_refused_share,
    )
    optimization = filled.optimization
    assert (1e-3, pb.SCHEDULE_COSINE, 8, 1.0, 1, pb.PRECISION_FLOAT32, 3, 0.0, 0.01) == (
        optimization.peak_learning_rate,
        optimization.schedule,
        optimization.warmup_steps,
        optimization.gradient_clip_norm,
        optimization.accumulation_steps,
        optimization.precision,
        optimization.early_stopping.patience,
        optimization.early_stopping.min_improvement,
        optimization.adamw.weight_decay,
    )
    assert filled == with_defaults(filled)
    for adaptation, expected in (
        (pb.Adaptation(lora=pb.LoraAdaptation(rank=4)), pb.LoraAdaptation(rank=4, alpha=8)),
        (pb.Adaptation(freezing=pb.FreezingAdaptation()), pb.FreezingAdaptation(trained_blocks=1)),
        (pb.Adaptation(bottleneck=pb.BottleneckAdaptation()), pb.BottleneckAdaptation(width=32)),
    ):
        got = with_defaults(plan(adaptation=adaptation)).adaptation
        assert expected == getattr(got, got.WhichOneof("method") or "")


def test_a_filled_plan_trains_as_the_asked_one() -> None:
    """The server fills defaults in and the worker reads the filled plan: both are the same configuration."""
    for asked in (plan(total_steps=80), plan(total_steps=4), plan(adaptation=pb.Adaptation(lora=pb.LoraAdaptation()))):
        filled, config = from_plan(with_defaults(asked)), from_plan(asked)
        total = asked.total_steps
        assert warmup_steps(config.optimization, total) == warmup_steps(filled.optimization, total)
        assert config.validation_interval == filled.validation_interval
        assert (config.batch_size, config.max_tokens) == (filled.batch_size, filled.max_tokens)


def test_one_cycle_has_no_other_warm_up() -> None:
    """A warm-up that is not read is not made up."""
    asked = plan(optimization=pb.Optimization(schedule=pb.SCHEDULE_ONE_CYCLE))
    assert 0 == with_defaults(asked).optimization.warmup_steps


def test_tasks_have_their_defaults() -> None:
    """What belongs to one task is filled in for it, and nothing is said of rows where there are none."""
    rows = pb.FileSource(path="rows.jsonl")
    acting = with_defaults(plan(reinforcement=pb.ReinforcementTask(environment="CartPole-v1")))
    assert not acting.HasField("data_limits")
    asked = acting.reinforcement.policy_optimization
    assert (20, 128, 8, 4, 4) == (
        acting.reinforcement.evaluation_episodes,
        asked.rollout_steps,
        asked.environments,
        asked.epochs,
        asked.minibatches,
    )
    assert (0.99, 0.95, 0.2, 0.0, 100_000) == (
        asked.discount,
        asked.advantage_decay,
        asked.clip_range,
        asked.entropy_weight,
        asked.environment_steps,
    )
    together = with_defaults(plan(multi_agent=pb.MultiAgentTask(environment="mpe/simple_spread_v3", agents=3)))
    assert pb.COORDINATION_SHARED_PARAMETERS == together.multi_agent.coordination
    assert 0.1 == with_defaults(plan(preference=pb.PreferenceTask(file=rows))).preference.beta
    behavioural = pb.BehaviouralTask(file=rows, constraints=pb.BehaviouralConstraints(allowed_actions=["search"]))
    assert 0.05 == with_defaults(plan(behavioural=behavioural)).behavioural.constraints.max_violation_share
    assert Constraints(allowed_actions=("search",)) == from_plan(plan(behavioural=behavioural)).constraints
    assert not with_defaults(plan(behavioural=pb.BehaviouralTask(file=rows))).behavioural.HasField("constraints")


def test_every_field_decides_the_digest() -> None:
    """A checkpoint is bound to all of a configuration."""
    base = from_plan(plan())
    others = [
        plan(adaptation=pb.Adaptation(head=pb.HeadAdaptation())),
        plan(optimization=pb.Optimization(accumulation_steps=2)),
        plan(optimization=pb.Optimization(precision=pb.PRECISION_BFLOAT16)),
        plan(optimization=pb.Optimization(early_stopping=pb.EarlyStopping())),
        plan(settings=[pb.ArchitectureSetting(name="layers", integer=2)]),
        plan(max_tokens=64),
    ]
    assert 1 + len(others) == len({base.digest(), *(from_plan(other).digest() for other in others)})
    assert base.digest() == from_plan(plan()).digest()
