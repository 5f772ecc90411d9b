"""What 100,000 stored jobs cost the scheduler, lists and watches of a Cognate service.

Two stores: one holds the jobs of a long life, ended but for some hundreds that wait, the other only those that wait.
Everything is measured on both in turn. The value are claims a second in the full store: transactions that each take the
next job of the queue for a worker. The yardstick is the same in the almost empty store. Beside it, for both stores and
as the ratio of the full to the almost empty one: a look of the scheduler that finds nothing to do, pages of ListJobs
over a real connection (the newest, those that wait, one deep in the past), a waiting job's GetJob, the time from an
event's commit until a watch has it, and the time from StartPretraining to the first step of a small job in a real
worker.
Usage: python tests/benchmarks/bench_scheduler.py [jobs] [sqlite|postgresql]
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

import cognate_server.migrations
from cognateforge.client import CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.job.v1 import job_pb2
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result
from tests.support.postgres import PostgresServer
from training_common.engines.local import LocalEngine
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore, append_event
from training_common.rpc.paging import make_token
from training_common.settings import WorkerSettings
from training_common.store import tables as t
from training_common.store.database import Database, now_us

WAITING = 500
CLAIMS = 100
CALLS = 50
EVENTS = 20
PAGE = 50
EVENTS_PER_JOB = 3
CHUNK = 5_000
TIMEOUT_S = 300.0
PLAN = pb.PretrainingPlan(total_steps=9).SerializeToString()


@dataclass
class Place:
    """One of the two stores, and its measurements in seconds by their names."""

    folder: Path
    url: str
    database: Database
    store: JobStore


def place(folder: Path, url: str, ended: int) -> Place:
    """Make a store with so many ended jobs below those that wait."""
    folder.mkdir()
    database = Database(url or f"sqlite:///{(folder / 'store.db').resolve()}")
    database.upgrade(Path(cognate_server.migrations.__file__ or "").parent)
    for start in range(0, ended, CHUNK):
        count = min(CHUNK, ended - start)
        insert_jobs(database, start, [JobState.SUCCEEDED if n % 10 else JobState.FAILED for n in range(count)])
    insert_jobs(database, ended, [JobState.QUEUED] * WAITING)
    if not url:
        return Place(folder, url, database, JobStore(database))
    with database.write() as connection:
        connection.execute(sa.text("ANALYZE"))  # as autovacuum does of its own within a minute
    return Place(folder, url, database, JobStore(database))


def insert_jobs(database: Database, first: int, states: list[JobState]) -> None:
    """Insert jobs as they stand after their lives, each with some events."""
    now = now_us()
    jobs, events = [], []
    for number, state in enumerate(states, first + 1):
        ended = state is not JobState.QUEUED
        jobs.append(
            {
                "id": number,
                "name": f"jobs/{uuid.uuid4()}",
                "state": state.value,
                "plan": PLAN,
                "caller": "bench",
                "attempt": int(ended),
                "fencing_token": int(ended),
                "total_steps": 9,
                "step": 9 if ended else 0,
                "last_sequence": EVENTS_PER_JOB,
                "create_us": now + number,
                "queue_us": None if ended else now + number,
                "start_us": now if ended else None,
                "end_us": now if ended else None,
                "facts": {},
            }
        )
        for sequence in range(1, EVENTS_PER_JOB + 1):
            payload = {"step": sequence, "total_steps": 9, "metrics": {"loss": 1.0}}
            events.append(
                {
                    "job_id": number,
                    "sequence": sequence,
                    "time_us": now,
                    "attempt": 1,
                    "kind": "progress",
                    "payload": payload,
                }
            )
    with database.write() as connection:
        connection.execute(sa.insert(t.jobs), jobs)
        connection.execute(sa.insert(t.events), events)
        if connection.dialect.name == "postgresql":  # explicit keys leave the sequence where it was
            connection.execute(
                sa.text("SELECT setval(pg_get_serial_sequence('jobs', 'id'), (SELECT max(id) FROM jobs))")
            )


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds the work takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def median_of(places: list[Place], work: Callable[[Place], object], runs: int) -> list[float]:
    """Return the median seconds of some work in each place, measured in turn after one round to warm up."""
    for one in places:
        work(one)
    rounds = [[timed(lambda one=one: work(one)) for one in places] for _ in range(runs)]  # type: ignore[misc]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def idle_tick(one: Place) -> None:
    """Look once, with no slot to fill."""
    engine = LocalEngine(module="cognate_server.worker", log_dir=one.folder / "logs")
    Scheduler(one.store, engine, WorkerSettings(slots=0), settings_file=None, server="bench").tick()


def claim(one: Place) -> None:
    """Take the next job. Errors: AssertionError, when none waits."""
    if one.store.begin_attempt("bench", "bench") is None:
        raise AssertionError("nothing waits")


def release_all(one: Place) -> None:
    """Put claimed jobs back, outside of what is measured."""
    with one.database.write() as connection:
        waiting = {"state": "QUEUED", "queue_us": t.jobs.c.create_us}
        connection.execute(sa.update(t.jobs).filter_by(state="PREPARING").values(waiting))


@contextlib.contextmanager
def serving(places: list[Place], **settings: str) -> Iterator[list[CognateClient]]:
    """Yield a client of a service over each place."""
    with contextlib.ExitStack() as stack:
        clients = []
        for one in places:
            more = {"COGNATE_SERVER_STORE_URL": one.url, **settings}
            address = stack.enter_context(cognate_process(one.folder, None, **more))
            clients.append(stack.enter_context(CognateClient(address, timeout_s=TIMEOUT_S)))
        yield clients


def lists(places: list[Place]) -> dict[str, list[float]]:
    """Measure reads of jobs over a connection."""
    with serving(places) as clients:
        by_place = {one.folder: client for one, client in zip(places, clients, strict=True)}
        waiting: dict[Path, str] = {}
        deep: dict[Path, str] = {}
        for one in places:
            [newest_job] = one.store.page(states=[JobState.QUEUED], before_id=None, limit=1)
            waiting[one.folder] = newest_job.name
            deep[one.folder] = make_token(pb.ListJobsRequest(), newest_job.id // 2)

        def newest(one: Place) -> None:
            by_place[one.folder].pretraining.ListJobs(pb.ListJobsRequest(page_size=PAGE))

        def waiting_ones(one: Place) -> None:
            states = [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING]
            by_place[one.folder].pretraining.ListJobs(pb.ListJobsRequest(page_size=PAGE, states=states))

        def running_ones(one: Place) -> None:
            states = [job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PREPARING]
            by_place[one.folder].pretraining.ListJobs(pb.ListJobsRequest(page_size=PAGE, states=states))

        def deep_page(one: Place) -> None:
            request = pb.ListJobsRequest(page_size=PAGE, page_token=deep[one.folder])
            by_place[one.folder].pretraining.ListJobs(request)

        def get(one: Place) -> None:
            by_place[one.folder].pretraining.GetJob(pb.GetJobRequest(name=waiting[one.folder]))

        found = {
            "list_newest": newest,
            "list_waiting": waiting_ones,
            "list_running": running_ones,
            "list_deep": deep_page,
            "get_waiting": get,
        }
        return {name: median_of(places, work, CALLS) for name, work in found.items()}


def watch_latencies(places: list[Place]) -> list[float]:
    """Return the median seconds from an event's commit until a watch has it, in each place."""
    result = []
    with serving(places) as clients:
        for one, client in zip(places, clients, strict=True):
            [job] = one.store.page(states=[JobState.QUEUED], before_id=None, limit=1)
            arrived, latest = threading.Condition(), [0, 0.0]

            def follow(
                client: CognateClient, name: str, after: int, arrived: threading.Condition, latest: list[float]
            ) -> None:
                with contextlib.suppress(Exception):  # the service ends while it is watched
                    for frame in client.watch_job(name, after):
                        with arrived:
                            latest[:] = [frame.event.sequence or latest[0], time.monotonic()]
                            arrived.notify()

            arguments = (client, job.name, job.last_sequence - 1, arrived, latest)
            threading.Thread(target=follow, args=arguments, daemon=True).start()
            with arrived:
                arrived.wait_for(lambda: latest[0] >= job.last_sequence, TIMEOUT_S)  # noqa: B023
            times = []
            for number in range(EVENTS):
                with one.database.write() as connection:
                    payload = {"step": number, "total_steps": 9, "metrics": {}}
                    sequence = append_event(connection, job.id, "progress", payload).last_sequence
                committed = time.monotonic()
                with arrived:
                    if not arrived.wait_for(lambda: latest[0] >= sequence, TIMEOUT_S):  # noqa: B023
                        raise AssertionError("an event did not arrive")
                    times.append(max(0.0, latest[1] - committed))
                time.sleep(0.037)  # the service looks every 100 ms: events are not to fall into step with it
            result.append(statistics.median(times))
    return result


def first_step(one: Place) -> float:
    """Return the seconds from StartPretraining to the first step of a small job in a real worker."""
    with one.database.write() as connection:
        connection.execute(sa.update(t.jobs).filter_by(state="QUEUED").values(state="PAUSED", queue_us=None))
    slots = {"COGNATE_SERVER_WORKERS__SLOTS": "1", "COGNATE_SERVER_WORKERS__THREADS": "1"}
    plan = pb.PretrainingPlan(total_steps=1000, batch_size=1, sequence_length=64)
    plan.datasets.add(dataset=pb.DATASET_FORGE_ARITHMETIC, weight=1)
    request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    with serving([one], **slots) as [client]:
        start_s = time.perf_counter()
        name = client.pretraining.StartPretraining(request).job.job.name
        for frame in client.watch_job(name):
            if frame.event.HasField("progress"):
                break
        seconds = time.perf_counter() - start_s
        client.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=name))
        for _ in client.watch_job(name):
            pass  # its worker lets go
    return seconds


def in_ms(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return medians in milliseconds, and their ratio, by name."""
    return {
        name: {"ms": round(1000 * full, 3), "empty_ms": round(1000 * empty, 3), "ratio": round(full / empty, 3)}
        for name, (full, empty) in times.items()
    }


def measure(folder: Path, urls: list[str], jobs: int) -> None:
    """Fill both stores, measure and print."""
    filled_s = time.perf_counter()
    places = [place(folder / "full", urls[0], jobs), place(folder / "empty", urls[1], 0)]
    filled_s = time.perf_counter() - filled_s
    full, empty = places
    rates = [1 / seconds for seconds in median_of(places, claim, CLAIMS)]
    for one in places:
        release_all(one)
    times = {"idle_tick": median_of(places, idle_tick, CALLS), **lists(places)}
    times["watch"] = watch_latencies(places)
    steps = [first_step(full), first_step(empty)]
    for one in places:
        one.database.close()
    print_result(
        "scheduler",
        rates[0],
        rates[1],
        unit="claims/s",
        jobs=jobs,
        waiting=WAITING,
        fill_s=round(filled_s, 1),
        times=in_ms(times),
        submit_to_first_step_s=[round(seconds, 2) for seconds in steps],
    )


def main(jobs: int, kind: str) -> None:
    """Start what the stores need, and measure."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-scheduler-") as name:
        if kind == "sqlite":
            measure(Path(name), ["", ""], jobs)
            return
        server = PostgresServer()
        server.start()
        try:
            measure(Path(name), [server.new_database(), server.new_database()], jobs)
        finally:
            server.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, sys.argv[2] if len(sys.argv) > 2 else "sqlite")
