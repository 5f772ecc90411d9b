"""Ends workers, servers, whole groups and database connections at random moments of real jobs, by kill -9.

Both services run over one real PostgreSQL; Cognate-25M is pretrained, and agents are made of it. Jobs keep coming until
the last kill, and what is harmed is a service whose worker runs, where there is one. What must hold: every
job succeeds, its history has no gap, attempts never write side by side, no attempt begins more than one checkpoint
interval before the last step of the one before it, and all jobs of one plan publish the weights of the one that ran
before the first kill.
Usage: python -m tests.chaos.run [kills] [seed]; the last line is one JSON object.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import sqlalchemy as sa

from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exceptions import ForgeError
from deploy.services import Service, Services
from tests.support.postgres import PostgresServer
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.store import EventRow, JobRow, JobStore
from training_common.store import tables as t
from training_common.store.database import Database

COGNATE, AGENT = "cognate_server", "agent_server"
STEPS = {COGNATE: 48, AGENT: 60}
INTERVAL = {COGNATE: 8, AGENT: 10}
# One trains, and those that wait are more than could end between two kills.
LEAST_UNFINISHED = {COGNATE: 2, AGENT: 3}
KINDS = ("worker", "server", "group", "connections")
# Long enough that something is done between two kills of one service, even on a busy machine.
PAUSE_S = (1.0, 14.0)
CALM_S = 600.0
# A service that was just started again may not take a job at once.
ANSWER_S = 60.0
AFTERWARDS_S = 1800.0
SETTINGS = {"WORKERS__THREADS": "1", "WORKERS__CHECKPOINTS": "sync", "DRAIN_GRACE_S": "0.5"}


@dataclass
class Findings:
    """What should be empty, by job; and the most steps that any attempt had to do again."""

    not_succeeded: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    side_by_side: list[str] = field(default_factory=list)
    lost_too_much: list[str] = field(default_factory=list)
    published_twice: list[str] = field(default_factory=list)
    other_weights: list[str] = field(default_factory=list)
    most_steps_lost: int = 0
    attempts: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not any(value for value in vars(self).values() if isinstance(value, list))


@dataclass(frozen=True)
class Harm:
    """met: how many processes or connections. busy: whether a worker of the service ran a job at that moment."""

    met: int
    busy: bool


class Victims:
    """Both services, and the ways to harm them."""

    def __init__(self, folder: Path, urls: dict[str, str], pick: random.Random) -> None:
        self._services = Services(folder)
        self._urls = urls
        self._pick = pick
        self.databases = {name: Database(url) for name, url in urls.items()}
        self._running: dict[str, Service] = {}

    def start(self, name: str, address: str = "127.0.0.1:0") -> Service:
        """Start a service over its database."""
        settings = {**SETTINGS, "STORE_URL": self._urls[name]}
        if name == AGENT:
            settings["COGNATE__ADDRESS"] = self._running[COGNATE].address
        self._running[name] = self._services.start(name, address=address, settings=settings)
        return self._running[name]

    def address(self, name: str) -> str:
        """Return where a service is to be called."""
        return self._running[name].address

    def harm(self, kind: str) -> Harm:
        """Do one harm to a service, to one whose worker runs where there is one."""
        workers = {name: [process.pid for process in self._workers(name)] for name in (COGNATE, AGENT)}
        name = self._pick.choice([name for name, pids in workers.items() if pids] or [COGNATE, AGENT])
        busy = bool(workers[name])
        if kind == "connections":
            return Harm(self._cut_connections(name), busy)
        if kind == "worker":
            return Harm(_kill(self._pick.sample(workers[name], min(1, len(workers[name])))), busy)
        service = self._running[name]
        met = _kill([service.process.pid, *(workers[name] if kind == "group" else ())])
        service.process.wait()
        self._services.running.remove(service)
        self.start(name, service.address)
        return Harm(met, busy)

    def _workers(self, name: str) -> list[psutil.Process]:
        """Return the workers of this run's jobs."""
        with self.databases[name].read() as connection:
            ours = set(connection.execute(sa.select(t.jobs.c.name)).scalars())
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if f"{name}.worker" in command and ours & set(command):
                found.append(process)
        return found

    def _cut_connections(self, name: str) -> int:
        text = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with self.databases[name].engine.connect() as connection:
            return int(connection.execute(sa.text(text)).scalar_one())

    def stop(self) -> None:
        """End everything."""
        self._services.stop()
        for name, database in self.databases.items():
            _kill([process.pid for process in self._workers(name)])
            database.close()


def _kill(pids: Sequence[int]) -> int:
    met = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            met += 1
    return met


def submit_pretraining(address: str) -> str:
    """Submit the one pretraining plan, and return the job's name."""
    plan = cognate_v1.PretrainingPlan(
        total_steps=STEPS[COGNATE],
        seed=3,
        batch_size=2,
        sequence_length=64,
        checkpoint_interval_steps=INTERVAL[COGNATE],
    )
    request = cognate_v1.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    with CognateClient(address) as client:
        return _patiently(lambda: client.pretraining.StartPretraining(request).job.job.name)


def submit_training(address: str, foundation: str) -> str:
    """Submit the one plan of an agent, and return the job's name."""
    plan = agent_v1.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=agent_v1.FoundationBase(name=foundation, accept_experimental=True),
        classification=agent_v1.ClassificationTask(generated=agent_v1.GeneratedSource(seed=1), max_rows_per_label=8),
        adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW()),
        total_steps=STEPS[AGENT],
        batch_size=8,
        checkpoint_interval_steps=INTERVAL[AGENT],
    )
    request = agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    with AgentClient(address) as client:
        return _patiently(lambda: client.training.StartTraining(request).job.job.name)


def _patiently(submit: Callable[[], str]) -> str:
    """Submit until it is answered. Each try has the same request id, so that it makes one job."""
    end_s = time.monotonic() + ANSWER_S
    while True:
        try:
            return submit()
        except ForgeError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.5)


def unfinished(database: Database, names: Sequence[str]) -> list[JobRow]:
    """Return those of the jobs that have not ended."""
    return [row for row in map(JobStore(database).get, names) if row.state not in FINAL]


def wait_for(database: Database, names: Sequence[str], timeout_s: float) -> None:
    """Wait until these jobs have ended. Errors: AssertionError, naming what is left."""
    end_s = time.monotonic() + timeout_s
    while left := unfinished(database, names):
        if time.monotonic() > end_s:
            raise AssertionError(f"not ended in {timeout_s:.0f} s: {[(row.name, row.state, row.step) for row in left]}")
        time.sleep(0.5)


def judge(service: str, database: Database, names: Sequence[str], findings: Findings) -> None:
    """Look at what became of these jobs; the first ran before the first kill."""
    store = JobStore(database)
    weights: dict[str, str] = {}
    for name in names:
        job = store.get(name)
        findings.attempts += job.attempt
        if job.state is not JobState.SUCCEEDED:
            findings.not_succeeded.append(f"{name} {job.state} {job.failure_reason}: {job.failure_message}")
            continue
        judge_history(job, store.events_after(job.id, 0, 1_000_000), INTERVAL[service], findings)
        published = _published(database, name)
        if len(published) != 1:
            findings.published_twice.append(name)
        weights[name] = published[0]
        if weights[name] != weights.get(names[0]):
            findings.other_weights.append(name)


def judge_history(job: JobRow, events: Sequence[EventRow], interval: int, findings: Findings) -> None:
    """Look at the events of a job that succeeded."""
    if [event.sequence for event in events] != list(range(1, job.last_sequence + 1)):
        findings.gaps.append(job.name)
    if [event.attempt for event in events] != sorted(event.attempt for event in events):
        findings.side_by_side.append(job.name)
    last, saved, attempt = 0, 0, 0
    for event in events:
        if event.attempt != attempt:
            # Where the new attempt begins: at the newest checkpoint, if not at the first step.
            lost, attempt, last = last - saved, event.attempt, saved
            findings.most_steps_lost = max(findings.most_steps_lost, lost)
            if lost > interval:
                findings.lost_too_much.append(f"{job.name}: {lost}")
        if event.kind == "checkpoint":
            saved = event.payload["step"]
        # What is measured after training bears the last step again, and so has no loss.
        if event.kind == "progress" and "loss" in event.payload["metrics"]:
            if event.payload["step"] <= last:
                findings.side_by_side.append(f"{job.name}: step {event.payload['step']} after {last}")
            last = event.payload["step"]


def _published(database: Database, job: str) -> list[str]:
    """Return the digest of the weights of each version that a job published."""
    with database.read() as connection:
        manifests = connection.execute(sa.select(t.artifacts.c.manifest).filter_by(job=job)).scalars().all()
    return [
        next(file["digest"] for file in json.loads(manifest)["files"] if file["path"].endswith("model.safetensors"))
        for manifest in manifests
    ]


class Supply:
    """Jobs of both services that never run out. names: the jobs' names, that of the one in peace first."""

    def __init__(self, victims: Victims) -> None:
        """Start both services, and run one job of each in peace."""
        self._victims = victims
        self.names: dict[str, list[str]] = {COGNATE: [], AGENT: []}
        self._foundation = ""
        for service in (COGNATE, AGENT):
            victims.start(service)
        for service, database in victims.databases.items():
            self._submit(service)
            wait_for(database, self.names[service], CALM_S)
            self._foundation = self._foundation or JobStore(database).get(self.names[service][0]).artifact

    def fill(self) -> None:
        """Submit jobs until each service has enough that are not finished."""
        for service, database in self._victims.databases.items():
            for _ in range(LEAST_UNFINISHED[service] - len(unfinished(database, self.names[service]))):
                self._submit(service)

    def _submit(self, service: str) -> None:
        address = self._victims.address(service)
        name = submit_pretraining(address) if service == COGNATE else submit_training(address, self._foundation)
        self.names[service].append(name)


def main(kills: int, seed: int) -> None:
    """Run, judge and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pick, start_s = random.Random(seed), time.monotonic()  # noqa: S311
    postgres = PostgresServer()
    postgres.start()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, contextlib.ExitStack() as stack:
        stack.callback(postgres.stop)
        victims = Victims(Path(folder), {name: postgres.new_database() for name in (COGNATE, AGENT)}, pick)
        stack.callback(victims.stop)
        supply = Supply(victims)
        done: collections.Counter[str] = collections.Counter()
        busy = 0
        while done.total() < kills:
            supply.fill()
            time.sleep(pick.uniform(*PAUSE_S))
            kind = pick.choice(KINDS)
            harm = victims.harm(kind)
            done[kind] += bool(harm.met)
            busy += harm.busy and bool(harm.met)
            print(f"{time.monotonic() - start_s:7.1f} s  {dict(done)}, {busy} of busy services", file=sys.stderr)
        findings = Findings()
        for service, jobs in supply.names.items():
            wait_for(victims.databases[service], jobs, AFTERWARDS_S)
            judge(service, victims.databases[service], jobs, findings)
    result = {"name": "chaos", "value": done.total(), "unit": "kills", "seed": seed, "kinds": dict(done)}
    result |= {"busy_kills": busy, "jobs": {service: len(jobs) for service, jobs in supply.names.items()}}
    result |= {"seconds": round(time.monotonic() - start_s), **vars(findings)}
    print(json.dumps(result))
    if not findings.clean:
        raise SystemExit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
