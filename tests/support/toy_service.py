"""A job service over the toy worker: real database, real scheduler, real processes, no gRPC."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cognate_server.migrations
from tests.support.toy_worker import ToySettings
from training_common.engines.local import LocalEngine, Spread
from training_common.jobs.folders import jobs_dir, log_name, nodes_dir
from training_common.jobs.queue import NOBODYS, USUAL, Demand, Scheduling
from training_common.jobs.scheduler import Preempting, Scheduler
from training_common.jobs.states import FINAL
from training_common.jobs.store import EventRow, JobRow, JobStore
from training_common.jobs.verifications import VerificationRow, VerificationStore
from training_common.jobs.verifier import Verifier
from training_common.store.database import Database


def ended(job: JobRow) -> bool:
    """Whether a job is in a state that it never leaves."""
    return job.state in FINAL


class ToyService:
    """Stands for a server: `restart` is what a kill -9 and a new start do to it."""

    def __init__(
        self,
        folder: Path,
        *,
        store_url: str = "",
        server: str = "",
        shared_dir: Path | None = None,
        preempting: Callable[["ToyService"], Preempting] | None = None,
        **workers: Any,
    ) -> None:
        self.preempting = preempting
        self.folder = folder
        self.settings_file = folder / "settings.toml"
        options = {"heartbeat_interval_s": 0.1, **workers}
        lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
        paths = {"data_dir": str(folder / "data"), "shared_dir": str(shared_dir or folder / "data")}
        top = [f"{key} = {json.dumps(value)}" for key, value in {**paths, "store_url": store_url}.items()]
        self.settings_file.write_text("\n".join([*top, "[workers]", *lines]) + "\n")
        self.settings = ToySettings.model_validate({**paths, "store_url": store_url, "workers": options})
        self.server = server
        self._start()
        self.database.upgrade(Path(cognate_server.migrations.__file__).parent)

    def _start(self) -> None:
        self.database = Database(self.settings.database_url)
        self.store = JobStore(self.database)
        workers, spread = self.settings.workers, None
        if workers.rendezvous_host:
            spread = Spread(
                folder=nodes_dir(self.settings),
                owner="toy",
                host=workers.rendezvous_host,
                lost_after_s=workers.node_lost_after_s,
            )
        self.engine = LocalEngine(module="tests.support.toy_worker", log_dir=jobs_dir(self.settings), spread=spread)
        self.verifications = VerificationStore(self.store)
        options: dict[str, Any] = {"settings_file": self.settings_file, "server": self.server}
        verifier = Verifier(self.verifications, self.engine, self.settings.workers, **options)
        preempting = self.preempting(self) if self.preempting else None
        self.scheduler = Scheduler(
            self.store, self.engine, self.settings.workers, verifier=verifier, preempting=preempting, **options
        )

    def restart(self) -> None:
        """Forget everything that is only in memory."""
        self.database.close()
        self._start()

    def submit(
        self,
        scheduling: Scheduling = USUAL,
        demand: Demand = NOBODYS,
        *,
        processes: int = 1,
        nodes: int = 1,
        **plan: Any,
    ) -> JobRow:
        with self.database.write() as connection:
            return self.store.submit(
                connection,
                plan=self.plan(**plan),
                total_steps=plan["steps"],
                caller="test",
                scheduling=scheduling,
                demand=replace(demand, processes=processes, nodes=nodes),
            )

    @staticmethod
    def plan(**plan: Any) -> bytes:
        """Return a toy plan as it is stored."""
        return json.dumps(plan).encode()

    def steer(self, verb: str, job: JobRow) -> JobRow:
        with self.database.write() as connection:
            moved: JobRow = getattr(self.store, verb)(connection, job.name)
            return moved

    def verify(self, job: JobRow, *, from_step: int = 0, to_step: int = 0) -> VerificationRow:
        with self.database.write() as connection:
            return self.verifications.submit(connection, job.name, from_step=from_step, to_step=to_step, caller="test")

    def verification(self, job: JobRow) -> VerificationRow:
        """Return the job's newest one."""
        with self.database.read() as connection:
            return self.verifications.of_job(connection, job.id, 1)[0].row

    def events(self, job: JobRow) -> list[EventRow]:
        return self.store.events_after(job.id, 0, 100_000)

    def result(self, job: JobRow) -> list[str]:
        """Return what the job's attempts have computed, one text for each that came to the end."""
        return [event.payload["message"] for event in self.events(job) if event.payload.get("kind") == "result"]

    def handle(self, job: JobRow) -> str:
        """Return the registered handle of the job's current attempt, "" before."""
        return next((attempt.handle for row, attempt in self.store.held() if row.id == job.id), "")

    def log(self, job: JobRow) -> str:
        """Return what the job's newest worker has written."""
        return (jobs_dir(self.settings) / log_name(job.name, self.store.get(job.name).attempt)).read_text()

    async def until(self, job: JobRow, condition: Callable[[JobRow], bool], timeout_s: float = 60) -> JobRow:
        """Let the scheduler work until the job fulfils the condition."""
        async with asyncio.timeout(timeout_s):
            while True:
                self.scheduler.tick()
                now = self.store.get(job.name)
                if condition(now):
                    return now
                await asyncio.sleep(0.02)


class ClusterToyService(ToyService):
    """Its workers run on a cluster, whose API is called by the scheduler: it looks in a thread."""

    # Between two looks, and the longest wait.
    look_every_s = 0.02
    patience_s = 60.0

    async def until(self, job: JobRow, condition: Callable[[JobRow], bool], timeout_s: float | None = None) -> JobRow:
        async with asyncio.timeout(timeout_s or self.patience_s):
            while True:
                await asyncio.to_thread(self.scheduler.tick)
                now = self.store.get(job.name)
                if condition(now):
                    return now
                await asyncio.sleep(self.look_every_s)

    def cuts(self, job: JobRow) -> list[str]:
        """Return why the job was taken away from its workers, one text for each of them."""
        return [event.payload["message"] for event in self.events(job) if event.payload.get("to") == "RECOVERING"]
