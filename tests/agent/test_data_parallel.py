"""Fine-tuning in two processes: what it computes, saves and exports is what one process does with the same batches."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp

from agent_server.data.examples import texts_of
from agent_server.evaluation import Evaluation
from tests.agent._support import write_foundation
from tests.agent.training_processes import CONFIGS, CUT_AT, DATA, KINDS, PROCESSES, STEPS, run, train
from training_common.team import Strategy

pytestmark = pytest.mark.slow
Seen = Mapping[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes, and one before them, have left what they saw."""
    folder = tmp_path_factory.mktemp("processes")
    foundation = write_foundation(folder / "foundation", list(texts_of(DATA.train)))
    train(foundation, folder / "begun-alone", "full", stop_at=CUT_AT)
    for kind in KINDS:
        (folder / kind).mkdir()
        shutil.copytree(folder / "begun-alone", folder / kind / "begun-alone")
    mp.spawn(run, (str(folder),), nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Mapping[str, Seen]:
    """The same trainings in this process."""
    return {name: _seen(train(folder / "foundation", folder / "alone" / name, name)) for name in CONFIGS}


def _seen(seen: Seen | None) -> Seen:
    assert seen is not None
    return seen


def _load(file: Path) -> Any:
    return torch.load(file, weights_only=False)  # written by this test's own processes


def _rows(seen: Seen, name: str) -> list[float]:
    return [metrics[name] for _, metrics in seen["rows"] if name in metrics]


def _what(evaluation: Evaluation) -> tuple[str, str, int]:
    return evaluation.metric, evaluation.dataset, evaluation.rows


def assert_same(expected: Seen, actual: Seen, *, since: int = 0) -> None:
    assert len(_rows(actual, "loss")) == STEPS - since
    assert _rows(actual, "loss") == pytest.approx(_rows(expected, "loss")[since:], rel=1e-4)
    assert _rows(actual, "gradient_norm") == pytest.approx(_rows(expected, "gradient_norm")[since:], rel=1e-3)
    theirs = safetensors.torch.load(actual["weights"])
    for name, tensor in safetensors.torch.load(expected["weights"]).items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind: Strategy, name: str, folder: Path, alone: Mapping[str, Seen]) -> None:
    """Losses, norms, accuracies, final weights and measured results, with a batch of one row now and then."""
    two = _load(folder / kind / f"{name}.pt")
    assert_same(alone[name], two)
    for metric in ("train_accuracy", "validation_accuracy"):
        assert _rows(two, metric) == pytest.approx(_rows(alone[name], metric))
    assert [_what(one) for one in alone[name]["evaluations"]] == [_what(one) for one in two["evaluations"]]
    assert [one.value for one in two["evaluations"]] == pytest.approx(
        [one.value for one in alone[name]["evaluations"]], rel=1e-3
    )


@pytest.mark.parametrize(("name", "cut_name"), [("full", "cut"), ("best", "best-cut")])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_bit_for_bit(kind: Strategy, folder: Path, name: str, cut_name: str) -> None:
    """Paused after ten steps and gone on with, and not paused: the same bits, of the best validation too."""
    whole, cut = _load(folder / kind / f"{name}.pt"), _load(folder / kind / f"{cut_name}.pt")
    assert cut["rows"][0][0] == CUT_AT + 1
    assert whole["weights"] == cut["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_another_number_of_processes(
    kind: Strategy, folder: Path, alone: Mapping[str, Seen]
) -> None:
    """From one process to two and from two to one: each goes on with the rows that come next."""
    assert_same(alone["full"], _load(folder / kind / "begun-alone.pt"), since=CUT_AT)
    to_one = _seen(train(folder / "foundation", folder / kind / "begun", "full"))
    assert_same(alone["full"], to_one, since=CUT_AT)
