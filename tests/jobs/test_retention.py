"""What ended jobs leave behind goes when it is old enough, and nothing else does. The clock is the test's."""

import threading

import pytest
import sqlalchemy as sa

from cognateforge.exceptions import CheckpointGoneError
from tests.support.outbox import append_job_events
from tests.support.toy_service import ToyService
from training_common.jobs.folders import job_dir, jobs_dir
from training_common.jobs.pins import set_pinned
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, once
from training_common.jobs.sweeper import Removed, Sweeper
from training_common.settings import RetentionSettings
from training_common.store import tables as t
from training_common.store.database import now_us

DAY_US = 86_400 * 10**6
SETTINGS = RetentionSettings(job_files_days=10, job_events_days=20, request_ids_days=5)


class Clock:
    """Says how many days have passed since the test began."""

    def __init__(self) -> None:
        self.days = 0.0

    def __call__(self) -> int:
        return now_us() + round(self.days * DAY_US)


def sweeper(service: ToyService, clock: Clock, settings: RetentionSettings = SETTINGS) -> Sweeper:
    return Sweeper(service.database, jobs_dir(service.settings), settings, clock=clock)


def job_with_files(service: ToyService, *, to: JobState = JobState.FAILED) -> JobRow:
    """Store a job with two checkpoints of 100 bytes and a log of 10, and bring it into a state."""
    service.submit(steps=9)
    row = service.store.begin_attempt("here")
    assert row is not None
    attempt = service.store.attempt(row.name, row.attempt, row.fencing_token)
    folder = job_dir(service.settings, row.name)
    for step in (10, 20):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step}" / "state").write_bytes(b"x" * 100)
        attempt.add_checkpoint(step=step, digest=f"sha256:{step}", size_bytes=100, folder=f"step-{step}")
    (folder / "logs").mkdir()
    (folder / "logs" / "attempt-1.log").write_bytes(b"x" * 10)
    if to is JobState.PAUSED:
        with service.database.write() as connection:
            service.store.pause(connection, row.name)
    if to is not JobState.PREPARING:
        attempt.move(to)
    return service.store.get(row.name)


def available(service: ToyService, job: JobRow) -> list[int]:
    return [row.step for row in service.store.checkpoints(job.id) if row.available]


def files(service: ToyService, job: JobRow) -> list[str]:
    root = job_dir(service.settings, job.name)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


ALL = ["checkpoints/step-10/state", "checkpoints/step-20/state", "logs/attempt-1.log"]


def test_files_of_an_ended_job_go_when_their_time_has_come(service: ToyService) -> None:
    """Not before; its checkpoints are told to be gone, its row tells when, and a second sweep finds nothing to do."""
    job, clock = job_with_files(service), Clock()
    sweep = sweeper(service, clock)
    clock.days = 9.9
    sweep.sweep()
    assert (ALL, [20, 10]) == (files(service, job), available(service, job))
    clock.days = 10.1
    sweep.sweep()
    assert ([], []) == (files(service, job), available(service, job))
    assert not job_dir(service.settings, job.name).exists()
    assert service.store.get(job.name).files_removed_us == pytest.approx(now_us(), abs=60e6)
    assert Removed(job_folders=1, size_bytes=210) == sweep.removed
    sweep.sweep()
    assert Removed(job_folders=1, size_bytes=210) == sweep.removed


@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.PAUSED, JobState.RECOVERING])
def test_a_job_that_can_go_on_keeps_everything(service: ToyService, state: JobState) -> None:
    """However old it is."""
    job, clock = job_with_files(service, to=state), Clock()
    clock.days = 10_000
    sweep = sweeper(service, clock)
    sweep.sweep()
    assert (ALL, [20, 10], Removed()) == (files(service, job), available(service, job), sweep.removed)
    assert job.last_sequence == len(service.events(job))


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(service: ToyService) -> None:
    """The rest of its job's folder goes around it."""
    job, clock = job_with_files(service), Clock()
    with service.database.write() as connection:
        set_pinned(connection, job.id, step=10, digest="", pinned=True)
    sweep = sweeper(service, clock)
    clock.days = 11
    for _ in range(2):
        sweep.sweep()
        assert (["checkpoints/step-10/state"], [10]) == (files(service, job), available(service, job))
    assert Removed(size_bytes=110) == sweep.removed
    assert service.store.get(job.name).files_removed_us is None
    with service.database.write() as connection:
        with pytest.raises(CheckpointGoneError):
            set_pinned(connection, job.id, step=20, digest="", pinned=True)
        set_pinned(connection, job.id, step=10, digest="", pinned=False)
    sweep.sweep()
    assert ([], Removed(job_folders=1, size_bytes=210)) == (files(service, job), sweep.removed)


def test_events_go_but_for_the_last(service: ToyService) -> None:
    """In batches; the job's row stays whole and tells from where on its history is left."""
    job, clock = job_with_files(service), Clock()
    append_job_events(service.database, job.name, 2500)
    job = service.store.get(job.name)
    sweep = sweeper(service, clock)
    clock.days = 19
    sweep.sweep()
    assert job.last_sequence == len(service.events(job))
    clock.days = 21
    sweep.sweep()
    left = service.events(job)
    assert [job.last_sequence] == [event.sequence for event in left]
    after = service.store.get(job.name)
    assert (job.last_sequence, job.last_sequence, job.state) == (after.first_sequence, after.last_sequence, after.state)
    assert job.last_sequence - 1 == sweep.removed.events


def test_request_ids_go(service: ToyService) -> None:
    """A repeat is answered from the store before, and is a new wish afterwards."""
    done = 0

    def work() -> bytes:
        nonlocal done
        done += 1
        return b"%d" % done

    def ask() -> bytes:
        with service.database.write() as connection:
            return once(connection, caller="c", request_id="r", method="m", payload=b"p", work=work)

    clock = Clock()
    sweep = sweeper(service, clock)
    assert b"1" == ask()
    clock.days = 4.9
    sweep.sweep()
    assert b"1" == ask()
    clock.days = 5.1
    sweep.sweep()
    assert (b"2", 1) == (ask(), sweep.removed.request_ids)


def test_zero_days_keep_for_good(service: ToyService) -> None:
    """And where the folder of all jobs is not mounted, nobody is told that its files are gone."""
    job, clock = job_with_files(service), Clock()
    clock.days = 30_000
    sweep = sweeper(service, clock, RetentionSettings(job_files_days=0, job_events_days=0, request_ids_days=0))
    sweep.sweep()
    assert (ALL, Removed()) == (files(service, job), sweep.removed)
    jobs_dir(service.settings).rename(service.folder / "away")
    sweep = sweeper(service, clock)
    sweep.sweep()
    assert (0, [20, 10]) == (sweep.removed.job_folders, available(service, job))
    assert service.store.get(job.name).files_removed_us is None


def test_servers_that_sweep_at_once_count_everything_once(service: ToyService) -> None:
    """Four of them over twenty jobs."""
    jobs = [job_with_files(service) for _ in range(20)]
    clock = Clock()
    clock.days = 21
    sweepers = [sweeper(service, clock) for _ in range(4)]
    threads = [threading.Thread(target=one.sweep) for one in sweepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sweepers[0].sweep()  # what two of them passed over because of each other
    events = sum(job.last_sequence - 1 for job in jobs)
    total = [sum(getattr(one.removed, key) for one in sweepers) for key in ("job_folders", "size_bytes", "events")]
    assert [20, 20 * 210, events] == total
    assert [] == list(jobs_dir(service.settings).iterdir())


def test_a_published_jobs_row_and_artifact_stay(service: ToyService) -> None:
    """Lineage is asked for by names and digests: rows of jobs, checkpoints and artifacts are not removed."""
    job, clock = job_with_files(service), Clock()
    with service.database.write() as connection:
        values = {"family": "m", "version": 1, "state": "READY", "digest": "d", "manifest": b"{}", "size_bytes": 1}
        connection.execute(sa.insert(t.artifacts).values(job=job.name, create_us=1, **values))
    clock.days = 30_000
    sweeper(service, clock).sweep()
    with service.database.read() as connection:
        assert 1 == connection.execute(sa.select(sa.func.count()).select_from(t.artifacts)).scalar()
    assert [("sha256:20", 20), ("sha256:10", 10)] == [
        (row.digest, row.step) for row in service.store.checkpoints(job.id)
    ]
