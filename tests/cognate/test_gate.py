"""The gate: integrity refuses, quality decides between READY and EXPERIMENTAL."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cognate_server.construct import CognateModelConstructor
from cognate_server.evaluation import ReasoningScore
from cognate_server.gate import CheckKind, GateReport, Verdict, best_by_chance, judge
from cognate_server.validation import ValidationReport
from training_common.models.cognate_v1 import CognateV1Config, count_parameters, save_state

TINY = CognateV1Config(vocabulary_size=40, width=32, heads=4, feed_forward_width=48, memory_slots=6, memory_chunk=8)
GOOD = ValidationReport(
    rows=16,
    tokens=1_000,
    loss=3.2,
    loss_memory_off=3.3,
    loss_one_step=3.25,
    memory_gain_error=0.04,
    pondering_gain_error=0.02,
    unigram_loss=5.3,
    mean_ponder_steps=2.5,
    halting_histogram=(0.1, 0.5, 0.2, 0.2),
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small model's file."""
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=torch.ones(40))
    save_state(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def verdict(weights: Path, **changes: Any) -> tuple[Verdict, list[str]]:
    report = judged(weights, validation=dataclasses.replace(GOOD, **changes))
    return report.verdict, [check.name for check in report.failed]


def judged(
    weights: Path, reasoning: Sequence[ReasoningScore] = (), *, validation: ValidationReport = GOOD
) -> GateReport:
    return judge(weights, validation, reasoning, max_steps=TINY.max_steps, expected_parameters=count_parameters(TINY))


def test_a_model_that_passes_everything_is_ready(weights: Path) -> None:
    """Every check shows its value and threshold."""
    report = judged(weights)
    assert report.verdict is Verdict.READY
    assert [check.kind for check in report.checks].count(CheckKind.INTEGRITY) == 3
    unigram = report.checks[2]
    assert (unigram.value, unigram.rule, unigram.threshold, unigram.passed) == (3.2, "<", 5.3, True)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"mean_ponder_steps": 1.0}, ["mean_ponder_steps_above_one"]),
        ({"mean_ponder_steps": 4.0}, ["mean_ponder_steps_below_most"]),
        ({"mean_ponder_steps": 2.0, "halting_histogram": (0, 1.0, 0, 0)}, ["largest_share_of_one_step_count"]),
        ({"loss_memory_off": 3.2}, ["memory_gain_nats"]),
        ({"loss_one_step": 3.1}, ["pondering_gain_nats"]),
        ({"memory_gain_error": 0.06}, ["memory_gain_nats"]),
        ({"pondering_gain_error": 0.03}, ["pondering_gain_nats"]),
    ],
)
def test_quality_that_fails_makes_it_experimental(weights: Path, changes: dict[str, Any], failed: list[str]) -> None:
    """Halting that does not vary; memory or pondering that does not help, or not by more than chance can."""
    assert verdict(weights, **changes) == (Verdict.EXPERIMENTAL, failed)


@pytest.mark.parametrize("loss", [5.3, 6.0, math.nan])
def test_a_loss_that_is_not_below_the_unigram_is_refused(weights: Path, loss: float) -> None:
    """A NaN is not below anything."""
    assert verdict(weights, loss=loss, loss_memory_off=7.0, loss_one_step=7.0)[0] is Verdict.REFUSED


def test_cognate_25m_is_expected_unless_told_otherwise(weights: Path) -> None:
    """A small model does not pass for the real one."""
    report = judge(weights, GOOD, max_steps=TINY.max_steps)
    assert report.verdict is Verdict.REFUSED
    assert [(check.name, check.threshold) for check in report.failed] == [("parameter_count", 24_998_668)]


def test_weights_that_are_not_finite_are_refused(weights: Path) -> None:
    """The file that would be published is looked at, not the model in memory."""
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=torch.ones(40))
    with torch.no_grad():
        model.head.weight[0, :2] = math.inf
    save_state(model, weights)
    report = judged(weights)
    assert report.verdict is Verdict.REFUSED
    assert [(check.name, check.value) for check in report.failed] == [("weights_not_finite", 2)]


@pytest.mark.parametrize(
    ("exact_match", "failed"), [(0.5, []), (0.45, ["hotpotqa_exact_match"]), (0.0, ["hotpotqa_exact_match"])]
)
def test_reasoning_must_be_better_than_one_constant_answer_and_its_luck(
    weights: Path, exact_match: float, failed: list[str]
) -> None:
    """Of 20 problems with a floor of 5 right ones, 9 are luck more than once in forty times, and 10 are not."""
    reasoning = [ReasoningScore(source="hotpotqa", problems=20, exact_match=exact_match, f1=0.4, floor=0.25)]
    report = judged(weights, reasoning)
    assert failed == [check.name for check in report.failed]
    assert (Verdict.EXPERIMENTAL if failed else Verdict.READY) is report.verdict


@pytest.mark.parametrize(
    ("problems", "floor", "right"), [(16, 1 / 16, 3), (1_000, 0.5, 531), (16, 1.0, 16), (1, 0.5, 1)]
)
def test_luck_is_that_of_the_binomial_distribution(problems: int, floor: float, right: int) -> None:
    """Of few problems it is large; where always one answer is right, nothing is better."""
    score = ReasoningScore(source="gsm8k", problems=problems, exact_match=0.0, f1=None, floor=floor)
    assert best_by_chance(score) == right / problems
