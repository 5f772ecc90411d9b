"""The validation gate: named checks that decide whether a trained model is published, and as what.

Integrity must hold, or nothing is published. Quality decides between READY and EXPERIMENTAL.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from cognate_server.construct import SPECIFIED_PARAMETERS
from cognate_server.evaluation import ReasoningScore
from cognate_server.validation import ValidationReport

# A mean this close to 1 or to the most says that halting has collapsed: fewer than one token in fifty differs.
HALTING_MARGIN_STEPS = 0.02
# A gain counts from so many standard errors on: by chance alone one in forty would pass.
SURE_ERRORS = 2.0
# The same for a count of right answers, which is too small for an error to be normal.
CHANCE = 1 / 40


class Verdict(enum.StrEnum):
    """What may happen to the model."""

    READY = "ready"
    EXPERIMENTAL = "experimental"
    REFUSED = "refused"


class CheckKind(enum.StrEnum):
    """What a failed check means: REFUSED for integrity, EXPERIMENTAL for quality."""

    INTEGRITY = "integrity"
    QUALITY = "quality"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured value beside its threshold; `rule` says how they must compare."""

    name: str
    kind: CheckKind
    value: float
    threshold: float
    rule: str
    passed: bool

    def told(self) -> dict[str, Any]:
        """Return the check as manifests and the contract tell it."""
        return {
            "name": self.name,
            "integrity": self.kind is CheckKind.INTEGRITY,
            "value": self.value,
            "threshold": self.threshold,
            "passed": self.passed,
            "detail": f"must be {self.rule} the threshold",
        }


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The checks in a fixed order, and what follows from them."""

    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """REFUSED when integrity failed, EXPERIMENTAL when only quality did, else READY."""
        failed = {check.kind for check in self.checks if not check.passed}
        if CheckKind.INTEGRITY in failed:
            return Verdict.REFUSED
        return Verdict.EXPERIMENTAL if failed else Verdict.READY

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)


def judge(
    weights: Path,
    validation: ValidationReport,
    reasoning: Sequence[ReasoningScore] = (),
    *,
    max_steps: int,
    expected_parameters: int = SPECIFIED_PARAMETERS,
) -> GateReport:
    """Check what would be published: the weights as they lie in their file, validation and reasoning.

    max_steps: core steps that a token takes at most.

    expected_parameters: Cognate-25M's; tests of small models hand in theirs.
    """
    parameters, not_finite = _inspect(weights)
    return GateReport(
        checks=(
            _equal("parameter_count", parameters, expected_parameters),
            _equal("weights_not_finite", not_finite, 0),
            _below(
                "validation_loss_below_unigram_loss",
                CheckKind.INTEGRITY,
                validation.loss,
                validation.unigram_loss,
            ),
            *_quality(validation, max_steps),
            *(
                _above(f"{one.source.replace('-', '_')}_exact_match", one.exact_match, best_by_chance(one))
                for one in reasoning
            ),
        )
    )


def best_by_chance(score: ReasoningScore) -> float:
    """Return the share of right answers that who knows no more than the floor exceeds less than once in forty times.

    By the binomial distribution, as if every problem were answered right with the floor's probability.
    """
    problems, floor = score.problems, score.floor
    at_least = 0.0
    for right in range(problems, -1, -1):
        at_least += math.comb(problems, right) * floor**right * (1 - floor) ** (problems - right)
        if at_least >= CHANCE:
            return right / problems
    return 0.0


def _quality(report: ValidationReport, max_steps: int) -> tuple[Check, ...]:
    return (
        _above("mean_ponder_steps_above_one", report.mean_ponder_steps, 1 + HALTING_MARGIN_STEPS),
        _below(
            "mean_ponder_steps_below_most",
            CheckKind.QUALITY,
            report.mean_ponder_steps,
            max_steps - HALTING_MARGIN_STEPS,
        ),
        _below(
            "largest_share_of_one_step_count",
            CheckKind.QUALITY,
            max(report.halting_histogram),
            1 - HALTING_MARGIN_STEPS,
        ),
        _above("memory_gain_nats", report.loss_memory_off - report.loss, SURE_ERRORS * report.memory_gain_error),
        _above("pondering_gain_nats", report.loss_one_step - report.loss, SURE_ERRORS * report.pondering_gain_error),
    )


def _inspect(path: Path) -> tuple[int, int]:
    """Return how many numbers a weights file holds, and how many of them are not finite."""
    parameters = not_finite = 0
    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            parameters += tensor.numel()
            not_finite += int((~tensor.isfinite()).sum())
    return parameters, not_finite


def _equal(name: str, value: int, threshold: int) -> Check:
    return Check(
        name=name, kind=CheckKind.INTEGRITY, value=value, threshold=threshold, rule="==", passed=value == threshold
    )


def _below(name: str, kind: CheckKind, value: float, threshold: float) -> Check:
    return Check(name=name, kind=kind, value=value, threshold=threshold, rule="<", passed=value < threshold)


def _above(name: str, value: float, threshold: float) -> Check:
    return Check(
        name=name, kind=CheckKind.QUALITY, value=value, threshold=threshold, rule=">", passed=value > threshold
    )
