"""The order of the queue, deadlines, and what waiting jobs are told, over a real database and real workers."""

import errno
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.clocks import WallClock
from tests.support.toy_service import ToyService, ended
from training_common.attempt import AttemptWaits, StopKind
from training_common.jobs import queue
from training_common.jobs.queue import Scheduling
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, Loss
from training_common.jobs.waits import Standing, Wait, WaitReason, waits
from training_common.store import tables as t
from training_common.store.database import now_us


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


def submit(service: ToyService, scheduling: Scheduling = queue.USUAL, **plan: object) -> JobRow:
    with service.database.write() as connection:
        return service.store.submit(
            connection,
            plan=service.plan(**{"steps": 3, **plan}),
            total_steps=3,
            caller="test",
            scheduling=scheduling,
        )


def taken(service: ToyService) -> list[str]:
    """Take every due job, and return their names in the order of the queue."""
    names = []
    while (job := service.store.begin_attempt("here")) is not None:
        names.append(job.name)
    return names


def told(service: ToyService, standing: Standing, *jobs: JobRow) -> list[Wait | None]:
    rows = [service.store.get(job.name) for job in jobs]
    with service.database.read() as connection:
        found = waits(connection, rows, standing)
    return [found.get(row.id) for row in rows]


# --- priorities


def test_a_higher_priority_goes_first_and_the_older_job_among_equals(service: ToyService) -> None:
    """Whatever order they came in."""
    jobs = [submit(service, Scheduling(priority=priority)) for priority in (0, -5, 7, 0, 100, -5, 7)]
    order = [4, 2, 6, 0, 3, 1, 5]
    assert [jobs[index].name for index in order] == taken(service)


@pytest.mark.parametrize(("hours", "passes"), [(2.9, True), (3.1, False)])
def test_a_point_of_priority_is_worth_an_hour_so_nothing_starves(
    service: ToyService, clock: WallClock, hours: float, passes: bool
) -> None:
    """A job that came three hours after another one passes it with more than three points, not with fewer."""
    older = submit(service)
    clock.advance(hours * 3600)
    younger = submit(service, Scheduling(priority=3))
    expected = [younger.name, older.name] if passes else [older.name, younger.name]
    assert expected == taken(service)


def test_a_job_that_lost_its_worker_keeps_its_place(service: ToyService) -> None:
    """Recovering, it goes before what has come after it with the same priority, and behind a higher one."""
    first = submit(service)
    service.store.begin_attempt("here")
    urgent, second = submit(service, Scheduling(priority=1)), submit(service)
    service.store.cut(*service.store.held()[0], message="lost")
    assert [urgent.name, first.name, second.name] == taken(service)


async def test_a_slot_goes_to_the_highest_priority(service: ToyService) -> None:
    """Real workers, one slot: the job that came last and matters most ends first; no running job is stopped for it."""
    jobs = [submit(service, Scheduling(priority=priority)) for priority in (0, 5)]
    rows = [await service.until(job, ended) for job in jobs]
    starts = [row.start_us or 0 for row in rows]
    assert [JobState.SUCCEEDED] * 2 == [row.state for row in rows]
    assert starts[1] < starts[0]
    assert [1, 1] == [row.attempt for row in rows]


# --- deadlines


def in_s(seconds: float) -> int:
    return now_us() + round(seconds * 1e6)


def test_a_job_without_a_worker_by_start_by_has_failed(service: ToyService, clock: WallClock) -> None:
    """The reason is its own, the message names the deadline, and others go on."""
    late, other = submit(service, Scheduling(start_by_us=in_s(60))), submit(service)
    service.scheduler._settings = service.settings.workers.model_copy(update={"slots": 0})
    service.scheduler.tick()
    assert JobState.QUEUED is service.store.get(late.name).state
    clock.advance(61)
    service.scheduler.tick()
    row = service.store.get(late.name)
    assert (JobState.FAILED, "JOB_DEADLINE_EXCEEDED", None) == (row.state, row.failure_reason, row.deadline_us)
    assert row.failure_message.startswith("had no worker by its deadline start_by 20")
    assert [other.name] == taken(service)


def test_start_by_says_nothing_once_a_worker_was_started(service: ToyService, clock: WallClock) -> None:
    """A job that lost its worker afterwards goes on."""
    job = submit(service, Scheduling(start_by_us=in_s(60)))
    service.store.begin_attempt("here")
    service.store.cut(*service.store.held()[0], message="lost", loss=Loss.CRASHED, most=3)
    clock.advance(61)
    assert [] == service.store.overdue()
    assert [job.name] == taken(service)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.PAUSED, JobState.RECOVERING])
def test_a_job_that_holds_no_worker_ends_at_finish_by(service: ToyService, clock: WallClock, state: JobState) -> None:
    """At once, in whatever state it waits."""
    job = submit(service, Scheduling(finish_by_us=in_s(60)))
    if state is JobState.PAUSED:
        service.steer("pause", job)
    if state is JobState.RECOVERING:
        service.store.begin_attempt("here")
        service.store.cut(*service.store.held()[0], message="lost")
    assert state is service.store.get(job.name).state
    service.scheduler._settings = service.settings.workers.model_copy(update={"slots": 0})
    clock.advance(61)
    service.scheduler.tick()
    row = service.store.get(job.name)
    assert (JobState.FAILED, "JOB_DEADLINE_EXCEEDED") == (row.state, row.failure_reason)
    assert row.failure_message.startswith("did not end by its deadline finish_by 20")


async def test_a_running_job_saves_a_checkpoint_at_finish_by(service: ToyService, clock: WallClock) -> None:
    """Its worker is asked, lets go in order, and the checkpoint of its last step stays."""
    job = submit(service, Scheduling(finish_by_us=in_s(3600)), steps=10_000, step_s=0.01, checkpoint_every=100_000)
    await service.until(job, lambda row: row.step >= 5)
    clock.advance(3601)
    row = await service.until(job, ended)
    assert (JobState.FAILED, "JOB_DEADLINE_EXCEEDED", 1) == (row.state, row.failure_reason, row.attempt)
    [checkpoint] = service.store.checkpoints(job.id)
    assert (row.step, True) == (checkpoint.step, checkpoint.available)
    kinds = [event.payload.get("kind") for event in service.events(job)]
    assert 1 == kinds.count("deadline_passed")
    states = [event.payload["to"] for event in service.events(job) if event.kind == "state_change"]
    assert ["QUEUED", "PREPARING", "RUNNING", "FAILED"] == states


async def test_a_worker_that_does_not_let_go_is_ended_after_the_grace(
    tmp_path: Path, store_url: str, clock: WallClock
) -> None:
    """The first worker hangs in its save; it is killed, and its job has failed for the deadline, not for the loss."""
    service = ToyService(tmp_path, store_url=store_url, deadline_grace_s=30)
    job = submit(service, Scheduling(finish_by_us=in_s(3600)), steps=100, checkpoint_every=10, stuck_in_save_at=10)
    await service.until(job, lambda row: row.step >= 10)
    clock.advance(3601)
    service.scheduler.tick()
    assert JobState.RUNNING is service.store.get(job.name).state
    clock.advance(29)
    service.scheduler.tick()
    assert JobState.RUNNING is service.store.get(job.name).state
    handle = service.handle(job)
    clock.advance(2)
    row = await service.until(job, ended)
    assert (JobState.FAILED, "JOB_DEADLINE_EXCEEDED") == (row.state, row.failure_reason)
    end = time.monotonic() + 10
    while service.engine.alive(handle):
        assert time.monotonic() < end
    service.database.close()


async def test_a_worker_that_does_not_heed_a_cancel_is_ended(tmp_path: Path, store_url: str) -> None:
    """It hangs in its save and gives signs of life all the while; the job ends as its owner wished."""
    service = ToyService(tmp_path, store_url=store_url, cancel_grace_s=0.2)
    job = submit(service, steps=100, checkpoint_every=10, stuck_in_save_at=10)
    await service.until(job, lambda row: row.step >= 10)
    handle = service.handle(job)
    service.steer("cancel", job)
    assert JobState.CANCELLED is (await service.until(job, ended)).state
    end = time.monotonic() + 10
    while service.engine.alive(handle):
        assert time.monotonic() < end
    service.database.close()


async def test_a_worker_that_dies_after_the_deadline_is_not_replaced(service: ToyService, clock: WallClock) -> None:
    """There is no time left for another attempt."""
    job = submit(service, Scheduling(finish_by_us=in_s(3600)))
    service.store.begin_attempt("here")
    clock.advance(3601)
    service.scheduler._end_overdue(service.store.held())
    held, attempt = service.store.held()[0]
    assert StopKind.DEADLINE == held.wish
    after = service.store.cut(held, attempt, message="killed", loss=Loss.KILLED, most=30)
    assert after is not None
    assert (JobState.FAILED, "JOB_DEADLINE_EXCEEDED") == (after.state, after.failure_reason)
    assert job.name == after.name


def test_a_wish_of_the_owner_goes_before_the_deadline(service: ToyService, clock: WallClock) -> None:
    """A job that is being cancelled ends CANCELLED; one that is being paused ends when it is paused."""
    jobs = [submit(service, Scheduling(finish_by_us=in_s(3600))) for _ in range(2)]
    assert 2 == len(taken(service))
    service.steer("cancel", jobs[0])
    service.steer("pause", jobs[1])
    clock.advance(3601)
    service.scheduler._end_overdue(service.store.held())
    assert ["CANCELLING", "PAUSING"] == [service.store.get(job.name).state for job in jobs]
    for held, attempt in service.store.held():
        service.store.cut(held, attempt, message="let go")
    service.scheduler._end_overdue(service.store.held())
    assert ["CANCELLED", "FAILED"] == [service.store.get(job.name).state for job in jobs]


def test_an_ended_job_is_looked_at_no_more(service: ToyService, clock: WallClock) -> None:
    """Whatever its deadline was."""
    job = submit(service, Scheduling(start_by_us=in_s(60), finish_by_us=in_s(120)))
    service.steer("cancel", job)
    clock.advance(200)
    assert [] == service.store.overdue()
    assert JobState.CANCELLED is service.store.get(job.name).state


# --- why a job waits


def test_jobs_in_the_queue_are_told_their_place(service: ToyService) -> None:
    """By priority and age, counted over all that are due; a job that holds a worker waits for nothing."""
    running = submit(service)
    service.store.begin_attempt("here")
    jobs = [submit(service, Scheduling(priority=priority)) for priority in (0, 0, 3)]
    standing = Standing(slots=1, taken=1, beyond="nothing can be borrowed: Cognate is away")
    found = told(service, standing, *jobs, running)
    assert [2, 3, 1, None] == [wait and wait.position for wait in found]
    assert {WaitReason.SLOT} == {wait.reason for wait in found if wait}
    assert found[0] is not None
    words = "place 2 in the queue; 1 of 1 slots of this server are taken; nothing can be borrowed: Cognate is away"
    assert words == found[0].message


@pytest.mark.parametrize(
    ("standing", "reasons"),
    [
        (Standing(slots=1), ["TURN", "SLOT"]),
        (Standing(slots=2), ["TURN", "TURN"]),
        (Standing(slots=2, taken=2), ["SLOT", "SLOT"]),
        (Standing(slots=0), ["SLOT", "SLOT"]),
        (Standing(slots=1, lent="2 cores are lent"), ["LENT", "SLOT"]),
        (Standing(slots=1, launch_again_s=4.0), ["LAUNCH", "SLOT"]),
    ],
)
def test_what_stands_in_the_way_is_told_of_those_that_have_a_place(
    service: ToyService, standing: Standing, reasons: list[str]
) -> None:
    """Only a job for which a slot is free waits for anything but a slot."""
    found = told(service, standing, submit(service), submit(service))
    assert reasons == [wait and wait.reason.value for wait in found]


def test_a_job_whose_peer_is_away_is_told_until_when(service: ToyService, clock: WallClock) -> None:
    """Until then it has no place, since others pass it; afterwards it is in the queue as before."""
    job, other = submit(service), submit(service)
    taking = service.store.begin_attempt("here")
    assert taking is not None
    attempt = service.store.attempt(job.name, 1, taking.fencing_token)
    attempt.wait(AttemptWaits("Cognate", message="connection refused"))
    row = service.store.get(job.name)
    waiting, next_one = told(service, Standing(slots=1), job, other)
    assert Wait(reason=WaitReason.PEER, message="Cognate is away: tried 1 times", not_before_us=row.not_before_us) == (
        waiting
    )
    assert next_one is not None
    assert (WaitReason.TURN, 1) == (next_one.reason, next_one.position)
    clock.advance(61)
    waiting, _ = told(service, Standing(slots=1), job, other)
    assert waiting is not None
    assert (WaitReason.TURN, 1, None) == (waiting.reason, waiting.position, waiting.not_before_us)


def test_a_job_whose_workers_are_killed_is_told_of_the_pause(service: ToyService) -> None:
    """Also where it had waited for another service before."""
    job = submit(service)
    for attempt in (1, 2):
        if attempt == 2:
            with service.database.write() as connection:
                connection.execute(sa.update(t.jobs).values(waits_for="Cognate"))
        service.store.begin_attempt("here")
        service.store.cut(*service.store.held()[0], message="killed", loss=Loss.KILLED, most=30)
    [wait] = told(service, Standing(slots=1), job)
    assert wait is not None
    words = "its workers were ended from outside 2 times without a new checkpoint"
    assert (WaitReason.PAUSE, words, 0) == (wait.reason, wait.message, wait.position)
    assert (wait.not_before_us or 0) > now_us()


async def test_the_scheduler_knows_where_it_stands(service: ToyService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots as it last saw them, what it was told to stand in the way, and that workers cannot be started."""
    scheduler = service.scheduler
    assert Standing(slots=1) == scheduler.standing
    obstacle = "2 cores are lent"
    monkeypatch.setattr(scheduler, "_in_the_way", lambda _connection, _job: obstacle)
    job = service.submit(steps=10_000, step_s=0.01)
    scheduler.tick()
    assert Standing(slots=1, lent="2 cores are lent") == scheduler.standing
    obstacle = ""

    def broken(arguments: Sequence[str], *, log_name: str, processes: int, nodes: int) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "launch", broken)
        scheduler.tick()
    standing = scheduler.standing
    assert 0 < (standing.launch_again_s or 0) <= 1
    assert Standing(slots=1) == replace(standing, launch_again_s=None)
    await service.until(job, lambda row: row.state is JobState.RUNNING)
    assert Standing(slots=1, taken=1) == scheduler.standing
