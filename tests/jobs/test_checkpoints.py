"""Which checkpoints stay, pins, and saves beside training: real store, real worker processes."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from cognateforge.exceptions import CheckpointGoneError, CheckpointNotFoundError
from tests.jobs.test_jobs import pid
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.attempt import CheckpointRef
from training_common.checkpoint_writer import CheckpointWriter
from training_common.checkpoints import CheckpointFolder
from training_common.jobs.folders import job_dir
from training_common.jobs.pins import set_pinned
from training_common.jobs.store import AttemptStore, CheckpointRow, JobRow
from training_common.retention import Retention
from training_common.worker import WorkerAttempt


def rows(*checkpoints: tuple[int, float | None]) -> list[CheckpointRow]:
    """Return available checkpoints, newest first, of (step, score)."""
    return [
        CheckpointRow(
            id=step, job_id=1, attempt=1, step=step, digest="", size_bytes=0, folder="", create_us=0,
            available=True, pinned=step == 7, score=score,
        )
        for step, score in sorted(checkpoints, reverse=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Retention(), [9, 8, 7]),
        (Retention(last=0), [9, 8, 7]),
        (Retention(last=3), [9, 8, 7]),
        (Retention(last=4), [9, 8, 7, 6]),
        (Retention(best=1), [9, 8, 7, 3]),
        (Retention(best=3), [9, 8, 7, 3, 2]),
        (Retention(best=1, highest_is_best=True), [9, 8, 7, 5]),
        (Retention(every_steps=3), [9, 8, 7, 6, 3]),
    ],
)
def test_a_policy_keeps_what_any_of_its_rules_wants(policy: Retention, kept: list[int]) -> None:
    """The newest two and the pinned one (7) always stay; without a score a checkpoint is never the best."""
    scores = {2: 0.5, 3: 0.1, 4: 0.6, 5: 0.9, 9: 0.4}
    all_rows = rows(*((step, scores.get(step)) for step in range(1, 10)))
    gone = {row.step for row in policy.superfluous(all_rows)}
    assert kept == [row.step for row in all_rows if row.step not in gone]


def on_disk(service: ToyService, job: JobRow) -> list[str]:
    return sorted(path.name for path in (job_dir(service.settings, job.name) / "checkpoints").iterdir())


def available(service: ToyService, job: JobRow) -> list[int]:
    return [row.step for row in service.store.checkpoints(job.id) if row.available]


async def test_a_jobs_policy_holds_in_its_worker(service: ToyService) -> None:
    """Files and rows agree, of equal scores the newer is the better, and the score is stored with its checkpoint."""
    scores = {str(step): abs(step - 25.0) for step in range(10, 60, 5)}
    job = service.submit(steps=60, checkpoint_every=5, scores=scores, retention={"best": 2, "every_steps": 20})
    job = await service.until(job, ended)
    assert [60, 55, 40, 30, 25, 20] == available(service, job)
    assert [f"step-{step:010d}.1" for step in (20, 25, 30, 40, 55, 60)] == on_disk(service, job)
    assert {60: None, 55: 30, 40: 15, 30: 5, 25: 0, 20: 5} == {
        row.step: row.score for row in service.store.checkpoints(job.id) if row.available
    }


async def test_a_pinned_checkpoint_outlives_retention(service: ToyService) -> None:
    """Pinned while the job runs, it is there at the end; unpinned, the next save of another run may remove it."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: 10 in available(service, job))
    with service.database.write() as connection:
        assert set_pinned(connection, job.id, step=10, digest="", pinned=True).pinned
    job = await service.until(job, ended)
    assert [60, 50, 10] == available(service, job)
    assert "step-0000000010.1" in on_disk(service, job)


async def test_a_checkpoint_that_is_gone_is_not_pinned(service: ToyService) -> None:
    """The error tells whether it never was or is no more."""
    job = await service.until(service.submit(steps=30, checkpoint_every=10), ended)
    with service.database.write() as connection:
        with pytest.raises(CheckpointGoneError, match="of step 10 are gone"):
            set_pinned(connection, job.id, step=10, digest="", pinned=True)
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 11"):
            set_pinned(connection, job.id, step=11, digest="", pinned=True)
        with pytest.raises(CheckpointNotFoundError, match="of step 20 with digest sha256:0"):
            set_pinned(connection, job.id, step=20, digest="sha256:0", pinned=False)


async def test_a_worker_killed_in_a_background_save_leaves_the_older_one(service: ToyService) -> None:
    """kill -9 while a checkpoint is half written: the job goes on from the one before, and the half is swept away."""
    job = service.submit(steps=60, step_s=0.01, checkpoint_every=10, stuck_in_save_at=20)
    folder = job_dir(service.settings, job.name)
    await service.until(job, lambda row: row.step >= 25 and (folder / "stuck").exists())
    assert [10] == available(service, job)
    assert any(name.startswith(".step-0000000020.1") for name in on_disk(service, job))
    os.kill(pid(service.handle(job)), signal.SIGKILL)
    job = await service.until(job, ended)
    assert (2, [expected_result(60)]) == (job.attempt, service.result(job))
    assert [f"step-{step:010d}.2" for step in (50, 60)] == on_disk(service, job)


def attempt_of(service: ToyService) -> AttemptStore:
    service.submit(steps=100)
    row = service.store.begin_attempt("here")
    assert row is not None
    return service.store.attempt(row.name, row.attempt, row.fencing_token)


def test_a_background_save_does_not_turn_the_step_back(service: ToyService, tmp_path: Path) -> None:
    """Progress goes on while a checkpoint is written; the job's step is that of the newest news."""
    attempt = WorkerAttempt(attempt_of(service), workdir=tmp_path / "job", saves_in_background=True)
    may_end = threading.Event()

    def write(folder: Path) -> None:
        (folder / "state").write_text("10")
        assert may_end.wait(30)

    saved = attempt.save_checkpoint(step=10, write=write)
    attempt.progress(step=11, total_steps=100, metrics={})
    assert ([], 11) == (list(attempt.store.checkpoints()), service.store.get(attempt.job).step)
    may_end.set()
    attempt.settle()
    assert (10, 11) == (saved.result().step, service.store.get(attempt.job).step)
    attempt.save_checkpoint(step=12, write=write)
    attempt.settle()
    assert 12 == service.store.get(attempt.job).step
    attempt.close()


def test_an_error_of_the_background_is_raised_once_in_the_trainers_next_call(
    service: ToyService, tmp_path: Path
) -> None:
    """The same exception, from whatever the trainer calls next; nothing is recorded, and the next save works."""
    writer = CheckpointWriter(CheckpointFolder(tmp_path / "checkpoints", attempt_of(service)), background=True)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(folder: Path) -> None:
        raise full

    failed = writer.save(step=1, write=fail, score=None)
    told = failed.exception(timeout=30)
    with pytest.raises(OSError, match="no space left for a checkpoint") as caught:
        writer.check()
    assert told is caught.value
    assert full is caught.value.__cause__
    saved = writer.save(step=2, write=lambda folder: None, score=None)
    assert CheckpointRef(step=2, path=tmp_path / "checkpoints" / "step-0000000002.1") == saved.result(timeout=30)
    writer.close()


def test_saves_in_the_background_keep_their_order(service: ToyService, tmp_path: Path) -> None:
    """At most one is in flight: the next one waits until the one before is recorded."""
    store = attempt_of(service)
    writer = CheckpointWriter(CheckpointFolder(tmp_path / "checkpoints", store), background=True)
    seen: list[list[int]] = []

    def look(folder: Path) -> None:
        seen.append([row.step for row in store.checkpoints()])

    for step in (1, 2, 3):
        writer.save(step=step, write=look, score=None)
    writer.close()
    assert [[], [1], [2, 1]] == seen
