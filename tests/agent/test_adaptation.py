"""Adapters train what they say, merge into equal weights, and refuse to be merged into others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from agent_server.adaptation import (
    MERGE_TOLERANCE,
    Adaptation,
    Lora,
    ParameterCount,
    count_parameters,
    merge_checked,
    merge_lora,
)
from agent_server.architectures.cognate import CognateArchitecture
from agent_server.architectures.model import AgentBatch, AgentModel, collate
from agent_server.optim import Optimization, OptimizerKind, Schedule, build_optimizer, lr_factor, set_lr
from agent_server.train_config import AgentTrainConfig, from_plan
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import IntegrityCheckFailedError, InvalidFieldError
from tests.agent._support import TINY, toy_rows, write_foundation
from training_common.models.cognate_v1 import count_parameters as count_cognate

LABELS = 3


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(
        tmp_path_factory.mktemp("adaptation") / "foundation", [text for text, _ in toy_rows().train]
    )


@pytest.fixture
def build(foundation: Path) -> Callable[[Adaptation], AgentModel]:
    """Return a function that builds an agent on it."""

    def built(adaptation: Adaptation) -> AgentModel:
        labels = [str(i) for i in range(LABELS)]
        return CognateArchitecture().build(
            foundation_dir=foundation, task="classification", labels=labels, adaptation=adaptation, seed=0
        )

    return built


def batch_for(model: AgentModel) -> AgentBatch:
    texts, labels = zip(*toy_rows().train[:16], strict=True)
    return collate(model.encode(texts, max_tokens=64), labels)


def train_a_little(model: AgentModel, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = batch_for(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(batch).mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_lora_touches_every_linear_layer_of_the_blocks(build: Callable[[Adaptation], AgentModel]) -> None:
    """Each attention and feed-forward map has an adapter that gets a gradient; nothing else of the base does."""
    model = build(Adaptation(lora=Lora(rank=2)))
    model.loss(batch_for(model)).mean.backward()  # type: ignore[no-untyped-call]
    blocks = TINY.prelude_blocks + TINY.core_blocks + TINY.coda_blocks
    base = dict(model.base_model().named_parameters())
    moved = {name for name, p in base.items() if p.grad is not None and bool(p.grad.any())}
    # B starts at zero, so A gets a gradient only from the second step on.
    assert {name for name in base if "lora_B" in name} == moved
    assert 4 * blocks == len(moved)


def test_parameters_are_counted(build: Callable[[Adaptation], AgentModel]) -> None:
    """The counts are those of arithmetic: adapters and head for LoRA, all that the task reads for full training."""
    D, ff, rank = TINY.width, TINY.feed_forward_width, 2
    head = 2 * D * LABELS + LABELS
    blocks = TINY.prelude_blocks + TINY.core_blocks + TINY.coda_blocks
    adapters = blocks * rank * ((D + 3 * D) + (D + D) + (D + 2 * ff) + (ff + D))
    total = count_cognate(TINY) + head
    lora = count_parameters(build(Adaptation(lora=Lora(rank=rank))))
    assert ParameterCount(trainable=adapters + head, total=total + adapters) == lora
    model = build(Adaptation(unfreeze_act_ltm=True))
    language_head = D * D + TINY.vocabulary_size  # a classifier reads no next-token logits
    assert ParameterCount(trainable=total - language_head, total=total) == count_parameters(model)


@pytest.mark.parametrize("lora", [Lora(rank=1), Lora(rank=4, alpha=1.5), Lora(rank=3, dropout=0.5)])
def test_merging_keeps_the_logits(build: Callable[[Adaptation], AgentModel], lora: Lora) -> None:
    """A trained adapter model and its merged self agree within the stated tolerance, and no adapter is left."""
    model = build(Adaptation(lora=lora))
    before = model.eval().comparable_logits(batch_for(model)).detach()
    train_a_little(model.train())
    model.eval()

    @torch.no_grad()
    def logits() -> Tensor:
        return model.comparable_logits(batch_for(model))

    trained = logits()
    assert not torch.allclose(before, trained, atol=0.01)
    change = merge_checked(model.base_model(), logits)
    assert change <= MERGE_TOLERANCE
    torch.testing.assert_close(logits(), trained, rtol=0, atol=MERGE_TOLERANCE * max(1.0, float(trained.abs().max())))
    assert not [name for name in model.state_dict() if "lora" in name or "base_layer" in name]


def test_a_merge_that_moves_the_logits_is_refused(
    build: Callable[[Adaptation], AgentModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale, as a fault in the merge would leave, is found by the logits."""
    model = build(Adaptation(lora=Lora(rank=2)))
    train_a_little(model)
    model.eval()
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, adapter: 2 * right(layer, adapter))
    with pytest.raises(IntegrityCheckFailedError, match="merging the low-rank updates moved the logits"):
        merge_checked(model.base_model(), lambda: model.comparable_logits(batch_for(model)).detach())


def test_a_model_without_adapters_merges_to_itself(build: Callable[[Adaptation], AgentModel]) -> None:
    """Full training has nothing to merge."""
    assert merge_lora(build(Adaptation()).base_model()) == 0


def test_schedules_start_warm_and_end_low() -> None:
    """The factor rises over the warm-up, is 1 at its end, and falls as the contract says."""

    def factors(schedule: Schedule) -> list[float]:
        return [lr_factor(step, total_steps=20, warmup_steps=4, schedule=schedule) for step in range(21)]

    for schedule in Schedule:
        assert factors(schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(Schedule.CONSTANT)[-1] == 1.0
    assert factors(Schedule.LINEAR)[-1] == 0.0
    assert pytest.approx(factors(Schedule.COSINE)[-1]) == 0.1
    assert factors(Schedule.COSINE)[4:] == sorted(factors(Schedule.COSINE)[4:], reverse=True)


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


def test_a_bad_configuration_names_every_field() -> None:
    """All violations come at once, each under its field's name."""
    with pytest.raises(InvalidFieldError) as error:
        AgentTrainConfig(
            agent="",
            total_steps=0,
            batch_size=0,
            adaptation=Adaptation(lora=Lora(rank=0)),
            optimization=Optimization(lr=2.0, warmup_steps=5),
        )
    assert [violation.field for violation in error.value.violations] == [
        "agent",
        "total_steps",
        "batch_size",
        "adaptation.lora.rank",
        "optimization.lr",
        "optimization.warmup_steps",
    ]


def test_a_plan_becomes_a_configuration_with_defaults() -> None:
    """Zeros of the contract mean its documented defaults, and what is set stays as it is."""
    plan = pb.TrainingPlan(
        agent="intent-router",
        architecture="cognate",
        classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=1)),
        adaptation=pb.Adaptation(lora=pb.LoraAdaptation()),
        optimization=pb.Optimization(sgd=pb.Sgd(momentum=0.9), schedule=pb.SCHEDULE_LINEAR),
        total_steps=50,
        seed=7,
    )
    assert from_plan(plan, foundation="cognate-25m@7", foundation_digest="sha256:00") == AgentTrainConfig(
        agent="intent-router",
        architecture="cognate",
        task="classification",
        foundation="cognate-25m@7",
        foundation_digest="sha256:00",
        adaptation=Adaptation(lora=Lora(rank=8, alpha=0, dropout=0)),
        optimization=Optimization(optimizer=OptimizerKind.SGD, lr=1e-3, momentum=0.9, schedule=Schedule.LINEAR),
        total_steps=50,
        batch_size=32,
        seed=7,
        checkpoint_interval_steps=100,
    )
