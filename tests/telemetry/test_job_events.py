"""What the events of jobs are counted as, on both stores: each once, whoever wrote it and however late it appears."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cognate_server.migrations
from tests.support.postgres import PostgresServer
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobRow, JobStore, Loss, note_of
from training_common.store.database import Database
from training_common.telemetry.instruments import Instruments
from training_common.telemetry.job_events import JobEvents


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    database = Database(store_url)
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield database
    database.close()


class Counter:
    """One server's count."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._instruments = Instruments("cognate", methods=(), streams=())
        self.events = JobEvents(database, self._instruments)
        self.look()

    def look(self) -> None:
        with self._database.read() as connection:
            self.events.count_new(connection)

    def counted(self) -> dict[str, float]:
        """Return what stands above 0 after another look."""
        self.look()
        return {
            " ".join([sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "service")]): (
                sample.value
            )
            for family in self._instruments.collect()
            for sample in family.samples
            if sample.value and not sample.name.endswith(("_bucket", "_sum"))
        }


def submit(store: JobStore) -> JobRow:
    with store.database.write() as connection:
        return store.submit(connection, plan=b"", total_steps=9, caller="test")


def begin(store: JobStore) -> AttemptStore:
    job = store.begin_attempt("local")
    assert job is not None
    return store.attempt(job.name, job.attempt, job.fencing_token)


def test_ends_waits_losses_and_recoveries_are_counted_once(database: Database) -> None:
    """By every server of the store alike; what was before it started is not."""
    store = JobStore(database)
    submit(store)
    begin(store).move(JobState.FAILED, failure_reason="INTERNAL")
    first = Counter(database)
    assert first.counted() == {}
    submit(store)
    attempt = begin(store)
    facts = {"detector": "loss_trend", "action": "roll_back"}
    attempt.append("note", note_of("recovery", "", facts))
    attempt.append("note", note_of("data_ready", "", {}))
    after = store.cut(*store.held()[0], message="killed", loss=Loss.KILLED, most=9, lost=True)
    assert after is not None
    begin(store).move(JobState.FAILED, failure_reason="TRAINING_DIVERGED")
    with database.write() as connection:
        store.cancel(connection, store.submit(connection, plan=b"", total_steps=9, caller="test").name)
    wanted = {
        "forge_queue_wait_seconds_count": 1,
        "forge_recovery_actions_total roll_back loss_trend": 1,
        "forge_attempts_lost_total": 1,
        "forge_jobs_ended_total TRAINING_DIVERGED FAILED": 1,
        "forge_jobs_ended_total  CANCELLED": 1,
    }
    assert first.counted() == wanted
    assert first.counted() == wanted
    second = Counter(database)
    submit(store)
    begin(store)
    assert second.counted() == {"forge_queue_wait_seconds_count": 1}
    assert first.counted() == {**wanted, "forge_queue_wait_seconds_count": 2}


def test_a_worker_that_is_given_up_on_purpose_is_no_loss(database: Database) -> None:
    """Preemption, for one: the platform has no part in it."""
    store, counter = JobStore(database), Counter(database)
    submit(store)
    begin(store)
    store.cut(*store.held()[0], message="made room")
    assert counter.counted() == {"forge_queue_wait_seconds_count": 1}


def test_an_event_that_appears_after_a_later_one_is_counted(postgres: PostgresServer) -> None:
    """On PostgreSQL transactions end in another order than their keys were given."""
    database = Database(postgres.new_database())
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    store = JobStore(database)
    counter = Counter(database)
    names = [submit(store).name for _ in range(2)]
    go_on, written = threading.Event(), threading.Event()

    def cancel_late() -> None:
        with database.write() as connection:
            store.cancel(connection, names[0])
            written.set()
            assert go_on.wait(30)

    late = threading.Thread(target=cancel_late)
    late.start()
    assert written.wait(30)
    with database.write() as connection:
        store.cancel(connection, names[1])
    assert counter.counted() == {"forge_jobs_ended_total  CANCELLED": 1}
    go_on.set()
    late.join()
    assert counter.counted() == {"forge_jobs_ended_total  CANCELLED": 2}
    assert counter.counted() == {"forge_jobs_ended_total  CANCELLED": 2}
    database.close()
