"""Several servers over one store, killed at random with or without their workers, until every job has ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import cognate_server.migrations
from tests.support.toy_service import ToyService
from tests.support.toy_worker import expected_result
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.store import JobRow, JobStore
from training_common.store.database import Database

STEPS = 12


@dataclass
class Outcome:
    """What became of the jobs. Each list names jobs, and should be empty."""

    states: Counter[str] = field(default_factory=Counter)
    server_kills: int = 0
    worker_kills: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    done_twice: list[str] = field(default_factory=list)
    wrong_result: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Replica:
    """One server process and its workers."""

    def __init__(self, folder: Path, url: str, *, shared: Path, slots: int) -> None:
        folder.mkdir()
        self._file = folder / "settings.toml"
        self._file.write_text(
            f'data_dir = "{folder}"\nshared_dir = "{shared}"\nstore_url = "{url}"\n'
            f"[workers]\nslots = {slots}\nheartbeat_interval_s = 0.2\nsilent_cut_s = 4\nlost_after_s = 2\n"
        )
        self._log = folder / "server.log"
        self.start()

    def start(self) -> None:
        """Start the server, which finds its workers again."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.toy_server", str(self._file)], stdout=log, stderr=log
            )

    def kill(self, *, workers: bool) -> int:
        """kill -9 the server, and its workers as a machine that goes away would. Returns how many were killed."""
        victims = [self._process.pid]
        if workers:
            victims += [
                process.pid
                for process in psutil.process_iter()
                if _arguments(process)[1:3] == ["-m", "tests.support.toy_worker"]
                and str(self._file) in _arguments(process)
            ]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return len(victims)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def run_through_kills(
    folder: Path, url: str, *, jobs: int, replicas: int, seed: int, timeout_s: float, kills: bool = True
) -> Outcome:
    """Submit the jobs, kill a server every second or so, and return what became of them."""
    pick, outcome, start_s = random.Random(seed), Outcome(), time.monotonic()  # noqa: S311
    database = Database(url)
    database.upgrade(Path(cognate_server.migrations.__file__ or "").parent)
    store = JobStore(database)
    plan = ToyService.plan(steps=STEPS, step_s=0.02, checkpoint_every=4)
    with database.write() as connection:
        rows = [store.submit(connection, plan=plan, total_steps=STEPS, caller="t") for _ in range(jobs)]
    with _replicas(folder, url, replicas) as servers:
        kill_at = time.monotonic() + 2
        while time.monotonic() - start_s < timeout_s:
            with database.read() as connection:
                counts = store.counts(connection, list(JobState))
            if sum(count for state, count in counts.items() if state in FINAL) == jobs:
                break
            if kills and time.monotonic() >= kill_at:
                victim, machine = pick.choice(servers), pick.random() < 0.5
                outcome.worker_kills += victim.kill(workers=machine) - 1
                outcome.server_kills += 1
                victim.start()
                kill_at = time.monotonic() + pick.uniform(0.5, 3)
            time.sleep(0.05)
        for row in rows:
            _judge(store, store.get(row.name), outcome)
    database.close()
    outcome.seconds = round(time.monotonic() - start_s, 1)
    return outcome


@contextlib.contextmanager
def _replicas(folder: Path, url: str, count: int) -> Iterator[list[Replica]]:
    shared = folder / "shared"
    shared.mkdir()
    servers = [Replica(folder / f"server{number}", url, shared=shared, slots=1) for number in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill(workers=True)


def _judge(store: JobStore, job: JobRow, outcome: Outcome) -> None:
    events = store.events_after(job.id, 0, 100_000)
    outcome.states[job.state.value] += 1
    outcome.attempts += job.attempt
    if job.state is not JobState.SUCCEEDED:
        outcome.lost.append(f"{job.name} {job.state} {job.failure_reason} {job.failure_message}")
        return
    results = [event for event in events if event.payload.get("kind") == "result"]
    ends = [event for event in events if event.payload.get("to") == JobState.SUCCEEDED.value]
    # A worker that is killed between its result and its end is followed by another one, which tells its result as well.
    tellers = [event.attempt for event in results]
    if len(ends) != 1 or len(tellers) != len(set(tellers)) or tellers[-1:] != [job.attempt] or events[-1] != ends[0]:
        outcome.done_twice.append(job.name)
    elif {event.payload["message"] for event in results} != {expected_result(STEPS)}:
        outcome.wrong_result.append(job.name)
    if [event.sequence for event in events] != list(range(1, job.last_sequence + 1)):
        outcome.gaps.append(job.name)
