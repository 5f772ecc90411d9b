"""Jobs that need what is away: they give their slot back, say until when they wait, and go on when it is there."""

import time
from datetime import datetime
from pathlib import Path

import pytest

from cognateforge.exceptions import IllegalTransitionError
from cognateforge.signatures import make_keys
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.attempt import AttemptWaits, FencedOutError
from training_common.jobs import queue
from training_common.jobs import store as jobs_store
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobRow, JobStore, Loss
from training_common.store.database import now_us


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits as often as always, with shorter pauses. Workers read the constants of their own process."""
    shorten_pauses(monkeypatch)


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for hundredths of a second from now on."""
    monkeypatch.setattr(queue, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(queue, "LONGEST_WAIT_S", 0.02)


def waits(row: JobRow) -> bool:
    return row.state is JobState.QUEUED and row.waits > 0


def begin(service: ToyService) -> AttemptStore:
    """Take the next job as a worker of this process."""
    job = service.store.begin_attempt("here")
    assert job is not None
    return service.store.attempt(job.name, job.attempt, job.fencing_token)


async def test_a_job_that_waits_lets_another_have_its_slot(service: ToyService, tmp_path: Path) -> None:
    """One slot, real workers: the older job waits for Cognate, the younger one ends, and then the older one does."""
    needed = tmp_path / "cognate-is-there"
    older = service.submit(steps=20, needs_file=str(needed))
    younger = service.submit(steps=20)
    older = await service.until(older, waits)
    younger = await service.until(younger, ended)
    assert (younger.state, younger.attempt) == (JobState.SUCCEEDED, 1)
    assert service.store.get(older.name).state in {JobState.QUEUED, JobState.PREPARING}
    needed.touch()
    older = await service.until(older, ended)
    assert (older.state, older.retries_without_progress) == (JobState.SUCCEEDED, 0)
    assert (older.waits, older.not_before_us, older.waiting_since_us) == (0, 0, None)
    events = service.events(older)
    assert [expected_result(20)] == [e.payload["message"] for e in events if e.payload.get("kind") == "result"]
    assert list(range(1, older.last_sequence + 1)) == [event.sequence for event in events]
    told = next(event.payload for event in events if event.payload.get("kind") == "waiting_for_cognate")
    assert "waits for Cognate and is not tried again before " in told["message"]
    assert "connection refused" in told["message"]
    assert datetime.fromisoformat(told["facts"]["until"]).tzinfo is not None


async def test_a_job_waits_for_a_key_that_can_sign(
    service: ToyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it works for nothing; the key that is put right is noticed."""
    keys = tmp_path / "keys"
    monkeypatch.setenv("TOY_SERVER_ARTIFACTS__SIGNING_KEY_FILE", str(keys / "signing.key"))
    job = service.submit(steps=1)
    waiting = await service.until(job, waits)
    assert "signing key" == waiting.waits_for
    make_keys(keys)
    job = await service.until(job, ended)
    assert (job.state, job.retries_without_progress) == (JobState.SUCCEEDED, 0)
    told = next(e.payload for e in service.events(job) if e.payload.get("kind") == "waiting_for_signing_key")
    assert "artifacts.signing_key_file: " in told["message"]


async def test_a_waiting_job_survives_a_restart_of_its_server(service: ToyService, tmp_path: Path) -> None:
    """What it waits for is in the store."""
    needed = tmp_path / "cognate-is-there"
    job = service.submit(steps=5, needs_file=str(needed))
    before = await service.until(job, waits)
    service.restart()
    assert (before.not_before_us, before.waits) == (
        service.store.get(job.name).not_before_us,
        service.store.get(job.name).waits,
    )
    needed.touch()
    assert (await service.until(job, ended)).state is JobState.SUCCEEDED


def test_a_job_is_not_taken_before_its_time(service: ToyService) -> None:
    """Until then every other job goes first, the younger ones too."""
    first, second = service.submit(steps=1), service.submit(steps=1)
    row = begin(service).wait(AttemptWaits("Cognate", message="away"))
    assert (row.name, row.state, row.not_before_us > now_us()) == (first.name, JobState.QUEUED, True)
    assert begin(service).job.name == second.name
    assert service.store.begin_attempt("here") is None


def test_pauses_double_up_to_a_minute_with_jitter() -> None:
    """From 2 s to 60 s, each between half of it and all of it, and no two jobs alike."""
    for tries, longest_s in enumerate([2, 4, 8, 16, 32, 60, 60, 60]):
        drawn = {jobs_store._pause_s(tries) for _ in range(50)}
        assert min(drawn) >= longest_s / 2
        assert max(drawn) <= longest_s
        assert len(drawn) == 50
    assert jobs_store._pause_s(10_000) <= 60


@pytest.mark.parametrize(("verb", "state"), [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)])
def test_a_waiting_job_is_steered_at_once(service: ToyService, verb: str, state: JobState) -> None:
    """No worker holds it, so nothing is waited for; a resumed job is tried at once, with its patience whole again."""
    job = service.submit(steps=1)
    begin(service).wait(AttemptWaits("Cognate", message="away"))
    assert service.steer(verb, job).state is state
    assert service.store.begin_attempt("here") is None
    if verb == "pause":
        row = service.steer("resume", job)
        assert (row.not_before_us, row.waits, row.waiting_since_us) == (0, 0, None)
        assert begin(service).job.name == job.name


def test_a_wish_that_came_first_wins_over_the_wait(service: ToyService) -> None:
    """The owner asked for a pause while the worker looked for Cognate."""
    job = service.submit(steps=1)
    attempt = begin(service)
    service.steer("pause", job)
    with pytest.raises(IllegalTransitionError):
        attempt.wait(AttemptWaits("Cognate", message="away"))
    assert service.store.get(job.name).state is JobState.PAUSING


def test_only_a_worker_gives_a_job_back(service: ToyService) -> None:
    """To resume a job that a worker prepares is as illegal as before; a worker that was given up changes nothing."""
    job = service.submit(steps=1)
    attempt = begin(service)
    with pytest.raises(IllegalTransitionError):
        service.steer("resume", job)
    service.store.cut(*service.store.held()[0], message="lost", loss=Loss.CRASHED, most=3)
    with pytest.raises(FencedOutError):
        attempt.wait(AttemptWaits("Cognate", message="away"))
    assert service.store.get(job.name).state is JobState.RECOVERING


def test_waiting_costs_no_retries_and_has_no_end_by_default(service: ToyService, quick: None) -> None:
    """Twenty tries, and the budget for lost workers is untouched."""
    job = service.submit(steps=1)
    for count in range(1, 21):
        row = until_taken(service).wait(AttemptWaits("Cognate", message="away"))
        assert (row.waits, row.retries_without_progress) == (count, 0)
    assert service.store.get(job.name).state is JobState.QUEUED


def test_patience_is_counted_from_the_first_wait_without_progress(service: ToyService, quick: None) -> None:
    """Progress makes it whole again; when it is spent the job has FAILED with UNAVAILABLE."""
    job = service.submit(steps=1)
    first = until_taken(service).wait(AttemptWaits("Cognate", message="away", give_up_after_s=3600))
    again = until_taken(service).wait(AttemptWaits("Cognate", message="away", give_up_after_s=3600))
    assert first.waiting_since_us == again.waiting_since_us
    moved = until_taken(service).wait(AttemptWaits("Cognate", message="away", give_up_after_s=3600, progressed=True))
    assert (moved.waits, (moved.waiting_since_us or 0) > (first.waiting_since_us or 0)) == (1, True)
    last = until_taken(service).wait(AttemptWaits("Cognate", message="connection refused", give_up_after_s=0.001))
    assert (last.state, last.failure_reason) == (JobState.FAILED, "UNAVAILABLE")
    assert "s for Cognate: connection refused" in last.failure_message
    assert service.store.get(job.name).end_us is not None


def test_many_waiting_jobs_cost_one_look_at_a_time(service: ToyService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look in vain is in vain for all; one that finds what was away lets all others go on at once."""
    jobs = [service.submit(steps=1) for _ in range(5)]
    for _ in jobs:
        begin(service).wait(AttemptWaits("Cognate", message="away"))
    shorten_pauses(monkeypatch)
    for looks in range(1, 4):
        row = until_taken(service).wait(AttemptWaits("Cognate", message="away"))
        now = [service.store.get(job.name) for job in jobs]
        assert all(job.not_before_us >= row.not_before_us for job in now)
        assert len(jobs) + looks == sum(job.waits for job in now)
    first = until_taken(service)
    first.move(JobState.RUNNING)
    others = [job.name for job in jobs if job.name != first.job.name]
    assert others == [begin(service).job.name for _ in others]


def test_no_pause_is_longer_than_the_patience(service: ToyService) -> None:
    """A job that gives up after a tenth of a second is tried once more then, and not two seconds later."""
    service.submit(steps=1)
    row = begin(service).wait(AttemptWaits("Cognate", message="away", give_up_after_s=0.1))
    assert row.not_before_us - (row.waiting_since_us or 0) == 100_000


def until_taken(service: ToyService) -> AttemptStore:
    """Take the only job as soon as its time has come."""
    while True:
        job = JobStore(service.database).begin_attempt("here")
        if job is not None:
            return service.store.attempt(job.name, job.attempt, job.fencing_token)
        time.sleep(0.002)
