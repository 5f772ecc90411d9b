"""The optimizer in two processes: after DDP's reduction, and on parameters that are sharded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.cognate.grokfast_processes import PROCESSES, Ended, run, train_alone

pytestmark = pytest.mark.slow
RANKS = range(PROCESSES)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Ended]]:
    """Where both processes ended, by how they trained."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(run, (str(folder),), nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
    return {kind: [_load(folder / f"{kind}-{rank}.pt") for rank in RANKS] for kind in ("ddp", "sharded")}


def _load(file: Path) -> Ended:
    ended: Ended = torch.load(file, weights_only=False)  # written by this test's own processes
    return ended


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_processes_train_as_one(kind: str, ends: Mapping[str, list[Ended]]) -> None:
    """Parameters and EMA are those of one process with the mean of both gradients, and the ranks' are the same bits."""
    alone = train_alone()
    first, second = ends[kind]
    for name in ("parameters", "slow"):
        for expected, actual, other in zip(*(getattr(e, name) for e in (alone, first, second)), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(actual, other)


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_reports_are_of_the_whole_gradient(kind: str, ends: Mapping[str, list[Ended]]) -> None:
    """Norm, cosine and ratio count every process's part; a norm of one part would clip too little."""
    alone = train_alone()
    assert max(report.gradient_norm for report in alone.reports) > 1, "the clip has to matter here"
    for expected, actual, other in zip(*(e.reports for e in (alone, *ends[kind])), strict=True):
        known = {name: value for name, value in dataclasses.asdict(expected).items() if value is not None}
        for name, value in known.items():
            assert getattr(actual, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert actual == other


def test_gradients_stay_in_the_buckets(ends: Mapping[str, list[Ended]]) -> None:
    """A replaced `p.grad` would be reduced no more, and the ranks would part in silence."""
    assert [True] * PROCESSES == [ended.kept_gradients for ended in ends["ddp"]]
