"""Replays of jobs' steps: bit for bit, away from the job's files, by real workers over both stores."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from cognateforge.exceptions import (
    CheckpointGoneError,
    CheckpointNotFoundError,
    IllegalTransitionError,
    VerificationOpenError,
)
from tests.jobs.test_jobs import pid
from tests.support import waiting
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.attempt import FencedOutError
from training_common.jobs.folders import job_dir, jobs_dir
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow
from training_common.jobs.sweeper import Removed, Sweeper
from training_common.jobs.verifications import VerificationRow, VerificationState
from training_common.settings import RetentionSettings
from training_common.store import tables as t
from training_common.store.database import now_us


@pytest.fixture
def local(tmp_path: Path) -> Iterator[ToyService]:
    """Yield a service over SQLite, where what is tested does not depend on the store."""
    service = ToyService(tmp_path)
    yield service
    service.database.close()


async def until(service: ToyService, job: JobRow, condition: Callable[[VerificationRow], bool]) -> VerificationRow:
    """Let the scheduler work until the job's newest verification fulfils the condition."""
    async with asyncio.timeout(60):
        while not condition(row := service.verification(job)):
            service.scheduler.tick()
            await asyncio.sleep(0.02)
    return row


def at_work(path: Path, before: str) -> bool:
    """Return whether another worker than `before` waits there."""
    try:
        return path.read_text() not in {"", before}
    except FileNotFoundError:
        return False


def done(row: VerificationRow) -> bool:
    return row.end_us is not None


def files(service: ToyService, job: JobRow) -> dict[str, tuple[int, bytes]]:
    """Return every file of the job but its logs: when it was changed, and its bytes."""
    folder = job_dir(service.settings, job.name)
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }


async def test_a_replay_gives_the_same_bits_and_touches_nothing(service: ToyService) -> None:
    """Of the newest checkpoint from the one before it; the receipt says what was compared, and the job is as it was."""
    job = await service.until(service.submit(steps=30, checkpoint_every=10), ended)
    before = files(service, job)
    service.verify(job)
    row = await until(service, job, done)
    assert (VerificationState.DONE, "") == (row.state, row.failure)
    receipt = row.receipt
    assert receipt is not None
    assert ("EQUAL", receipt["recorded_digest"]) == (receipt["verdict"], receipt["replayed_digest"])
    assert ["ballast", "state.json"] == [one["path"] for one in receipt["files"]]
    assert {"python", "threads", "cognateforge", "torch"} <= receipt["environment"].keys()
    assert before == files(service, job)
    assert job == service.store.get(job.name)
    # The receipt is stored before the worker has tidied up.
    scratch = jobs_dir(service.settings).parent / "verifications"
    log = job_dir(service.settings, job.name) / "logs" / f"verify-{row.id}.log"
    await waiting.until(lambda: not list(scratch.iterdir()) and "verification done" in log.read_text(), timeout_s=20)


async def test_a_step_that_is_not_the_same_is_found(local: ToyService) -> None:
    """One bit is enough: the verdict is DIFFERENT, and that is no failure of the verification."""
    job = await local.until(local.submit(steps=30, checkpoint_every=10, differs_at=25), ended)
    local.verify(job)
    row = await until(local, job, done)
    assert row.receipt is not None
    assert (VerificationState.DONE, "DIFFERENT") == (row.state, row.receipt["verdict"])
    assert row.receipt["recorded_digest"] != row.receipt["replayed_digest"]


@pytest.mark.slow
async def test_a_paused_jobs_last_checkpoint_is_replayed_too(local: ToyService) -> None:
    """It is of a step that the plan does not save at; afterwards the job goes on as if nothing had been."""
    job = local.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await local.until(job, lambda row: row.step >= 13)
    local.steer("pause", job)
    job = await local.until(job, lambda row: row.state is JobState.PAUSED)
    local.verify(job)
    row = await until(local, job, done)
    assert row.receipt is not None, row.failure
    assert "EQUAL" == row.receipt["verdict"]
    local.steer("resume", job)
    job = await local.until(job, ended)
    assert [expected_result(60)] == local.result(job)


async def test_what_cannot_be_verified_is_refused(service: ToyService) -> None:
    """A job that runs, steps without a checkpoint or whose files are gone, and a second one at a time."""
    job = service.submit(steps=40, checkpoint_every=10)
    with pytest.raises(IllegalTransitionError, match="is QUEUED: pause it or wait"):
        service.verify(job)
    job = await service.until(job, ended)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 11 before step 40"):
        service.verify(job, from_step=11)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 40 before step 30"):
        service.verify(job, from_step=40, to_step=30)
    with pytest.raises(CheckpointGoneError, match="choose others"):
        service.verify(job, from_step=10)
    service.verify(job, from_step=30, to_step=40)
    with pytest.raises(VerificationOpenError, match="is under way"):
        service.verify(job)


async def test_a_damaged_checkpoint_gives_no_receipt(local: ToyService) -> None:
    """Nothing is replayed from what is not as it was saved."""
    job = await local.until(local.submit(steps=20, checkpoint_every=10), ended)
    (job_dir(local.settings, job.name) / "checkpoints" / "step-0000000010.1" / "state.json").write_text("{}")
    local.verify(job)
    row = await until(local, job, done)
    assert (VerificationState.FAILED, None) == (row.state, row.receipt)
    assert "CHECKPOINT_GONE: the checkpoint of step 10: state.json does not have the digest" in row.failure


@pytest.mark.slow
async def test_a_killed_replay_is_begun_again_and_its_old_worker_is_fenced_out(local: ToyService) -> None:
    """Once; after the third worker it has failed. What was given up can store no receipt."""
    job = await local.until(local.submit(steps=20, checkpoint_every=10), ended)
    (job_dir(local.settings, job.name) / "replay-waits").touch()
    local.verify(job)
    before = ""
    for number in (1, 2, 3):
        row = await until(local, job, lambda row, n=number: row.tries == n and row.handle != "")  # type: ignore[misc]
        scratch = jobs_dir(local.settings).parent / row.name
        # Each empties the folder and fills it again before it is at work.
        await waiting.until(partial(at_work, scratch / "replay-waits", before), timeout_s=60)
        before = (scratch / "replay-waits").read_text()
        os.kill(pid(row.handle), signal.SIGKILL)
        with pytest.raises(FencedOutError):
            local.verifications.finish(VerificationRow(**{**vars(row), "tries": number - 1}), {})
    row = await until(local, job, done)
    assert (VerificationState.FAILED, 3) == (row.state, row.tries)
    assert "try 3: the worker process was ended by SIGKILL" in row.failure
    assert scratch.exists(), "nobody was left to remove it"
    Sweeper(local.database, jobs_dir(local.settings), RetentionSettings()).sweep()
    assert not scratch.exists()


async def test_a_replay_that_is_killed_with_its_server_before_it_registers_is_missed_at_once(
    service: ToyService,
) -> None:
    """Its handle outlives both, so that nobody waits for the longest start."""
    job = await service.until(service.submit(steps=20, checkpoint_every=10), ended)
    service.verify(job)
    service.scheduler.tick()
    *_, child = service.engine._children.values()
    child.kill()
    child.wait()
    assert "" == service.verification(job).handle
    service.restart()
    async with asyncio.timeout(30):
        row = await until(service, job, done)
    assert (VerificationState.DONE, 2) == (row.state, row.tries)


async def test_a_replay_without_a_worker_ends_however_often_servers_do(service: ToyService) -> None:
    """A server that ended before it could tell of its worker: the wall clock counts, as no server lives that long."""
    job = await service.until(service.submit(steps=20, checkpoint_every=10), ended)
    service.verify(job)
    assert service.verifications.begin("") is not None
    with service.database.write() as connection:
        connection.execute(sa.update(t.verifications).values(heartbeat_us=now_us() - 121_000_000))
    service.scheduler.tick()
    row = await until(service, job, done)
    assert (VerificationState.DONE, 2) == (row.state, row.tries)


@pytest.mark.slow
async def test_a_replay_takes_a_slot_and_jobs_come_first(local: ToyService) -> None:
    """With one slot it waits for the jobs that wait, and they wait for it once it runs."""
    job = await local.until(local.submit(steps=20, checkpoint_every=10), ended)
    (job_dir(local.settings, job.name) / "replay-waits").touch()
    local.verify(job)
    first = await local.until(local.submit(steps=3), ended)
    assert first.state is JobState.SUCCEEDED
    row = await until(local, job, lambda row: row.handle != "")
    second = local.submit(steps=3)
    for _ in range(5):
        local.scheduler.tick()
    assert JobState.QUEUED is local.store.get(second.name).state
    os.kill(pid(row.handle), signal.SIGKILL)
    assert JobState.SUCCEEDED is (await local.until(second, ended)).state


async def test_retention_waits_for_an_open_verification(service: ToyService) -> None:
    """Neither the job's own policy nor a sweep removes what a replay needs."""
    job = await service.until(service.submit(steps=20, checkpoint_every=10), ended)
    row = service.verify(job)
    settings = RetentionSettings(job_files_days=1)
    sweeper = Sweeper(
        service.database, jobs_dir(service.settings), settings, clock=lambda: now_us() + 2 * 86_400 * 10**6
    )
    sweeper.sweep()
    assert (Removed(), [True, True]) == (
        sweeper.removed,
        [checkpoint.available for checkpoint in service.store.checkpoints(job.id)],
    )
    with service.database.write() as connection:
        connection.execute(sa.update(t.verifications).filter_by(id=row.id).values(state="FAILED", end_us=1))
    sweeper.sweep()
    assert 1 == sweeper.removed.job_folders


@pytest.mark.slow
async def test_a_policy_leaves_checkpoints_of_an_open_verification(local: ToyService) -> None:
    """A paused job that goes on keeps them until the receipt is there."""
    job = local.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await local.until(job, lambda row: row.step >= 22)
    local.steer("pause", job)
    job = await local.until(job, lambda row: row.state is JobState.PAUSED)
    named = [row.step for row in local.store.checkpoints(job.id) if row.available]
    local.verify(job)
    local.steer("resume", job)
    job = await local.until(job, ended)
    assert {60, 50, *named} == {row.step for row in local.store.checkpoints(job.id) if row.available}
