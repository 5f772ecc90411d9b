"""Jobs, attempts and fencing, over a real database and real worker processes."""

import errno
import os
import signal
import sqlite3
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import psutil
import pytest
import sqlalchemy as sa

from cognateforge.exceptions import IllegalTransitionError, JobNotFoundError, RequestIdReusedError
from tests.support import toy_worker
from tests.support.clocks import WallClock
from tests.support.postgres import PostgresServer
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import ToySettings, expected_result
from training_common import worker
from training_common.attempt import AttemptWaits, FencedOutError
from training_common.checkpoints import CheckpointFolder
from training_common.jobs.life import SignsOfLife
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, once
from training_common.store import tables as t
from training_common.store.database import now_us


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def pid(handle: str) -> int:
    return int(handle.partition(":")[0])


def assert_contiguous(service: ToyService, job: JobRow) -> None:
    sequences = [event.sequence for event in service.events(job)]
    assert list(range(1, service.store.get(job.name).last_sequence + 1)) == sequences


async def test_a_job_runs_in_a_worker_process_to_its_end(service: ToyService) -> None:
    """Submit, work, succeed: every state is an event, and sequences are contiguous from 1."""
    job = await service.until(service.submit(steps=12), ended)
    assert job.state == JobState.SUCCEEDED
    assert job.step == 12
    assert [expected_result(12)] == service.result(job)
    states = [e.payload["to"] for e in service.events(job) if e.kind == "state_change"]
    assert states == ["QUEUED", "PREPARING", "RUNNING", "VALIDATING", "SUCCEEDED"]
    assert_contiguous(service, job)


async def test_a_killed_worker_is_followed_by_one_that_goes_on_from_the_checkpoint(service: ToyService) -> None:
    """kill -9 of the worker costs the steps since its checkpoint and nothing else."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: row.step >= 25)
    os.kill(pid(service.handle(job)), signal.SIGKILL)
    job = await service.until(job, ended)
    assert job.state == JobState.SUCCEEDED
    assert job.attempt == 2
    assert [expected_result(60)] == service.result(job)
    resumed = [e.payload["step"] for e in service.events(job) if e.kind == "progress" and e.attempt == 2]
    assert resumed[0] in {21, 31}
    assert_contiguous(service, job)


async def test_a_worker_outlives_the_server_and_is_found_again(service: ToyService) -> None:
    """A server that restarts sees the worker by its handle: no second attempt, nothing lost."""
    job = service.submit(steps=50, step_s=0.02)
    await service.until(job, lambda row: row.step >= 5)
    before = service.handle(job)
    service.restart()
    assert before == service.handle(job)
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert [expected_result(50)] == service.result(job)


async def test_pause_keeps_the_step_and_resume_goes_on(service: ToyService) -> None:
    """A paused job holds no worker; after resume it ends as if it had never paused."""
    job = service.submit(steps=60, step_s=0.02)
    await service.until(job, lambda row: row.step >= 7)
    assert service.steer("pause", job).state == JobState.PAUSING
    job = await service.until(job, lambda row: row.state is JobState.PAUSED)
    assert 0 < job.step < 60
    assert service.store.held() == []
    service.steer("resume", job)
    job = await service.until(job, ended)
    assert [expected_result(60)] == service.result(job)
    steps = [e.payload["step"] for e in service.events(job) if e.kind == "progress"]
    assert list(range(1, 61)) == steps


async def test_cancel_ends_a_running_job(service: ToyService) -> None:
    """The worker lets go by itself, and the job is CANCELLED with no artifact."""
    job = service.submit(steps=10_000, step_s=0.01)
    await service.until(job, lambda row: row.state is JobState.RUNNING)
    assert service.steer("cancel", job).state == JobState.CANCELLING
    job = await service.until(job, ended)
    assert (job.state, job.artifact) == (JobState.CANCELLED, "")


async def test_cancel_while_pausing_wins(service: ToyService) -> None:
    """The newest wish counts, also when the worker has seen the older one."""
    job = service.submit(steps=10_000, step_s=0.2)
    await service.until(job, lambda row: row.state is JobState.RUNNING)
    service.steer("pause", job)
    service.steer("cancel", job)
    assert (await service.until(job, ended)).state == JobState.CANCELLED


def test_a_waiting_job_is_paused_and_cancelled_at_once(service: ToyService) -> None:
    """No worker holds it, so nobody has to be asked."""
    job = service.submit(steps=5)
    assert service.steer("pause", job).state == JobState.PAUSED
    assert service.steer("resume", job).state == JobState.QUEUED
    assert service.steer("cancel", job).state == JobState.CANCELLED


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_an_ended_job_refuses_to_be_steered(service: ToyService, verb: str) -> None:
    """The error names the state and says that nothing is allowed from it."""
    job = service.submit(steps=5)
    service.steer("cancel", job)
    before = service.store.get(job.name)
    with pytest.raises(IllegalTransitionError, match="is CANCELLED and cannot become"):
        service.steer(verb, job)
    assert before == service.store.get(job.name)


async def test_a_typed_failure_keeps_its_reason(service: ToyService) -> None:
    """What the worker refuses is told with the contract's reason, and is not tried again."""
    job = await service.until(service.submit(steps=5, refuse_at=2), ended)
    assert (job.state, job.failure_reason, job.attempt) == (JobState.FAILED, "DATA_UNAVAILABLE", 1)
    assert job.failure_message == "the toy data is gone"


async def test_an_unexpected_failure_keeps_its_detail_in_the_log(service: ToyService) -> None:
    """Exception text may hold paths and data: the job tells where, the worker's log tells what."""
    job = await service.until(service.submit(steps=5, raise_at=2), ended)
    assert (job.state, job.failure_reason) == (JobState.FAILED, "INTERNAL")
    assert "secret" not in job.failure_message
    assert "RuntimeError at toy_worker.py" in job.failure_message
    assert "secret detail of a library" in service.log(job)


async def test_a_full_disk_is_the_machines_fault_and_another_attempt_goes_on(service: ToyService) -> None:
    """The job is told why, keeps its older checkpoint and ends as if nothing had been."""
    job = await service.until(service.submit(steps=30, checkpoint_every=10, disk_full_at=20), ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert [expected_result(30)] == service.result(job)
    told = [e.payload["message"] for e in service.events(job) if e.payload.get("kind") == "platform"]
    assert ["the worker's machine failed it: no space left for a checkpoint; another attempt will go on"] == told


async def test_a_product_that_did_not_fit_is_tried_again_when_there_is_room(
    service: ToyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice of what was written has to fit, less what lies there: until then the job waits instead of being spent."""
    job = await service.until(service.submit(steps=5, product_bytes=3 << 20), ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert 6 << 20 == int(job.facts["room_bytes"])

    again = service.submit(steps=5)
    assert service.store.begin_attempt("local") is not None
    held, row = service.store.held()[0]
    service.store.attempt(again.name, row.number, held.fencing_token).set_facts({"room_bytes": str(6 << 20)})
    store = service.store.attempt(again.name, row.number, held.fencing_token)
    attempt = worker.WorkerAttempt(store, workdir=service.folder / "work")
    (service.folder / "work" / "product").mkdir()
    (service.folder / "work" / "product" / "weights").write_bytes(b"x" * (1 << 20))
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("training_common.worker.os.posix_fallocate", full)
    with pytest.raises(AttemptWaits, match=f"{5 << 20} bytes for a checkpoint or a product cannot be written"):
        attempt.require_storage()


@pytest.mark.parametrize(("free", "told"), [(0, OSError), (1 << 30, RuntimeError)])
def test_a_library_that_fails_on_a_full_disk_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, told: type[Exception]
) -> None:
    """Its own words would have failed the job for good; with space left, they do."""
    attempt = Mock(stop_requested=lambda: None)
    context = Mock(attempt=attempt, job_dir=tmp_path)
    monkeypatch.setattr("training_common.worker._require_signing_key", lambda _: None)
    monkeypatch.setattr("training_common.worker.take_devices", lambda *_, **__: None)
    monkeypatch.setattr("training_common.faults.shutil.disk_usage", lambda path: Usage(9, 9, free))
    with pytest.raises(told):
        worker._work_or_wait(context, Mock(side_effect=RuntimeError("[enforce fail] unexpected pos")))
    assert (told is OSError) == attempt.remember_room.called


async def test_a_missing_file_is_not_the_machines_fault(service: ToyService) -> None:
    """Another attempt would miss it too, so the job fails at once."""
    job = await service.until(service.submit(steps=5, missing_at=2), ended)
    assert (job.state, job.attempt, job.failure_reason) == (JobState.FAILED, 1, "INTERNAL")
    assert "secret" not in job.failure_message


def test_a_writer_that_fails_on_a_full_disk_is_told_apart(service: ToyService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries raise errors of their own then; with space left, the error is the writer's."""
    job = service.submit(steps=1)
    assert service.store.begin_attempt("local") is not None
    held, attempt = service.store.held()[0]
    store = service.store.attempt(job.name, attempt.number, held.fencing_token)
    folder = CheckpointFolder(service.folder / "checkpoints", store)

    def write(folder: Path) -> None:
        raise RuntimeError("a library's words")

    with pytest.raises(RuntimeError, match="a library's words"):
        folder.save(step=1, write=write)
    monkeypatch.setattr("training_common.faults.shutil.disk_usage", lambda path: Usage(9, 9, 0))
    with pytest.raises(OSError, match="no space left for a checkpoint"):
        folder.save(step=1, write=write)
    assert [] == list((service.folder / "checkpoints").iterdir())


async def test_a_worker_that_is_killed_with_its_server_before_it_registers_is_missed_at_once(
    service: ToyService,
) -> None:
    """Its handle outlives both, so that nobody waits for the longest start."""
    job = service.submit(steps=3)
    service.scheduler.tick()
    [child] = service.engine._children.values()
    child.kill()
    child.wait()
    service.restart()
    done = await service.until(job, ended, timeout_s=30)
    assert (JobState.SUCCEEDED, 2) == (done.state, done.attempt)


async def test_an_attempt_without_a_worker_ends_however_often_servers_do(service: ToyService) -> None:
    """A server that ended before it could tell of its worker: the wall clock counts, as no server lives that long."""
    job = service.submit(steps=3)
    service.store.begin_attempt("local")
    long_ago = now_us() - 121_000_000
    with service.database.write() as connection:
        connection.execute(sa.update(t.attempts).values(start_us=long_ago, heartbeat_us=long_ago))
    service.scheduler.tick()
    now = service.store.get(job.name)
    assert (JobState.RECOVERING, 0) == (now.state, now.retries_without_progress)


async def test_workers_that_cannot_be_started_cost_jobs_nothing(
    service: ToyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries wait longer and longer, no job fails, and all goes on by itself when a worker starts again."""
    now = 0.0
    scheduler = Scheduler(
        service.store, service.engine, service.settings.workers, settings_file=service.settings_file, clock=lambda: now
    )
    job = service.submit(steps=3)
    launch, tries = service.engine.launch, list[float]()

    def broken(arguments: Sequence[str], *, log_name: str, processes: int, nodes: int) -> str:
        tries.append(now)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(service.engine, "launch", broken)
    for _ in range(400):
        scheduler.tick()
        now += 0.5
    assert [0, 1, 3, 7, 15, 31, 63, 123, 183] == tries
    assert service.store.get(job.name).state is JobState.RECOVERING
    assert scheduler.last_launch_failed
    monkeypatch.setattr(service.engine, "launch", launch)
    now += 60
    scheduler.tick()
    assert not scheduler.last_launch_failed
    job = await service.until(job, ended)
    assert (job.state, len(tries) + 1) == (JobState.SUCCEEDED, job.attempt)


def test_a_launch_that_failed_is_forgotten_with_an_empty_queue(
    service: ToyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health would otherwise keep away the jobs whose launch alone could show that all is well again."""
    now = 0.0
    scheduler = Scheduler(
        service.store, service.engine, service.settings.workers, settings_file=service.settings_file, clock=lambda: now
    )

    def broken(arguments: Sequence[str], *, log_name: str, processes: int, nodes: int) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(service.engine, "launch", broken)
    job = service.submit(steps=3)
    scheduler.tick()
    assert scheduler.last_launch_failed
    service.steer("cancel", job)
    now += 60
    scheduler.tick()
    assert not scheduler.last_launch_failed


async def end_workers(service: ToyService, job: JobRow, number: signal.Signals, times: int) -> None:
    """End one attempt after the other by a signal, each before its first checkpoint."""
    for count in range(1, times + 1):
        await service.until(job, lambda row, n=count: row.attempt == n and row.state is JobState.RUNNING)  # type: ignore[misc]
        os.kill(pid(service.handle(job)), number)


async def test_losses_without_progress_spend_the_retry_budget(service: ToyService) -> None:
    """A worker that dies before each new checkpoint is not started for ever."""
    job = service.submit(steps=10_000, step_s=0.05, checkpoint_every=100_000)
    await end_workers(service, job, signal.SIGSEGV, 4)
    job = await service.until(job, ended)
    assert (job.state, job.failure_reason, job.attempt) == (JobState.FAILED, "RETRY_BUDGET_SPENT", 4)
    assert "ended by SIGSEGV" in job.failure_message


async def test_workers_ended_from_outside_do_not_touch_the_retry_budget(service: ToyService) -> None:
    """The first is replaced at once, later ones after a pause: a machine that ends workers is not pressed."""
    job = service.submit(steps=10_000, step_s=0.05, checkpoint_every=100_000)
    await end_workers(service, job, signal.SIGKILL, 2)
    before_us = now_us()
    job = await service.until(job, lambda row: row.state is JobState.RECOVERING and row.attempt == 2)
    assert (0, 2) == (job.retries_without_progress, job.kills_without_progress)
    assert 1e6 <= job.not_before_us - before_us <= 3e6
    told = [e.payload["message"] for e in service.events(job) if e.payload.get("to") == "RECOVERING"]
    words = "the worker process was ended by SIGKILL, which a machine short of memory sends too"
    assert [f"attempt 1: {words}", f"attempt 2: {words}"] == told


async def test_a_job_that_is_always_killed_ends(tmp_path: Path, store_url: str) -> None:
    """One that needs more memory than there is would otherwise be started for ever."""
    service = ToyService(tmp_path, store_url=store_url, kills_without_progress=1)
    job = service.submit(steps=10_000, step_s=0.05, checkpoint_every=100_000)
    await end_workers(service, job, signal.SIGKILL, 2)
    job = await service.until(job, ended)
    assert (JobState.FAILED, "RETRY_BUDGET_SPENT", 2) == (job.state, job.failure_reason, job.attempt)
    service.database.close()


@pytest.mark.parametrize("hours", [24, -24])
async def test_a_clock_that_jumps_costs_a_running_job_nothing(
    service: ToyService, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is measured by the steady clock: no worker is given up, and nothing looks unobserved."""
    job = service.submit(steps=40, step_s=0.02)
    await service.until(job, lambda row: row.step >= 5)
    WallClock(monkeypatch).advance(3600 * hours)
    for _ in range(3):
        service.scheduler.tick()
    assert service.store.get(job.name).observed
    job = await service.until(job, ended)
    assert (JobState.SUCCEEDED, 1) == (job.state, job.attempt)


async def test_a_clock_that_is_set_back_keeps_no_job_waiting(
    service: ToyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pause is longer than a minute, so a later moment was written by another clock."""
    job = service.submit(steps=3)
    with service.database.write() as connection:
        connection.execute(sa.update(t.jobs).values(not_before_us=now_us() + round(30e6)))
    service.scheduler.tick()
    assert JobState.QUEUED is service.store.get(job.name).state
    WallClock(monkeypatch).advance(-3600)
    assert JobState.SUCCEEDED is (await service.until(job, ended, timeout_s=20)).state


def test_silence_counts_only_while_somebody_looks() -> None:
    """A server that slept, or whose store was away, cannot say that a worker was silent meanwhile."""
    times = iter([0.0, 1.0, 2.0, 3600.0, 3601.0, 3602.0])
    life = SignsOfLife(lambda: next(times))
    for _ in range(5):
        life.look([(7, 100)])
    assert 3.0 == life.silent_s(7)
    life.look([(7, 101)])
    assert 0.0 == life.silent_s(7)


async def test_losses_with_progress_do_not_fail_a_job(service: ToyService) -> None:
    """Any number of kills is survived while every attempt brings a new checkpoint."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=5)
    for number in range(1, 6):
        start = service.store.get(job.name).step
        floor = start - start % 5
        await service.until(job, lambda row, n=number, s=floor: row.attempt == n and row.step >= s + 6)  # type: ignore[misc]
        os.kill(pid(service.handle(job)), signal.SIGKILL)
    job = await service.until(job, ended)
    assert job.state == JobState.SUCCEEDED
    assert [expected_result(60)] == service.result(job)


def test_a_store_that_is_locked_for_long_fails_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup may hold the database for minutes: the worker waits, longer and longer, and then goes on."""
    monkeypatch.setattr("training_common.store.database._BUSY_TIMEOUT_S", 0.01)
    service = ToyService(tmp_path)
    job = service.submit(steps=3)
    begun = service.store.begin_attempt("test")
    assert begun is not None
    backup = sqlite3.connect(service.settings.data_dir / "store.db", isolation_level=None, check_same_thread=False)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3 and backup.in_transaction:
            backup.execute("ROLLBACK")

    clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time_ns=time.time_ns)
    monkeypatch.setattr("training_common.store.database.time", clock)

    def work(context: worker.WorkerContext[ToySettings]) -> None:
        backup.execute("BEGIN IMMEDIATE")
        toy_worker.work(context)

    # Loggers that were used under a worker's settings keep them for the process's life.
    monkeypatch.setattr("training_common.worker.logs.configure", lambda **_: None)
    argv = ["--settings", str(service.settings_file), "--job", job.name, "--attempt", "1", "--token", "1"]
    worker.main(argv, load_settings=toy_worker.load_settings, work=work)
    job = service.store.get(job.name)
    assert (JobState.SUCCEEDED, 1) == (job.state, job.attempt)
    assert len(waited) >= 3
    backup.close()


def freeze(service: ToyService, handle: str) -> None:
    """Stop a worker at a moment at which it does not hold SQLite's write lock, because the test does."""
    with service.database.write():
        os.kill(pid(handle), signal.SIGSTOP)
        while psutil.Process(pid(handle)).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)


async def test_a_worker_that_was_given_up_changes_nothing(service: ToyService) -> None:
    """Fencing: after its job was cut, a stopped worker that wakes up cannot write, checkpoint or end the job."""
    job = service.submit(steps=10_000, step_s=0.01)
    await service.until(job, lambda row: row.step >= 3)
    [(row, attempt)] = service.store.held()
    stale = service.store.attempt(row.name, attempt.number, attempt.fencing_token)
    freeze(service, attempt.handle)
    service.store.cut(row, attempt, message="given up by the test")
    after = service.store.get(job.name)
    for write in (
        lambda: stale.append("progress", {"step": 99, "total_steps": 1, "metrics": {}}),
        lambda: stale.move(JobState.VALIDATING),
        lambda: stale.add_checkpoint(step=99, digest="sha256:0", size_bytes=1, folder="x"),
        lambda: stale.register("1:1"),
        lambda: stale.set_facts({"a": "b"}),
        stale.heartbeat,
    ):
        with pytest.raises(FencedOutError):
            write()
    assert after == service.store.get(job.name)
    os.kill(pid(attempt.handle), signal.SIGCONT)
    service.steer("cancel", after)


def test_an_attempt_that_is_begun_again_and_again_comes_to_an_end(tmp_path: Path) -> None:
    """A cluster starts anew what a job ends: no retry is counted, but it does not go on for ever."""
    service = ToyService(tmp_path, kills_without_progress=1)
    job = service.submit(steps=5)
    for state in (JobState.RECOVERING, JobState.FAILED):
        begun = service.store.begin_attempt("local")
        assert begun is not None
        store = service.store.attempt(job.name, begun.attempt, begun.fencing_token)
        assert [True, False] == [store.register("1:1"), store.register("2:2")]
        worker._leave_to_another(store, service.settings)
        job = service.store.get(job.name)
        assert (state, 0) == (job.state, job.retries_without_progress)
    assert "RETRY_BUDGET_SPENT" == job.failure_reason
    service.database.close()


async def test_a_silent_worker_is_unobserved_and_not_failed(tmp_path: Path) -> None:
    """Losing sight of a worker is a condition: the state stays, and sight comes back."""
    service = ToyService(tmp_path, lost_after_s=0.5)
    job = service.submit(steps=300, step_s=0.01)
    await service.until(job, lambda row: row.step >= 3)
    freeze(service, service.handle(job))
    silent = await service.until(job, lambda row: not row.observed)
    assert (silent.state, silent.attempt) == (JobState.RUNNING, 1)
    os.kill(pid(service.handle(job)), signal.SIGCONT)
    seen = await service.until(job, lambda row: row.observed)
    assert seen.state != JobState.FAILED
    assert (await service.until(job, ended)).state == JobState.SUCCEEDED
    service.database.close()


async def test_a_damaged_checkpoint_is_skipped_and_told(service: ToyService) -> None:
    """A bit that flipped in the newest checkpoint costs its steps: the one before it is used."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: row.step >= 27)
    os.kill(pid(service.handle(job)), signal.SIGKILL)
    newest = service.store.checkpoints(job.id)[0]
    folder = service.settings.data_dir / "jobs" / job.name.removeprefix("jobs/") / "checkpoints" / newest.folder
    state = folder / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"step": 2', b'"step": 3'))
    job = await service.until(job, ended)
    assert [expected_result(60)] == service.result(job)
    notes = [e.payload for e in service.events(job) if e.payload.get("kind") == "checkpoint_skipped"]
    assert [str(newest.step)] == [note["facts"]["step"] for note in notes]


async def test_slots_bound_how_many_workers_run(tmp_path: Path) -> None:
    """With two slots the third job waits, and the oldest goes first."""
    service = ToyService(tmp_path, slots=2)
    jobs = [service.submit(steps=30, step_s=0.02) for _ in range(3)]
    service.scheduler.tick()
    assert [service.store.get(job.name).state for job in jobs] == ["PREPARING", "PREPARING", "QUEUED"]
    for job in jobs:
        assert (await service.until(job, ended)).state == JobState.SUCCEEDED
    service.database.close()


def test_a_request_id_does_its_work_once(service: ToyService) -> None:
    """The first answer is replayed; another payload under the same id is refused and writes nothing."""

    def start(payload: bytes) -> bytes:
        with service.database.write() as connection:
            return once(
                connection,
                caller="test",
                request_id="8f14e45f-ceea-467f-a8f1-1e7b1ab7a5d5",
                method="Start",
                payload=payload,
                work=lambda: service.store.submit(connection, plan=payload, total_steps=1, caller="test").name.encode(),
            )

    first = start(b"plan")
    assert first == start(b"plan")
    with pytest.raises(RequestIdReusedError):
        start(b"other plan")
    assert [first.decode()] == [row.name for row in service.store.page(states=(), before_id=None, limit=10)]


def test_an_unknown_job_is_told_by_name(service: ToyService) -> None:
    """The error repeats what was asked for."""
    with pytest.raises(JobNotFoundError, match="jobs/nowhere"):
        service.store.get("jobs/nowhere")


def test_a_failed_transaction_leaves_no_row(service: ToyService) -> None:
    """Job, first event and request id are one transaction."""
    with pytest.raises(RuntimeError), service.database.write() as connection:
        service.store.submit(connection, plan=b"", total_steps=1, caller="test")
        raise RuntimeError
    with service.database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(t.jobs)).scalar() == 0
        assert connection.execute(sa.select(sa.func.count()).select_from(t.events)).scalar() == 0


async def test_a_worker_that_lives_and_is_silent_is_given_up(tmp_path: Path, store_url: str) -> None:
    """SIGSTOP for longer than `silent_cut_s`: the worker is ended, and another goes on from the checkpoint."""
    service = ToyService(tmp_path, store_url=store_url, lost_after_s=0.5, silent_cut_s=1.5)
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=5)
    await service.until(job, lambda row: row.step >= 12)
    stopped = psutil.Process(pid(service.handle(job)))
    with service.database.write():  # in no write of its own: that would hold the store
        os.kill(stopped.pid, signal.SIGSTOP)
    await service.until(job, lambda row: not row.observed)
    job = await service.until(job, ended)
    assert (JobState.SUCCEEDED, 2) == (job.state, job.attempt)
    assert [expected_result(60)] == service.result(job)
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    told = [e.payload["message"] for e in service.events(job) if e.payload.get("to") == "RECOVERING"]
    assert ["gave no sign of life" in message for message in told] == [True]
    service.database.close()


async def test_a_server_takes_over_what_another_left(tmp_path: Path, postgres: PostgresServer) -> None:
    """A worker that goes on without its server is left alone; once both are silent, its job goes on elsewhere."""
    url = postgres.new_database()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    options: dict[str, Any] = {"store_url": url, "shared_dir": tmp_path / "shared", "silent_cut_s": 1.5}
    one = ToyService(tmp_path / "one", server="one", **options)
    two = ToyService(tmp_path / "two", server="two", **options)
    job = one.submit(steps=200, step_s=0.02, checkpoint_every=5)
    await one.until(job, lambda row: row.step >= 12)
    step = one.store.get(job.name).step
    await two.until(job, lambda row: row.step >= step + 30)  # the first server no longer looks
    assert 1 == two.store.get(job.name).attempt
    os.kill(pid(two.handle(job)), signal.SIGKILL)
    job = await two.until(job, lambda row: row.attempt == 2 and row.state is JobState.RUNNING)
    assert 0 == job.retries_without_progress
    [told] = [e.payload["message"] for e in two.events(job) if e.payload.get("to") == "RECOVERING"]
    assert told.startswith("attempt 1: no sign of life from one for ")
    with two.database.read() as connection:
        servers = connection.execute(sa.select(t.attempts.c.server).order_by(t.attempts.c.number)).scalars()
        assert ["one", "two"] == list(servers)
    for service in (one, two):
        service.database.close()
