"""How a step is taken, and what validations decide: parts, precision, plateaus, and runs that end early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from agent_server import trainer
from agent_server.adaptation import Adaptation, Bottleneck, Freezing, Lora
from agent_server.data.examples import texts_of
from agent_server.evaluation import measure
from agent_server.objectives.base import Measurement
from agent_server.optim import EarlyStopping, Optimization, Precision, Schedule
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.exceptions import DataUnavailableError
from tests.agent._support import MemoryAttempt, ToldAttempt, factory, toy_rows, weights, write_foundation
from training_common.attempt import AttemptStopped, StopKind

# Fewer validation rows than test rows, so that measurements on them can be told apart.
DATA = dataclasses.replace(toy_rows(), validation=toy_rows().validation[:30])
CONFIG = AgentTrainConfig(
    agent="toy-router",
    total_steps=12,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(lora=Lora(rank=2)),
    optimization=Optimization(lr=1e-2),
    checkpoint_interval_steps=5,
    progress_interval_steps=1,
    validation_interval_steps=2,
)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(tmp_path_factory.mktemp("validations") / "foundation", list(texts_of(DATA.train)))


def run(foundation: Path, attempt: MemoryAttempt, data: Any = DATA, **changes: Any) -> AgentResult:
    optimization = {key: changes.pop(key) for key in list(changes) if hasattr(CONFIG.optimization, key)}
    changes["optimization"] = dataclasses.replace(CONFIG.optimization, **optimization)
    return train_agent(dataclasses.replace(CONFIG, **changes), foundation, data, attempt, factory=factory())


def exported(result: AgentResult) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    return config


def series(attempt: MemoryAttempt, metric: str) -> list[Any]:
    return [metrics[metric] for _, metrics in attempt.rows if metric in metrics]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next validations are to find; the last one stays. Measurements before and after are real."""
    told: list[float] = []

    def measured(objective: Any, model: Any, rows: Sequence[Any], **options: Any) -> list[Measurement]:
        found = measure(objective, model, rows, **options)
        if not told or len(rows) != len(DATA.validation):
            return found
        value = told.pop(0) if len(told) > 1 else told[0]
        return [dataclasses.replace(one, value=value) if one.metric == objective.score else one for one in found]

    monkeypatch.setattr(trainer, "measure", measured)
    return told


@pytest.mark.parametrize("parts", [3, 64])
def test_parts_of_a_step_train_as_the_whole(foundation: Path, tmp_path: Path, parts: int) -> None:
    """Taken in parts, also in more than it has rows, a step has the loss, the norm and the effect of the whole one."""
    whole, split = MemoryAttempt(tmp_path / "whole"), MemoryAttempt(tmp_path / "split")
    expected, got = run(foundation, whole), run(foundation, split, accumulation_steps=parts)
    for metric in ("loss", "gradient_norm", "train_accuracy"):
        assert pytest.approx(series(whole, metric), rel=1e-4) == series(split, metric)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(got)[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_bfloat16_trains_close_to_float32(foundation: Path, tmp_path: Path) -> None:
    """Losses differ by what 16 bits lose and no more; weights, moments and exported tensors keep 32 bits."""
    wide, narrow = MemoryAttempt(tmp_path / "wide"), MemoryAttempt(tmp_path / "narrow")
    run(foundation, wide)
    result = run(foundation, narrow, precision=Precision.BFLOAT16)
    assert series(wide, "loss") != series(narrow, "loss")
    # bfloat16 keeps 8 bits: a relative error of 2**-9 in each product, some of which add up.
    assert pytest.approx(series(wide, "loss"), rel=0.05) == series(narrow, "loss")
    state = torch.load(narrow.checkpoints[-1].path / "optimizer.pt", weights_only=True)
    moments = [value for values in state["optimizer"]["state"].values() for value in values.values()]
    assert {torch.float32} == {value.dtype for value in (*weights(result).values(), *moments)}


@pytest.mark.parametrize(
    "adaptation",
    [
        Adaptation(head=True),
        Adaptation(freezing=Freezing(trained_blocks=2)),
        Adaptation(bottleneck=Bottleneck(width=4)),
        Adaptation(lora=Lora(rank=2, weight_decomposed=True)),
    ],
    ids=lambda one: one.method,
)
def test_every_method_is_trained_resumed_and_exported(foundation: Path, tmp_path: Path, adaptation: Adaptation) -> None:
    """Paused and gone on with, in parts and in 16 bits, each method gives the bits of the uninterrupted run."""
    changes: dict[str, Any] = {"adaptation": adaptation, "accumulation_steps": 2, "precision": Precision.BFLOAT16}
    changes |= {"total_steps": 8, "validation_interval_steps": 4}
    whole = run(foundation, MemoryAttempt(tmp_path / "whole"), **changes)
    cut = MemoryAttempt(tmp_path / "cut", stop_at=6)
    with pytest.raises(AttemptStopped):
        run(foundation, cut, **changes)
    resumed = run(foundation, dataclasses.replace(cut, stop_at=None), **changes)
    assert {name for name, value in weights(whole).items() if not torch.equal(value, weights(resumed)[name])} == set()
    counts = (whole.trainable_parameters, whole.total_parameters)
    assert counts == (exported(whole)["trainable_parameters"], exported(whole)["total_parameters"])
    assert (adaptation.method == "head") == (counts[0] < 1000 < counts[1])


def test_a_plateau_lowers_the_rate(foundation: Path, tmp_path: Path, scores: list[float]) -> None:
    """After three validations that were no better the rate is a tenth, from the next step on."""
    scores += [0.5, 0.6, 0.6, 0.5, 0.6]
    attempt = ToldAttempt(tmp_path)
    run(foundation, attempt, schedule=Schedule.PLATEAU, warmup_steps=1)
    assert pytest.approx([1e-2] * 10 + [1e-3] * 2) == series(attempt, "learning_rate")


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_a_run_that_ends_early_is_resumed_bit_for_bit(
    foundation: Path, tmp_path: Path, scores: list[float], stop_at: int
) -> None:
    """Wherever it was cut, before its best validation, after it or near the end, weights and end are the same."""
    told = [0.5, 0.7, 0.6, 0.7, 0.2]  # after 2, 4, 6, 8 and 10 steps
    changes: dict[str, Any] = {"early_stopping": EarlyStopping(patience=3), "schedule": Schedule.PLATEAU}
    scores += told
    attempt = ToldAttempt(tmp_path / "whole")
    whole = run(foundation, attempt, **changes)
    assert (10, 10, 4) == (whole.steps, exported(whole)["steps"], exported(whole)["weights_of_step"])
    [(kind, payload)] = [event for event in attempt.events if event[0] == "stopped_early"]
    assert {"step": 10, "best": 0.7, "best_step": 4, "misses": 3} == {
        k: v for k, v in payload.items() if k != "message"
    }
    assert "stopped_early" == kind
    scores[:] = told
    cut = ToldAttempt(tmp_path / "cut", stop_at=stop_at)
    with pytest.raises(AttemptStopped):
        run(foundation, cut, **changes)
    resumed = run(foundation, dataclasses.replace(cut, stop_at=None), **changes)
    assert (10, 4) == (resumed.steps, exported(resumed)["weights_of_step"])
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_run_that_has_ended_early_is_not_gone_on_with(foundation: Path, tmp_path: Path, scores: list[float]) -> None:
    """An attempt that was lost while it measured at the end takes no step more, and exports the same."""
    scores += [0.5, 0.4]
    attempt = ToldAttempt(tmp_path)
    first = run(foundation, attempt, early_stopping=EarlyStopping(patience=1))
    rows, expected = len(attempt.rows), weights(first)
    again = run(foundation, attempt, early_stopping=EarlyStopping(patience=1))
    assert (4, 4, rows) == (first.steps, again.steps, len(attempt.rows))
    assert all(torch.equal(value, weights(again)[name]) for name, value in expected.items())


def test_the_best_validation_gives_the_weights(foundation: Path, tmp_path: Path, scores: list[float]) -> None:
    """A run that takes every step is validated after the last one, and still gives the weights of its best."""
    scores += [0.5, 0.6, 0.9, 0.8, 0.8, 0.7]
    attempt = ToldAttempt(tmp_path / "whole")
    result = run(foundation, attempt, early_stopping=EarlyStopping(patience=100))
    assert (12, 6) == (result.steps, exported(result)["weights_of_step"])
    assert [0.5, 0.6, 0.9, 0.8, 0.8, 0.7] == series(attempt, "validation_accuracy")
    stopped = MemoryAttempt(tmp_path / "there", stop_at=6, stop_kind=StopKind.PAUSE)
    with pytest.raises(AttemptStopped):
        run(foundation, stopped, early_stopping=EarlyStopping(patience=100))
    there = safetensors.torch.load_file(stopped.checkpoints[-1].path / "trained.safetensors")
    best = safetensors.torch.load_file(attempt.checkpoints[-1].path / "best.safetensors")
    last = safetensors.torch.load_file(attempt.checkpoints[-1].path / "trained.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in there.items())
    assert not all(torch.equal(value, last[name]) for name, value in there.items())


@pytest.mark.parametrize(
    "changes", [{"early_stopping": EarlyStopping()}, {"schedule": Schedule.PLATEAU}], ids=["stopping", "plateau"]
)
def test_what_validations_decide_needs_validation_rows(
    foundation: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Without such rows the run is refused, with what to do, before its first step."""
    data = dataclasses.replace(DATA, validation=[])
    attempt = MemoryAttempt(tmp_path)
    with pytest.raises(DataUnavailableError, match="need validation rows, and there are none; add some"):
        run(foundation, attempt, data, **changes)
    assert attempt.rows == []
