"""What jobs, workers, watches and versions take of the store, of a server and of the network: the inputs of sizing.

Rows are written by the store's own classes as a service and its workers write them, and their bytes are what the
database has grown by, indices included. One small job of Cognate is trained by a real worker: its progress event, log,
checkpoint, manifest and artifact are what the rows and figures are made of. What is a size or a count is exact on any
machine; what is a time holds for the machine it ran on, with all processes on it, those of PostgreSQL (with fsync) and
of the writers included. At the end jobs come to a real service of toy workers at random moments, and the simulator of
tools/capacity.py foretells their waits and rows. The value is the mean wait that was measured, the yardstick the
foretold one.
Usage: python tests/benchmarks/bench_capacity.py [part ...], of: sizes writes scheduler trainjobs server simulator
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

import cognate_server.migrations
from cognateforge.client import AsyncCognateClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.benchmarks.bench_scheduler import insert_jobs
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result
from tests.support.outbox import append_job_events, job_with_events, open_database
from tests.support.postgres import PostgresServer
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry
from training_common.jobs.scheduler import Ending, Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, JobStore, append_event, once
from training_common.settings import WorkerSettings
from training_common.store import tables as t
from training_common.store.database import Database, now_us

STEPS = 12
# A table or an index grows by whole pages, of which so many jobs fill some.
JOBS = 500
PROGRESS = 8
CHECKPOINTS = 4
WRITERS, PROCESSES = 16, 2
WRITE_S = 5.0
QUEUED = 10_000
HELD = (0, 500, 1000, 3000)
TICKS = 10
TRAINJOBS = 1000
WATCHES = 200
EVENTS = 50
HISTORY = 2  # events of the watched job before
CALLS = 300
TIMEOUT_S = 600.0
MIGRATIONS = Path(cognate_server.migrations.__file__ or "").parent
# A plan with what a person usually says in it.
PLAN = pb.PretrainingPlan(total_steps=STEPS, batch_size=1, sequence_length=64, checkpoint_interval_steps=6)
PLAN.datasets.add(dataset=pb.DATASET_FORGE_ARITHMETIC, weight=1)


# --- one real job


def real_job(folder: Path) -> dict[str, Any]:
    """Train a small job of Cognate by a real worker and return what it left behind."""
    settings = {
        "COGNATE_SERVER_WORKERS__SLOTS": "1",
        "COGNATE_SERVER_WORKERS__THREADS": "1",
        "COGNATE_SERVER_PRETRAINING__REASONING_PROBLEMS": "1",
    }
    request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=PLAN)
    with cognate_process(folder, None, **settings) as address, CognateClient(address, timeout_s=TIMEOUT_S) as client:
        name = client.pretraining.StartPretraining(request).job.job.name
        for _ in client.watch_job(name):
            pass
        job = client.pretraining.GetJob(pb.GetJobRequest(name=name)).job.job
        if not job.artifact:
            raise AssertionError(f"{name} published nothing: {job}")
    database = open_database(folder)
    with database.read() as connection:
        progress = connection.execute(sa.select(t.events.c.payload).filter_by(kind="progress")).scalars().all()
        other = connection.execute(sa.select(sa.func.count()).where(t.events.c.kind != "progress")).scalar_one()
        checkpoints = connection.execute(sa.select(t.checkpoints.c.size_bytes)).scalars().all()
        version = connection.execute(sa.select(t.artifacts)).mappings().one()
        requests = connection.execute(sa.select(t.requests.c.answer)).scalars().all()
        plan = connection.execute(sa.select(t.jobs.c.plan)).scalar_one()
    database.close()
    jobs = folder / "jobs"
    return {
        "progress_payload": max(progress, key=lambda one: len(json.dumps(one))),
        "manifest": json.loads(bytes(version["manifest"])),
        "plan": plan.hex(),
        "answer_bytes": max(len(answer) for answer in requests),
        "other_events": other - len(checkpoints),
        "checkpoint_bytes": checkpoints[-1],
        "artifact_bytes": version["size_bytes"],
        "log_bytes": sum(file.stat().st_size for file in jobs.rglob("*.log")),
        "folder_bytes": sum(file.stat().st_size for file in jobs.rglob("*") if file.is_file()),
        "audit_line_bytes": (folder / "audit" / "audit.jsonl").stat().st_size,
    }


# --- bytes of rows


def table_bytes(database: Database) -> dict[str, int]:
    """Return the bytes of each table with its indices, without what is only in a log yet."""
    if database.engine.dialect.name == "sqlite":
        query = "SELECT tbl_name, sum(pgsize) FROM dbstat JOIN sqlite_master USING (name) GROUP BY tbl_name"
    else:
        query = (
            "SELECT relname, pg_total_relation_size(oid) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
    with database.engine.connect() as connection, connection.execution_options(isolation_level="AUTOCOMMIT"):
        if database.engine.dialect.name == "postgresql":
            connection.execute(sa.text("VACUUM"))  # as autovacuum does: rows that were changed leave their old selves
        return {name: int(size) for name, size in connection.execute(sa.text(query))}


def submit(store: JobStore, real: Mapping[str, Any]) -> JobRow:
    """Store a job and the answer to its request, as the servicer does."""
    made: list[JobRow] = []

    def work() -> bytes:
        plan = bytes.fromhex(real["plan"])
        made.append(store.submit(connection, plan=plan, total_steps=STEPS, caller="spiffe://forge.example/person"))
        return bytes(real["answer_bytes"])

    with store.database.write() as connection:
        names = {"caller": "spiffe://forge.example/person", "request_id": str(uuid.uuid4())}
        once(connection, **names, method="StartPretraining", payload=b"", work=work)
    return made[0]


def begin(store: JobStore) -> JobRow:
    """Give the next job an attempt that has registered. Errors: AssertionError, when none waits."""
    job = store.begin_attempt("local", "server.forge.example:/var/lib/cognateforge")
    if job is None:
        raise AssertionError("nothing waits")
    attempt = store.attempt(job.name, job.attempt, job.fencing_token)
    store.set_launched(attempt.attempt.id, "12345:67890.12")
    attempt.register("12345:67890.12")
    attempt.move(JobState.RUNNING)
    return job


def sizes(url: str, folder: Path, real: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes that a row of each kind takes in a database, with its part of the indices."""
    database = Database(url)
    database.upgrade(MIGRATIONS)
    store = JobStore(database)
    live(store, folder, real, JOBS // 10)  # the first pages of all
    before = table_bytes(database)
    grown, others = live(store, folder, real, JOBS)
    size = {name: value - before[name] for name, value in table_bytes(database).items()}
    database.close()
    found = {
        "job": size["jobs"] / JOBS,
        "attempt": size["attempts"] / JOBS,
        "request": size["requests"] / JOBS,
        "checkpoint": size["checkpoints"] / JOBS / CHECKPOINTS,
        "version": sum(size[name] for name in ("artifacts", "results", "sources", "artifact_events")) / JOBS,
        "progress_event": grown / JOBS / PROGRESS,
        "other_event": (size["events"] - grown) / others,
        "other_events_of_a_job": others / JOBS - CHECKPOINTS,
    }
    return {name: round(value, 1) for name, value in found.items()}


def live(store: JobStore, folder: Path, real: Mapping[str, Any], count: int) -> tuple[int, int]:
    """Let jobs live from their submission to a published version.

    Returns by how many bytes progress events have grown their table, and how many other events there are.
    """
    database = store.database
    for _ in range(count):
        submit(store, real)
    jobs = [begin(store) for _ in range(count)]
    attempts = [store.attempt(job.name, job.attempt, job.fencing_token) for job in jobs]

    def train() -> None:
        for step in range(1, PROGRESS + 1):
            for attempt in attempts:
                attempt.progress(step=step, payload=real["progress_payload"])

    def save() -> None:
        for step in range(1, CHECKPOINTS + 1):
            for attempt in attempts:
                digest = f"sha256:{os.urandom(32).hex()}"
                attempt.add_checkpoint(step=step, digest=digest, size_bytes=1, folder=f"step-{step:010d}-{1:04d}")

    blobs = BlobStore(folder / f"artifacts-{database.engine.dialect.name}")
    registry = ArtifactRegistry(database, blobs)
    source = folder / "weights"
    body = {key: value for key, value in real["manifest"].items() if key not in ("schema", "name", "state", "files")}

    def publish() -> None:
        for number, attempt in enumerate(attempts):
            source.write_bytes(b"%d" % number)
            files = [blobs.put(source, f["path"]) for f in real["manifest"]["files"]]
            attempt.move(JobState.VALIDATING)
            with attempt.writing() as connection:
                row = registry.publish(
                    connection, family="cognate-25m", state="READY", job=attempt.job.name, files=files, body=body
                )
                told = {"name": row.name, "digest": row.digest}
                token = attempt.attempt.fencing_token
                append_event(connection, attempt.job.id, "artifact_published", told, only_token=token)
                attempt.move_in(connection, JobState.SUCCEEDED, artifact=row.name)

    before = table_bytes(database)["events"]
    train()
    grown = table_bytes(database)["events"] - before
    for attempt in attempts * 5:
        attempt.heartbeat()
    save()
    publish()
    events = sum(store.get(job.name).last_sequence for job in jobs)
    return grown, events - count * PROGRESS


# --- writes a second


def write_for(url: str, attempts: Sequence[tuple[str, int, int]], kind: str, payload: Any, told: Connection) -> None:
    """Write as workers do, as fast as the store takes it, and tell how often. In a process of its own."""
    database = Database(url)
    stores = [JobStore(database).attempt(*attempt) for attempt in attempts]
    counts = [0] * len(stores)

    def write(number: int, end_s: float) -> None:
        while time.monotonic() < end_s:
            if kind == "heartbeat":
                stores[number].heartbeat()
            else:
                stores[number].progress(step=counts[number], payload=payload)
            counts[number] += 1

    told.send("ready")
    told.recv()
    end_s = time.monotonic() + WRITE_S
    threads = [threading.Thread(target=write, args=(number, end_s)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.send(sum(counts))
    told.recv()  # until then the database's own processes are there to be looked at
    database.close()


def writes(url: str, real: Mapping[str, Any], kind: str, processor_s: Callable[[], float]) -> list[float]:
    """Return writes a second of many workers at once, and the database's processor seconds for each."""
    database = Database(url)
    database.upgrade(MIGRATIONS)
    store = JobStore(database)
    for _ in range(WRITERS):
        submit(store, real)
    jobs = [begin(store) for _ in range(WRITERS)]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for first in range(PROCESSES):
        mine, theirs = context.Pipe()
        attempts = [(job.name, job.attempt, job.fencing_token) for job in jobs[first::PROCESSES]]
        arguments = (url, attempts, kind, real["progress_payload"], theirs)
        processes.append(context.Process(target=write_for, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(mine)
    for pipe in pipes:
        pipe.recv()
    spent_s = processor_s()
    for pipe in pipes:
        pipe.send("go")
    count = sum(pipe.recv() for pipe in pipes)
    spent_s = processor_s() - spent_s
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()
    database.close()
    return [round(count / WRITE_S, 1), round(spent_s / count, 7)]


# --- a look of the scheduler


class AliveEngine:
    """Workers that live."""

    name = "local"

    def launch(self, arguments: Sequence[str], *, log_name: str, processes: int, nodes: int = 1) -> str:
        raise OSError("nothing is launched here")

    def alive(self, handle: str) -> bool:
        return True

    def waits(self, handle: str) -> bool:
        return False

    def ending(self, handle: str) -> Ending:
        raise AssertionError("none ends")

    def tidy(self) -> None:
        """Nothing is left behind."""

    def kill(self, handle: str) -> None:
        raise AssertionError("none is killed")


def looks(url: str, processor_s: Callable[[], float]) -> dict[str, Any]:
    """Return what a look of the scheduler takes with 10,000 jobs in the queue, by the number of jobs with a worker."""
    database = Database(url)
    database.upgrade(MIGRATIONS)
    insert_jobs(database, 0, [JobState.QUEUED] * (QUEUED + max(HELD)))
    if database.engine.dialect.name == "postgresql":
        with database.write() as connection:
            connection.execute(sa.text("ANALYZE"))
    store, held, found = JobStore(database), 0, {}
    claims = []
    for wanted in HELD:
        while held < wanted:
            start_s = time.perf_counter()
            job = store.begin_attempt("local", "bench" if held < 64 else "another")
            claims.append(time.perf_counter() - start_s)
            held += 1
            if job is None:
                raise AssertionError("nothing waits")
        with database.write() as connection:
            connection.execute(sa.update(t.attempts).values(handle="1:1", heartbeat_us=now_us()))
        scheduler = Scheduler(store, AliveEngine(), WorkerSettings(slots=0), settings_file=None, server="bench")
        scheduler.tick()
        times, spent_s, own_s = [], processor_s(), time.process_time()
        for _ in range(TICKS):
            start_s = time.perf_counter()
            scheduler.tick()
            times.append(time.perf_counter() - start_s)
        found[str(wanted)] = {
            "ms": round(1e3 * statistics.median(times), 3),
            "processor_ms": round(1e3 * (time.process_time() - own_s) / TICKS, 3),
            "database_processor_ms": round(1e3 * (processor_s() - spent_s) / TICKS, 3),
        }
    database.close()
    return {"queued": QUEUED, "claim_ms": round(1e3 * statistics.median(claims), 3), "held": found}


# --- Kubernetes


def trainjobs(folder: Path) -> dict[str, float]:
    """Return what a look at one server's TrainJobs takes, for each of them."""
    from tests.support.kubernetes_double import KubernetesDouble
    from training_common.engines.kubernetes import KubernetesEngine
    from training_common.settings import KubernetesSettings

    cluster = KubernetesDouble(folder, environment={})
    try:
        values = {"namespace": "cognate", "runtime": "torch", "queue": "training", "kubeconfig": cluster.kubeconfig}
        resources = {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
        settings = KubernetesSettings.model_validate({**values, "resources": resources})
        engine = KubernetesEngine(settings, module="cognate_server.worker", owner="cognate-server-0")
        for _ in range(TRAINJOBS):
            job = f"jobs/{uuid.uuid4()}"
            arguments = ["--job", job, "--attempt", "1", "--token", "1", "--settings", "/etc/cognateforge/cognate.toml"]
            engine.launch(arguments, log_name=f"{job.replace('/', '-')}-1.log")
        answer = cluster.answer("GET", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/cognate/trainjobs", None)[1]
        times = []
        for _ in range(TICKS):
            start_s = time.thread_time()
            engine.tidy()
            times.append(time.thread_time() - start_s)
    finally:
        cluster.stop()
    return {
        "bytes": round(len(json.dumps(answer)) / TRAINJOBS, 1),
        "processor_us": round(1e6 * statistics.median(times) / TRAINJOBS, 2),
    }


# --- a server


async def watch_many(address: str, job: str, database: Database, service: psutil.Process) -> dict[str, float]:
    """Return what open watches of a job, and events to all of them, take of a service."""
    seen = [0]
    all_here = asyncio.Event()

    async def watch(client: AsyncCognateClient) -> None:
        async for answer in client.pretraining.WatchJob(pb.WatchJobRequest(name=job), timeout=TIMEOUT_S):
            if answer.frame.HasField("event"):
                seen[0] += 1
                all_here.set()

    async def arrived(count: int) -> None:
        while seen[0] < count:
            all_here.clear()
            await asyncio.wait_for(all_here.wait(), TIMEOUT_S)

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncCognateClient(address)) for _ in range(10)]
        warm = asyncio.create_task(watch(clients[0]))
        await arrived(HISTORY)
        before_bytes, seen[0] = service.memory_info().rss, 0
        tasks = [warm, *(asyncio.create_task(watch(clients[n % 10])) for n in range(WATCHES))]
        await arrived(HISTORY * WATCHES)
        grown_bytes = service.memory_info().rss - before_bytes
        await asyncio.sleep(1)
        before_s, start_s, seen[0] = sum(service.cpu_times()[:2]), time.monotonic(), 0
        await asyncio.sleep(5)
        idle_s = (sum(service.cpu_times()[:2]) - before_s) / (time.monotonic() - start_s)
        before_s, start_s = sum(service.cpu_times()[:2]), time.monotonic()
        for number in range(1, EVENTS + 1):
            await asyncio.to_thread(append_job_events, database, job, 1, message="x" * 300)
            await arrived(number * (WATCHES + 1))
        spent_s = sum(service.cpu_times()[:2]) - before_s - idle_s * (time.monotonic() - start_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "watch_kib": round(grown_bytes / WATCHES / 1024, 1),
        "watching_idle_cores": round(idle_s, 4),
        "delivered_event_processor_us": round(1e6 * spent_s / EVENTS / (WATCHES + 1), 1),
    }


def server(folder: Path) -> dict[str, float]:
    """Return what a service takes: memory, and the bytes that calls leave in its logs."""
    start = [pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=PLAN) for _ in range(CALLS)]
    with cognate_process(folder, None) as address, CognateClient(address, timeout_s=TIMEOUT_S) as client:
        [service] = [one for one in psutil.Process().children() if "cognate_server" in one.cmdline()]
        audit, log = folder / "audit" / "audit.jsonl", folder / "server.log"
        names = [client.pretraining.StartPretraining(one).job.job.name for one in start]
        found = {"audit_bytes": round(audit.stat().st_size / CALLS, 1)}
        before_bytes, before_s = log.stat().st_size, sum(service.cpu_times()[:2])
        for name in names:
            client.pretraining.GetJob(pb.GetJobRequest(name=name))
        found["log_bytes"] = round((log.stat().st_size - before_bytes) / CALLS, 1)
        found["waiting_call_processor_us"] = round(1e6 * (sum(service.cpu_times()[:2]) - before_s) / CALLS, 1)
        found["resident_mib"] = round(service.memory_info().rss / 2**20, 1)
        database = open_database(folder)
        job = job_with_events(database, 1, end=False)
        found |= asyncio.run(watch_many(address, job, database, service))
        database.close()
    return found


# --- what the simulator foretells


def simulator(folder: Path) -> dict[str, Any]:
    """Let jobs come to a real service of toy workers, and return what was measured beside what was foretold."""
    from tests.benchmarks.capacity_run import compare

    return compare(folder)


# --- all of it


def all_sizes(real: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of rows in both kinds of store. No commit waits for a disk here: sizes do not depend on it."""
    memory = Path("/dev/shm")
    server = PostgresServer()
    server.start()
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
            urls = {"sqlite": f"sqlite:///{name}/store.db", "postgresql": server.new_database()}
            return {kind: sizes(url, Path(name), real) for kind, url in urls.items()}
    finally:
        server.stop()


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[Mapping[str, Callable[[], tuple[str, Callable[[], float]]]]]:
    """Yield for each kind of store how to make an empty one: its URL, and its own processor seconds so far."""
    server = PostgresServer(durable=True)
    server.start()
    try:
        main = psutil.Process(server.pid)
        numbers = iter(range(1000))

        def spent_s() -> float:
            total = 0.0
            for process in [main, *main.children()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += sum(process.cpu_times()[:2])
            return total

        yield {
            "sqlite": lambda: (f"sqlite:///{folder / f'store{next(numbers)}.db'}", lambda: 0.0),
            "postgresql": lambda: (server.new_database(), spent_s),
        }
    finally:
        server.stop()


def measure(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the parts, each told as soon as it is known."""
    found: dict[str, Any] = {}

    def tell(part: str, value: Any) -> None:
        found[part] = value
        print(json.dumps({part: value}), flush=True)

    real: dict[str, Any] = {}
    if {"sizes", "writes"} & set(parts):
        real = real_job(folder / "real")
        shown = {key: value for key, value in real.items() if key not in ("progress_payload", "manifest", "plan")}
        tell("job", {**shown, "manifest_bytes": len(json.dumps(real["manifest"]))})
    if "sizes" in parts:
        tell("sizes", all_sizes(real))
    if {"writes", "scheduler"} & set(parts):
        with stores(folder) as kinds:
            for kind, new in kinds.items():
                for what in ("heartbeat", "progress") if "writes" in parts else ():
                    url, spent_s = new()
                    tell(f"writes_{kind}_{what}", writes(url, real, what, spent_s))
                if "scheduler" in parts:
                    tell(f"scheduler_{kind}", looks(*new()))
    if "trainjobs" in parts:
        tell("trainjobs", trainjobs(folder))
    if "server" in parts:
        tell("server", server(folder / "server"))
    if "simulator" in parts:
        tell("simulator", simulator(folder / "toys"))
    return found


PARTS = ("sizes", "writes", "scheduler", "trainjobs", "server", "simulator")


def main(parts: Sequence[str]) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-capacity-") as name:
        found = measure(Path(name), parts)
    if "simulator" not in found:
        print(json.dumps({"name": "capacity", "writers": WRITERS, **found}))
        return
    waits = found["simulator"]
    print_result("capacity", waits["measured_wait_s"], waits["foretold_wait_s"], unit="s", writers=WRITERS, **found)


if __name__ == "__main__":
    main(sys.argv[1:] or PARTS)
