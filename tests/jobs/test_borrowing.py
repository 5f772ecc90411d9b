"""Jobs on cores that Cognate lends: real leases of a real Cognate service, real workers of a toy service."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent_server.borrowing import Borrower
from agent_server.foundation import CognateLink
from agent_server.settings import BorrowSettings, CognateEndpoint
from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import resource_pb2 as pb
from tests.support.contracts import newer, serving
from tests.support.servers import running_cognate
from tests.support.toy_service import ToyService
from tests.support.toy_worker import expected_result
from tests.support.waiting import until
from training_common.engines.local import LocalEngine
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.store import JobRow, JobStore
from training_common.rpc.server import RunningServer
from training_common.store.database import Database, now_us

CPU = pb.RESOURCE_KIND_CPU


@pytest.fixture(autouse=True)
def four_cores(no_drain_notice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lent does not depend on the machine. Cognate's own workers are never started here."""
    monkeypatch.setattr("cognate_server.resources.os.cpu_count", lambda: 4)


class Sides:
    """A lender and a borrower: both are looked after by `until`, as their servers would."""

    def __init__(
        self,
        folder: Path,
        cognate: RunningServer,
        *,
        ttl_s: float = 30,
        slots: int = 1,
        borrow: BorrowSettings | None = None,
    ) -> None:
        self.cognate, self.folder = cognate, folder
        (folder / "toy").mkdir()
        self.toy = ToyService(folder / "toy", slots=slots)
        self.link = CognateLink(CognateEndpoint(address=cognate.address))
        self.borrower = Borrower(
            self.toy.store,
            self.toy.scheduler,
            self.link,
            slots=slots,
            settings=borrow or BorrowSettings(cores=2, ttl_s=ttl_s),
        )

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60, *, borrow: bool = True) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, [self.toy.events(job)[-3:] for job in self.jobs()]
            self.toy.scheduler.tick()
            if borrow:
                await asyncio.to_thread(self.borrower.tick)
            await asyncio.sleep(0.02)

    def jobs(self) -> list[JobRow]:
        return self.toy.store.page(states=(), before_id=None, limit=100)

    def now(self, job: JobRow) -> JobRow:
        return self.toy.store.get(job.name)

    def notes(self, job: JobRow) -> list[str]:
        return [event.payload["kind"] for event in self.toy.events(job) if event.kind == "note"]

    async def lent(self) -> int:
        async with AsyncCognateClient(self.cognate.address) as client:
            answer = await client.resources.GetAvailability(pb.GetAvailabilityRequest())
        return next(int(one.lent) for one in answer.capacities if one.kind == CPU)

    def submit_to_cognate(self) -> None:
        """Put a job of Cognate's own into its queue."""
        database = Database(f"sqlite:///{self.folder / 'cognate' / 'store.db'}")
        plan = pretraining_pb2.PretrainingPlan(total_steps=9).SerializeToString()
        with database.write() as connection:
            JobStore(database).submit(connection, plan=plan, total_steps=9, caller="t")
        database.close()


@asynccontextmanager
async def sides(folder: Path, *, grace_s: float = 30, **options: Any) -> AsyncIterator[Sides]:
    async with running_cognate(
        folder / "cognate", workers={"slots": 1, "threads": 3}, lending={"grace_s": grace_s}
    ) as cognate:
        both = Sides(folder, cognate, **options)
        try:
            yield both
        finally:
            both.borrower.stop()
            both.link.close()
            both.toy.database.close()


@pytest.fixture
def idle_cognate(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what Cognate would start, and start nothing. The toy service's engine is left alone."""
    started: list[Any] = []
    launch = LocalEngine.launch

    def maybe(self: LocalEngine, arguments: Any, **more: Any) -> str:
        if self._module != "cognate_server.worker":
            return launch(self, arguments, **more)
        started.append(arguments)
        return "1:0"

    monkeypatch.setattr(LocalEngine, "launch", maybe)
    return started


def result(both: Sides, job: JobRow) -> str:
    return str(next(e.payload["message"] for e in both.toy.events(job) if e.payload.get("kind") == "result"))


def pid(both: Sides, job: JobRow) -> int:
    return int(both.toy.handle(job).partition(":")[0] or 0)


async def test_a_job_without_a_slot_runs_on_borrowed_cores(tmp_path: Path) -> None:
    """One slot and two jobs: the second runs beside the first on a lease, with its cores, which then goes back."""
    async with sides(tmp_path) as both:
        first = both.toy.submit(steps=10_000, step_s=0.01)
        await both.until(lambda: both.now(first).state is JobState.RUNNING, borrow=False)
        second = both.toy.submit(steps=20, step_s=0.01)
        await both.until(lambda: pid(both, second))
        assert both.now(second).lease
        assert 2 == await both.lent()
        assert "--threads 2" in " ".join(psutil.Process(pid(both, second)).cmdline())
        assert not both.now(first).lease
        await both.until(lambda: both.now(second).state in FINAL)
        assert JobState.SUCCEEDED is both.now(second).state
        await both.until(lambda: not both.borrower._tokens)
        assert 0 == await both.lent()


async def test_a_worker_that_cannot_be_started_costs_no_other_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the second of two borrowed workers cannot start, its lease goes back and the first goes on."""
    async with sides(tmp_path, slots=0, borrow=BorrowSettings(cores=1, workers=2)) as both:
        first = both.toy.submit(steps=10_000, step_s=0.01)
        await both.until(lambda: both.now(first).state is JobState.RUNNING)
        attempts = []

        def launch(*_: Any, **__: Any) -> str:
            attempts.append(1)
            raise OSError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(both.toy.engine, "launch", launch)
        both.toy.submit(steps=10)
        await both.until(lambda: attempts)
        assert 1 == await both.lent()
        assert (JobState.RUNNING, 1) == (both.now(first).state, both.now(first).attempt)
        assert [both.now(first).lease] == list(both.borrower._tokens)


async def test_nothing_is_borrowed_while_a_slot_is_free_or_nothing_waits(tmp_path: Path) -> None:
    """Two slots: both jobs run on our own."""
    async with sides(tmp_path, slots=2) as both:
        jobs = [both.toy.submit(steps=20) for _ in range(2)]
        await both.until(lambda: all(both.now(job).state in FINAL for job in jobs))
        assert ["", ""] == [both.now(job).lease for job in jobs]
        await asyncio.to_thread(both.borrower.tick)
        assert 0 == await both.lent()


async def test_nothing_is_borrowed_that_no_worker_could_be_started_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on trial, or one that hands over, would take cores and give them back at every look."""
    asked: list[Borrower] = []
    monkeypatch.setattr(Borrower, "_borrow", lambda self: asked.append(self))
    async with sides(tmp_path, slots=0) as both:
        both.toy.submit(steps=20)
        scheduler = both.toy.scheduler
        monkeypatch.setattr(scheduler, "_launch_again_at", scheduler._clock() + 3600)
        both.borrower.tick()
        monkeypatch.setattr(scheduler, "_launch_again_at", 0.0)
        monkeypatch.setattr(scheduler, "_leaving_s", scheduler._clock())
        both.borrower.tick()
        assert [] == asked
        monkeypatch.setattr(scheduler, "_leaving_s", None)
        both.borrower.tick()
        assert [both.borrower] == asked


async def test_what_is_asked_back_is_yielded_with_a_checkpoint(tmp_path: Path, idle_cognate: list[Any]) -> None:
    """A job of Cognate's needs the cores: ours saves and goes back to the queue within the grace, and loses no step."""
    async with sides(tmp_path, grace_s=20, slots=0) as both:
        job = both.toy.submit(steps=200, step_s=0.02, checkpoint_every=1000)
        await both.until(lambda: both.now(job).step >= 5)
        asked = time.monotonic()
        both.submit_to_cognate()
        await both.until(lambda: both.now(job).state is JobState.RECOVERING)
        await both.until(lambda: idle_cognate)
        took_s = time.monotonic() - asked
        print(f"given back {took_s:.1f} s after Cognate's job was submitted, of a grace of 20 s")
        assert took_s < 15
        row = both.now(job)
        assert 0 == row.retries_without_progress
        assert "capacity_asked_back" in both.notes(job)
        kinds = [event.kind for event in both.toy.events(job)]
        assert "checkpoint" in kinds, "it saved although no checkpoint was due"
        saved = row.step
        both.toy.scheduler = type(both.toy.scheduler)(  # a slot of its own becomes free
            both.toy.store,
            both.toy.engine,
            both.toy.settings.workers.model_copy(update={"slots": 1}),
            settings_file=both.toy.settings_file,
        )
        await both.until(lambda: both.now(job).state in FINAL, borrow=False)
        assert JobState.SUCCEEDED is both.now(job).state
        assert expected_result(200) == result(both, job)
        steps = [event.payload["step"] for event in both.toy.events(job) if event.kind == "progress"]
        assert list(range(1, 201)) == steps, f"none lost, none twice; it had saved {saved}"


async def test_a_worker_that_does_not_yield_is_ended_before_the_grace(tmp_path: Path, idle_cognate: list[Any]) -> None:
    """The cores are free when Cognate's job starts, whatever the borrower's worker does."""
    async with sides(tmp_path, grace_s=4, slots=0) as both:
        job = both.toy.submit(steps=10_000, step_s=0.02, keeps_going=True)
        await both.until(lambda: both.now(job).step >= 5)
        worker = psutil.Process(pid(both, job))
        both.submit_to_cognate()
        alive_at_start = None
        end = time.monotonic() + 30
        while alive_at_start is None:
            assert time.monotonic() < end
            both.toy.scheduler.tick()
            await asyncio.to_thread(both.borrower.tick)
            if idle_cognate:
                alive_at_start = worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
            await asyncio.sleep(0.02)
        assert not alive_at_start
        assert (JobState.RECOVERING, 0) == (both.now(job).state, both.now(job).retries_without_progress)


@pytest.mark.slow
async def test_a_stopped_borrower_that_goes_on_after_the_end_changes_nothing(tmp_path: Path) -> None:
    """SIGSTOP past the end of the lease, with nobody looking after it: resumed, the worker writes nothing more."""
    async with sides(tmp_path, ttl_s=3, slots=0) as both:
        job = both.toy.submit(steps=100_000, step_s=0.001, checkpoint_every=10)
        await both.until(lambda: both.now(job).step >= 20)
        worker = psutil.Process(pid(both, job))
        with both.toy.database.write():  # so that it is stopped in no commit of its own: that would be a write before
            os.kill(worker.pid, signal.SIGSTOP)
            # One thread takes the signal, the others may run on.
            await until(lambda: worker.status() == psutil.STATUS_STOPPED)
        before, events = both.now(job), both.toy.events(job)
        end = time.monotonic() + 20
        while await both.lent():  # the service is gone as well: no tick, no renewal
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert (both.now(job).lease_until_us or 0) <= now_us(), "it ends here no later than at Cognate"
        os.kill(worker.pid, signal.SIGCONT)
        await asyncio.to_thread(worker.wait, 30)
        assert before == both.now(job)
        assert events == both.toy.events(job)
        await both.until(lambda: both.now(job).attempt == 2 and both.now(job).step > before.step)
        assert 0 == both.now(job).retries_without_progress


async def test_a_lease_in_an_unknown_state_is_yielded(tmp_path: Path) -> None:
    """A newer Cognate may say something that this release has no word for: it is no leave to go on."""
    async with sides(tmp_path, slots=0) as both:
        job = both.toy.submit(steps=100_000, step_s=0.01)
        await both.until(lambda: both.now(job).step >= 5)
        lease = {"name": both.now(job).lease, "state": "LEASE_STATE_NEW", "remaining": "20s", "amount": 2}
        with serving(newer(), {"ResourceService/RenewLease": {"lease": lease}}) as address:
            newer_cognate = CognateLink(CognateEndpoint(address=address))
            both.borrower.stop()
            both.borrower = Borrower(
                both.toy.store,
                both.toy.scheduler,
                newer_cognate,
                slots=0,
                settings=BorrowSettings(cores=2, ttl_s=30),
            )
            await both.until(lambda: "capacity_asked_back" in both.notes(job))
            await both.until(lambda: both.now(job).state is JobState.RECOVERING)
            assert 0 == both.now(job).retries_without_progress
            newer_cognate.close()


async def test_when_cognate_is_gone_the_lease_ends_here_in_time(tmp_path: Path) -> None:
    """No renewal comes through: the worker is ended before the lease's end, and the job waits for a slot."""
    async with sides(tmp_path, ttl_s=3, slots=0) as both:
        job = both.toy.submit(steps=100_000, step_s=0.01)
        await both.until(lambda: both.now(job).step >= 5)
        worker = psutil.Process(pid(both, job))
        await both.cognate.stop()
        await both.until(lambda: both.now(job).state is JobState.RECOVERING)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert now_us() <= (both.now(job).lease_until_us or 0)
        assert 0 == both.now(job).retries_without_progress
        await both.until(lambda: both.toy.scheduler.standing.beyond.startswith("nothing can be borrowed: "))


async def test_a_restarted_service_keeps_its_leases(tmp_path: Path) -> None:
    """They stand in the jobs' rows: the next borrower renews them, and the worker never notices."""
    async with sides(tmp_path, ttl_s=3, slots=0) as both:
        job = both.toy.submit(steps=100_000, step_s=0.01)
        await both.until(lambda: both.now(job).step >= 5)
        until_us = both.now(job).lease_until_us or 0
        both.toy.restart()
        both.borrower.stop()
        both.borrower = Borrower(
            both.toy.store,
            both.toy.scheduler,
            both.link,
            slots=0,
            settings=BorrowSettings(cores=2, ttl_s=3),
        )
        await both.until(lambda: now_us() > until_us + 500_000)
        row = both.now(job)
        assert (1, JobState.RUNNING) == (row.attempt, row.state)
        assert 2 == await both.lent()
