"""Pretraining in two processes: what it computes, saves and reports is what one process does with the same batches."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp

from cognate_server.run import PretrainingRun
from tests.cognate.pretraining_processes import (
    CONFIG,
    CUT_AT,
    FILTERED_STEPS,
    KINDS,
    POISONED_AT,
    PROCESSES,
    STEPS,
    Poison,
    UnevenStream,
    run,
    train,
)
from training_common.team import ALONE, Strategy, Team

pytestmark = pytest.mark.slow
# Sums in another order: 2e-7 was seen.
TOLERANCE = 2e-6
Seen = Mapping[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes, and one before them, have left what they saw."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in KINDS:
        (folder / kind).mkdir()
    train(folder / "begun-alone", stop_at=CUT_AT)
    for kind in KINDS:
        shutil.copytree(folder / "begun-alone", folder / kind / "begun-alone")
    mp.spawn(run, (str(folder),), nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The same training in this process."""
    seen = train(tmp_path_factory.mktemp("alone"))
    assert seen is not None
    return seen


def _load(file: Path) -> Any:
    return torch.load(file, weights_only=False)  # written by this test's own processes


def _losses(seen: Seen, name: str = "loss") -> list[float]:
    return [metrics[name] for _, metrics in seen["rows"] if name in metrics]


def assert_same_weights(expected: Seen, actual: Seen) -> None:
    theirs = safetensors.torch.load(actual["weights"])
    for name, tensor in safetensors.torch.load(expected["weights"]).items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind: Strategy, folder: Path, alone: Seen) -> None:
    """Losses, gradient norms and final weights, with rows of different numbers of targets and memory carried over."""
    two = _load(folder / kind / "whole-None.pt")
    assert len(_losses(alone)) == STEPS
    assert _losses(two) == pytest.approx(_losses(alone), rel=TOLERANCE)
    assert _losses(two, "gradient_norm") == pytest.approx(_losses(alone, "gradient_norm"), rel=1e-3)
    assert_same_weights(alone, two)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_are_of_the_whole_batch(kind: Strategy, folder: Path, alone: Seen) -> None:
    """Every metric but those of time and memory; a mean over one process's rows would be another number."""
    two = _load(folder / kind / "whole-None.pt")
    of_the_machine = {"peak_memory_bytes", "tokens_per_s", "model_flops_per_s", "mfu_ratio", "seconds_left"}
    for (step, expected), (other, actual) in zip(alone["rows"], two["rows"], strict=True):
        assert step == other
        assert expected.keys() - of_the_machine == actual.keys() - of_the_machine
        for name in expected.keys() - of_the_machine:
            assert actual[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-4), (step, name)
    expected, actual = (seen["acceleration"].curves["control"] for seen in (alone, two))
    assert [step for step, _ in expected] == [step for step, _ in actual]
    assert [loss for _, loss in actual] == pytest.approx([loss for _, loss in expected], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_bit_for_bit(kind: Strategy, folder: Path) -> None:
    """Paused after ten steps and gone on with, and not paused: the same bits."""
    whole, cut = _load(folder / kind / "whole-None.pt"), _load(folder / kind / "cut-None.pt")
    assert cut["rows"][0][0] == CUT_AT + 1
    assert whole["weights"] == cut["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_another_number_of_processes(kind: Strategy, folder: Path, alone: Seen) -> None:
    """From one process to two and from two to one: each goes on with the rows that come next."""
    to_two = _load(folder / kind / "begun-alone-None.pt")
    assert to_two["rows"][0][0] == CUT_AT + 1
    assert _losses(to_two) == pytest.approx(_losses(alone)[CUT_AT:], rel=TOLERANCE)
    assert_same_weights(alone, to_two)
    to_one = train(folder / kind / "begun")
    assert to_one is not None
    assert _losses(to_one) == pytest.approx(_losses(alone)[CUT_AT:], rel=TOLERANCE)
    assert_same_weights(alone, to_one)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_in_one_process_is_skipped_by_all(kind: Strategy, folder: Path, tmp_path: Path) -> None:
    """The recovery manager sees the sum, so no process takes the step, and all go on alike."""
    with Poison(ALONE):
        expected = train(tmp_path)
    actual = _load(folder / kind / "poisoned-None.pt")
    assert expected is not None
    assert [(event["step"], event["action"]) for event in actual["recovery"]] == [(POISONED_AT, "skip_batch")]
    assert [event["step"] for event in expected["recovery"]] == [POISONED_AT]
    assert _losses(actual) == pytest.approx(_losses(expected), rel=TOLERANCE)
    assert_same_weights(expected, actual)


def test_a_filter_before_the_reduction_would_be_found(folder: Path, tmp_path: Path) -> None:
    """Gradients are added up, then clipped and filtered. The other order trains another model."""
    right, wrong = _load(folder / "filtered-False.pt"), _load(folder / "filtered-True.pt")
    config = dataclasses.replace(CONFIG, control_rates=(), total_steps=FILTERED_STEPS)
    ours = PretrainingRun(config, UnevenStream())
    expected, norms = [], []
    for _ in range(FILTERED_STEPS):
        expected.append(ours.train_step(measure=False).loss)
        assert ours.optimizer.report is not None
        norms.append(ours.optimizer.report.gradient_norm)
    assert max(norms) > 1, "the clip has to matter here"
    assert right == pytest.approx(expected, rel=TOLERANCE)
    difference = max(abs(one - other) / other for one, other in zip(wrong, expected, strict=True))
    assert difference > 4 * TOLERANCE


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(3, 2, [1, 2]), (4, 2, [2, 2]), (1, 2, [0, 1]), (7, 3, [2, 2, 3])]
)
def test_every_row_has_one_process(count: int, size: int, expected: list[int]) -> None:
    """Shares follow one another, and differ by one row at most."""
    shares = [range(count)[Team(rank=rank, size=size).rows(count)] for rank in range(size)]
    assert [len(share) for share in shares] == expected
    assert [row for share in shares for row in share] == list(range(count))
