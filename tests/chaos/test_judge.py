"""That the judge of `make chaos` can find fault."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cognate_server.migrations
from tests.chaos.run import Findings, judge, judge_history
from training_common.jobs.store import EventRow, JobRow, JobStore
from training_common.store.database import Database


def made(folder: Path) -> tuple[JobStore, JobRow]:
    database = Database(f"sqlite:///{folder / 'store.db'}")
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    store = JobStore(database)
    with database.write() as connection:
        return store, store.submit(connection, plan=b"", total_steps=30, caller="test")


def history(*facts: tuple[int, str, int]) -> list[EventRow]:
    """Return events of (attempt, kind, step)."""
    rows = []
    for number, (attempt, kind, step) in enumerate(facts, 1):
        payload: dict[str, Any] = {"step": step, "metrics": {"loss": 1.0}}
        rows.append(
            EventRow(id=number, job_id=1, sequence=number, time_us=number, attempt=attempt, kind=kind, payload=payload)
        )
    return rows


def found(folder: Path, events: Sequence[EventRow], last: int = 0) -> Findings:
    _, job = made(folder)
    findings = Findings()
    judge_history(JobRow(**{**vars(job), "last_sequence": last or len(events)}), events, 10, findings)
    return findings


GOOD = ((1, "progress", 5), (1, "checkpoint", 10), (1, "progress", 10), (1, "progress", 18), (2, "progress", 11))


def test_a_history_in_order_is_clean(tmp_path: Path) -> None:
    findings = found(tmp_path, history(*GOOD))
    assert findings.clean
    assert 8 == findings.most_steps_lost


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        (((1, "progress", 5), (1, "progress", 16), (2, "progress", 1)), "lost_too_much"),
        (((1, "progress", 5), (2, "progress", 1), (1, "progress", 6)), "side_by_side"),
        (((1, "progress", 5), (1, "progress", 5)), "side_by_side"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, facts: Sequence[tuple[int, str, int]], fault: str) -> None:
    findings = found(tmp_path, history(*facts))
    assert getattr(findings, fault)
    assert not findings.clean


def test_a_lost_event_is_found(tmp_path: Path) -> None:
    assert found(tmp_path, history(*GOOD)[1:]).gaps
    assert found(tmp_path, history(*GOOD), last=len(GOOD) + 1).gaps


def test_a_job_that_did_not_succeed_is_found(tmp_path: Path) -> None:
    store, job = made(tmp_path)
    with store.database.write() as connection:
        store.cancel(connection, job.name)
    findings = Findings()
    judge("cognate_server", store.database, [job.name], findings)
    assert findings.not_succeeded
    assert not findings.clean
