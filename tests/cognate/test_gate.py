"""The gate: integrity refuses, quality decides between READY and EXPERIMENTAL."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cognate_server.construct import CognateModelConstructor
from cognate_server.evaluation import ReasoningScore
from cognate_server.gate import CheckKind, Verdict, best_by_chance, judge
from cognate_server.precision import Precision
from cognate_server.trainer import PretrainResult
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
def result(tmp_path: Path) -> PretrainResult:
    """A small model's folder with a validation report that passes every check."""
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=torch.ones(40))
    save_state(model, tmp_path / "model.safetensors")
    return PretrainResult(
        step=10,
        model_dir=tmp_path,
        config=TINY,
        precision=Precision.FLOAT32,
        parameters=count_parameters(TINY),
        first_loss=5.0,
        last_loss=3.2,
        validation=GOOD,
        lambda_departures=(),
    )


def verdict(result: PretrainResult, **changes: Any) -> tuple[Verdict, list[str]]:
    changed = dataclasses.replace(result, validation=dataclasses.replace(GOOD, **changes))
    report = judge(changed, expected_parameters=count_parameters(TINY))
    return report.verdict, [check.name for check in report.failed]


def test_a_model_that_passes_everything_is_ready(result: PretrainResult) -> None:
    """Every check shows its value and threshold."""
    report = judge(result, expected_parameters=count_parameters(TINY))
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
def test_quality_that_fails_makes_it_experimental(
    result: PretrainResult, changes: dict[str, Any], failed: list[str]
) -> None:
    """Halting that does not vary; memory or pondering that does not help, or not by more than chance can."""
    assert verdict(result, **changes) == (Verdict.EXPERIMENTAL, failed)


@pytest.mark.parametrize("loss", [5.3, 6.0, math.nan])
def test_a_loss_that_is_not_below_the_unigram_is_refused(result: PretrainResult, loss: float) -> None:
    """A NaN is not below anything."""
    assert verdict(result, loss=loss, loss_memory_off=7.0, loss_one_step=7.0)[0] is Verdict.REFUSED


def test_cognate_25m_is_expected_unless_told_otherwise(result: PretrainResult) -> None:
    """A small model does not pass for the real one."""
    report = judge(result)
    assert report.verdict is Verdict.REFUSED
    assert [(check.name, check.threshold) for check in report.failed] == [("parameter_count", 24_998_668)]


def test_weights_that_are_not_finite_are_refused(result: PretrainResult) -> None:
    """The file that would be published is looked at, not the model in memory."""
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=torch.ones(40))
    with torch.no_grad():
        model.head.weight[0, :2] = math.inf
    save_state(model, result.model_dir / "model.safetensors")
    report = judge(result, expected_parameters=count_parameters(TINY))
    assert report.verdict is Verdict.REFUSED
    assert [(check.name, check.value) for check in report.failed] == [("weights_not_finite", 2)]


@pytest.mark.parametrize(
    ("exact_match", "failed"), [(0.5, []), (0.45, ["hotpotqa_exact_match"]), (0.0, ["hotpotqa_exact_match"])]
)
def test_reasoning_must_be_better_than_one_constant_answer_and_its_luck(
    result: PretrainResult, exact_match: float, failed: list[str]
) -> None:
    """Of 20 problems with a floor of 5 right ones, 9 are luck more than once in forty times, and 10 are not."""
    reasoning = [ReasoningScore(source="hotpotqa", problems=20, exact_match=exact_match, f1=0.4, floor=0.25)]
    report = judge(result, reasoning, expected_parameters=count_parameters(TINY))
    assert failed == [check.name for check in report.failed]
    assert (Verdict.EXPERIMENTAL if failed else Verdict.READY) is report.verdict


@pytest.mark.parametrize(
    ("problems", "floor", "right"), [(16, 1 / 16, 3), (1_000, 0.5, 531), (16, 1.0, 16), (1, 0.5, 1)]
)
def test_luck_is_that_of_the_binomial_distribution(problems: int, floor: float, right: int) -> None:
    """Of few problems it is large; where always one answer is right, nothing is better."""
    score = ReasoningScore(source="gsm8k", problems=problems, exact_match=0.0, f1=None, floor=floor)
    assert best_by_chance(score) == right / problems
