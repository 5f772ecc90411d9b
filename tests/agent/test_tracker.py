"""Metrics that hold for every task, against hand-made cases."""

from __future__ import annotations

import math

import pytest

from agent_server.tracker import (
    AgentProgressTracker,
    Check,
    StepReport,
    beats,
    generalization_gap,
    loss_slope,
    normalized_gain,
    readiness,
)


def step(loss: float, *, rows: int = 4, units: float = 4.0) -> StepReport:
    return StepReport(loss=loss, units=units, counts={"correct": 1.0}, rows=rows, norm=1.0, lr=0.1)


def test_means_are_over_units_since_the_last_report() -> None:
    """A step of more trained tokens weighs more; the next report begins anew."""
    tracker = AgentProgressTracker(10)
    tracker.add(step(1.0, units=1.0), seconds=0.5)
    tracker.add(step(4.0, units=2.0), seconds=1.5)
    assert tracker.counted == ({"correct": 2.0}, 3.0)
    metrics = tracker.take(2)
    assert metrics["loss"] == pytest.approx(3.0)
    assert metrics["samples_per_s"] == pytest.approx(4.0)
    assert metrics["seconds_left"] == pytest.approx(8 * (0.5 + 0.1 * 1.0))
    tracker.add(step(7.0), seconds=1.0)
    assert tracker.take(3)["loss"] == pytest.approx(7.0)


def test_what_was_not_measured_is_absent() -> None:
    """No price, no cost; no units, no loss; too few losses, no slope."""
    tracker = AgentProgressTracker(10)
    tracker.add(step(0.0, units=0.0), seconds=1.0)
    assert {"samples_per_s", "seconds_left", "peak_memory_bytes"} == set(tracker.take(1))


def test_cost_counts_every_attempt() -> None:
    """Time that earlier attempts spent is paid for too."""
    tracker = AgentProgressTracker(10, worker_hour=7.2, earlier_seconds=100.0)
    tracker.add(step(1.0), seconds=50.0)
    assert tracker.take(1)["cost_so_far"] == pytest.approx(7.2 * 150 / 3600)


def test_the_slope_is_that_of_a_line() -> None:
    """A straight line gives its own slope, per 100 steps; noise around nothing gives nearly none."""
    assert loss_slope([3.0 - 0.02 * t for t in range(20)]) == pytest.approx(-2.0)
    assert loss_slope([1.0] * 20) == 0.0
    assert loss_slope([1.0] * 19) is None


def test_gap_and_gain() -> None:
    """The gap is signed; the gain is a share of what was left."""
    assert generalization_gap(0.5, 0.8) == pytest.approx(0.3)
    assert normalized_gain(0.5, 0.75) == pytest.approx(0.5)
    assert normalized_gain(0.5, 0.25) == pytest.approx(-0.5)
    assert normalized_gain(1.0, 1.0) is None


def test_readiness_is_a_share_of_named_checks() -> None:
    """Chance raises the floor, what is not a number fails, and without checks nothing is said."""
    lucky = beats("beats_floor", 0.6, 0.5, rows=16)
    sure = beats("beats_floor", 0.6, 0.5, rows=1600)
    assert lucky.floor == pytest.approx(0.5 + 1.96 * 0.125)
    assert (lucky.passed, sure.passed) == (False, True)
    assert not Check(name="finite", value=math.nan, floor=0.0).passed
    assert Check(name="gap", value=0.1, floor=0.2, below=True).passed
    assert readiness([lucky, sure]) == 0.5
    assert readiness([]) is None
