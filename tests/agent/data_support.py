"""What the tests of the agents' data share: rows in a folder, and the processor over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent_server.data.examples import PreparedData
from agent_server.data.processor import AgentDataProcessor
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.settings import DataSettings


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write a JSONL file; bytes are lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def plan_for(task: str, path: str, *, max_refused_share: float | None = None, **wishes: Any) -> pb.TrainingPlan:
    """Return a plan of a task over a file; wishes are fields of the task's message."""
    plan = pb.TrainingPlan()
    wish = getattr(plan, task)
    wish.file.path = path
    for name, value in wishes.items():
        if isinstance(value, list | tuple):
            getattr(wish, name).extend(value)
        else:
            setattr(wish, name, value)
    if max_refused_share is not None:
        plan.data_limits.max_refused_share = max_refused_share
    return plan


def prepare(
    folder: Path | None,
    task: str,
    path: str,
    *,
    each_row: Callable[[], None] = lambda: None,
    max_refused_share: float | None = None,
    **wishes: Any,
) -> PreparedData[Any]:
    """Prepare a file or folder of a data folder for a task."""
    plan = plan_for(task, path, max_refused_share=max_refused_share, **wishes)
    return AgentDataProcessor(DataSettings(folder=folder)).prepare(plan, each_row=each_row)


def prepare_rows(folder: Path, task: str, rows: Sequence[Any], **wishes: Any) -> PreparedData[Any]:
    """Prepare rows that are written for it."""
    write_rows(folder / "rows.jsonl", rows)
    return prepare(folder, task, "rows.jsonl", **wishes)


def generated(seed: int = 0) -> PreparedData[Any]:
    """Prepare this project's own utterances."""
    plan = pb.TrainingPlan(classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=seed)))
    return AgentDataProcessor(DataSettings()).prepare(plan)


def reasons(data: PreparedData[Any]) -> dict[int, str]:
    """Return why each refused row was refused, by its line."""
    return {finding.line: finding.reason for finding in data.report.findings}
