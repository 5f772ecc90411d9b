"""Two processes train agents of every kind of base as one process does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.agent.architecture_processes import CONFIGS, PROCESSES, STEPS, TEXTS, run, train
from tests.agent.model_folders import write_model_folder
from training_common.team import Strategy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they saw."""
    folder = tmp_path_factory.mktemp("architectures")
    for kind in ("bert", "gpt2"):
        _without_dropout(write_model_folder(folder / kind, kind, TEXTS))
    mp.spawn(run, (str(folder),), nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
    return folder


def _without_dropout(folder: Path) -> None:
    """Two processes drop out other values than one: they are compared without."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: 0.0 for name in config if name.endswith(("_pdrop", "_dropout_prob"))}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _rows(seen: Mapping[str, Any], name: str) -> list[float]:
    return [metrics[name] for _, metrics in seen["rows"] if name in metrics]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    """Losses and gradient norms are those of one process, replicated and sharded."""
    alone = train(folder, name, folder / "alone" / name)
    assert alone is not None
    assert len(_rows(alone, "loss")) == STEPS
    for kind in Strategy:
        two = torch.load(folder / f"{kind}-{name}.pt", weights_only=False)  # written by this test's own processes
        assert _rows(two, "loss") == pytest.approx(_rows(alone, "loss"), rel=1e-4)
        assert _rows(two, "gradient_norm") == pytest.approx(_rows(alone, "gradient_norm"), rel=1e-3)
