"""Jobs that make room for those that matter more: real workers, and both stores."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_server.preemption import Preemption
from agent_server.resources import AgentResourceManager, Amounts
from agent_server.settings import AgentSettings
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.jobs.queue import Demand, Scheduling
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptRow, AttemptStore, JobRow, JobStore

LONG: dict[str, Any] = {"steps": 100_000, "step_s": 0.01, "checkpoint_every": 100_000}
Open = Callable[..., "Shop"]


class Shop(ToyService):
    """A service that stops jobs for others. Its workers are rows, unless its scheduler is run."""

    def __init__(self, folder: Path, *, url: str = "", clock: Callable[[], float] = time.monotonic, **settings: Any):
        options = AgentSettings.model_validate({"preemption": {"least_difference": 5}, **settings})

        def preempting(service: ToyService) -> Preemption:
            manager = AgentResourceManager(service.database, options, Amounts(cores=8, memory_bytes=100))
            service.store = JobStore(service.database, manager)
            return Preemption(service.store, manager, options.preemption, clock)

        super().__init__(folder, store_url=url, preempting=preempting)

    def begin(self) -> AttemptStore:
        job = self.store.begin_attempt("here")
        assert job is not None
        attempt = self.store.attempt(job.name, job.attempt, job.fencing_token)
        attempt.move(JobState.RUNNING)
        return attempt

    def look(self) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        assert self.scheduler._preempting is not None
        return self.scheduler._preempting.look(self.store.held(), free=0)

    def asked(self) -> set[str]:
        return {job.name for job, _ in self.store.held() if job.wish == "yield"}


@pytest.fixture
def open_shop(tmp_path: Path, store_url: str) -> Iterator[Open]:
    shops: list[Shop] = []

    def open_one(**settings: Any) -> Shop:
        shops.append(Shop(tmp_path, url=store_url, **settings))
        return shops[-1]

    yield open_one
    for shop in shops:
        shop.database.close()


def running(row: JobRow) -> bool:
    return row.state is JobState.RUNNING and row.step > 0


def notes(service: ToyService, job: JobRow) -> list[str]:
    return [event.payload["kind"] for event in service.events(job) if event.kind == "note"]


async def test_a_job_makes_room_for_one_that_matters_more(tmp_path: Path) -> None:
    """It saves a checkpoint, waits, and goes on from there when the other one has ended: once, and told in both."""
    service = Shop(tmp_path)
    # Older by so much that it is before the other one in the queue all the same.
    older = service.submit(Scheduling(priority=0), steps=60, step_s=0.01, checkpoint_every=1000)
    await service.until(older, running)
    with service.database.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET create_us = create_us - 36000000000")
    urgent = service.submit(Scheduling(priority=5), steps=5)
    urgent = await service.until(urgent, ended)
    before = service.store.get(older.name)
    assert (JobState.SUCCEEDED, 1, False) == (urgent.state, urgent.attempt, urgent.claims)
    assert before.state in {JobState.RECOVERING, JobState.PREPARING}
    older = await service.until(older, ended)
    assert (JobState.SUCCEEDED, 2) == (older.state, older.attempt)
    assert (0, 0) == (older.retries_without_progress, older.kills_without_progress)
    results = [event.payload for event in service.events(older) if event.payload.get("kind") == "result"]
    assert [expected_result(60)] == [result["message"] for result in results]
    assert ["preempted"] == [kind for kind in notes(service, older) if kind.startswith("preempt")]
    assert ["preempts"] == [kind for kind in notes(service, urgent) if kind.startswith("preempt")]
    steps = [event.payload["step"] for event in service.events(older) if event.kind == "progress"]
    assert list(range(1, 61)) == steps
    states = [event.payload for event in service.events(older) if event.kind == "state_change"]
    recovering = next(change for change in states if change["to"] == "RECOVERING")
    assert "let go as it was asked to; goes on from its checkpoint" == recovering["message"]


async def test_a_worker_that_does_not_let_go_is_ended(tmp_path: Path) -> None:
    """After the grace it is killed, which costs its job no retry."""
    now = [0.0]
    service = Shop(tmp_path, clock=lambda: now[0], preemption={"least_difference": 5, "grace_s": 30})
    job = service.submit(keeps_going=True, **LONG)
    await service.until(job, running)
    urgent = service.submit(Scheduling(priority=9), steps=3)
    service.scheduler.tick()
    service.scheduler.tick()
    assert "yield" == service.store.get(job.name).wish
    now[0] = 29
    service.scheduler.tick()
    assert JobState.RUNNING is service.store.get(job.name).state
    now[0] = 31
    urgent = await service.until(urgent, ended)
    job = service.store.get(job.name)
    assert (JobState.SUCCEEDED, 0, 0) == (urgent.state, job.retries_without_progress, job.kills_without_progress)


def test_no_more_jobs_are_stopped_than_needed_and_none_back(open_shop: Open) -> None:
    """Three jobs run, one is urgent: the lowest priority goes, the younger one of equals, and that is all."""
    shop = open_shop()
    jobs = [shop.submit(Scheduling(priority=priority), steps=1) for priority in (1, 0, 0)]
    running = {attempt.job.name: attempt for attempt in (shop.begin() for _ in jobs)}
    urgent = shop.submit(Scheduling(priority=7), steps=1)
    for _ in range(3):
        assert [] == list(shop.look())
        assert {jobs[2].name} == shop.asked()
    running[jobs[2].name].move(JobState.RECOVERING)
    assert urgent.name == shop.begin().job.name
    for _ in range(3):
        shop.look()
        assert set() == shop.asked()
    assert [["preempted"], []] == [notes(shop, job) for job in (jobs[2], jobs[1])]
    assert jobs[2].name == shop.begin().job.name


def test_what_makes_room_does_not_take_it_back(open_shop: Open) -> None:
    """Not though its place in the queue is before the other one's, which an hour for a point allows."""
    shop = open_shop()
    older = shop.submit(steps=1)
    with shop.database.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET create_us = create_us - 36000000000")
    attempt = shop.begin()
    between, urgent = shop.submit(Scheduling(priority=4), steps=1), shop.submit(Scheduling(priority=5), steps=1)
    shop.look()
    attempt.move(JobState.RECOVERING)
    assert [urgent.name, older.name, between.name] == [shop.begin().job.name for _ in range(3)]


def test_two_urgent_jobs_stop_two(open_shop: Open) -> None:
    """One at a look, while there is a job that is low enough."""
    shop = open_shop()
    jobs = [shop.submit(Scheduling(priority=priority), steps=1) for priority in (0, 3, 6)]
    for _ in jobs:
        shop.begin()
    for _ in range(3):
        shop.submit(Scheduling(priority=10), steps=1)
    for stopped in ([jobs[0]], jobs[:2], jobs[:2]):
        shop.look()
        assert {job.name for job in stopped} == shop.asked()


def test_a_small_difference_stops_nothing(open_shop: Open) -> None:
    """Four points where five are asked for; a paused job has no claim, and one that validates is let end."""
    shop = open_shop()
    job = shop.submit(steps=1)
    attempt = shop.begin()
    shop.submit(Scheduling(priority=4), steps=1)
    paused = shop.submit(Scheduling(priority=90), steps=1)
    shop.steer("pause", paused)
    shop.look()
    assert set() == shop.asked()
    attempt.move(JobState.VALIDATING)
    shop.submit(Scheduling(priority=90), steps=1)
    shop.look()
    assert ("", JobState.VALIDATING) == (shop.store.get(job.name).wish, shop.store.get(job.name).state)


def test_a_claim_ends_with_its_job(open_shop: Open) -> None:
    """An urgent job that is cancelled before it starts leaves no mark; the one that was stopped goes on."""
    shop = open_shop()
    job = shop.submit(steps=1)
    attempt = shop.begin()
    urgent = shop.submit(Scheduling(priority=9), steps=1)
    shop.look()
    assert shop.store.get(urgent.name).claims
    shop.steer("cancel", urgent)
    assert not shop.store.get(urgent.name).claims
    attempt.move(JobState.RECOVERING)
    assert job.name == shop.begin().job.name


@pytest.mark.parametrize(
    ("settings", "tenant", "stops"),
    [
        ({"tenants": {"a": {}, "b": {}}}, "a", True),
        ({"tenants": {"a": {}, "b": {}}}, "b", True),
        ({"tenants": {"a": {"weight": 10}, "b": {}}}, "b", False),
        ({"tenants": {"a": {}, "b": {"slots": 0}}}, "b", False),
        ({"tenants": {"a": {"slots": 2}, "b": {}}}, "a", True),
    ],
    ids=["own", "richer", "poorer", "other_at_quota", "own_at_quota"],
)
def test_preemption_takes_no_fair_share_away(
    open_shop: Open, settings: dict[str, Any], tenant: str, stops: bool
) -> None:
    """Two jobs of tenant a hold two slots: one of its own may stop one, or one of a tenant that has less."""
    service = open_shop(**settings)
    held = [service.submit(demand=Demand(tenant="a", cores=2), **LONG) for _ in range(2)]
    while service.store.begin_attempt("here") is not None:
        pass
    urgent = service.submit(Scheduling(priority=9), Demand(tenant=tenant, cores=2), **LONG)
    service.look()
    assert stops == service.store.get(urgent.name).claims
    assert int(stops) == len(service.asked() & {job.name for job in held})
