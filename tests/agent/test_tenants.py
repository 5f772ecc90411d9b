"""How tenants share the agent service's capacity: fairness, quotas, and what waiting jobs are told, on both stores."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import agent_server.migrations
from agent_server.resources import AgentResourceManager, Amounts
from agent_server.settings import AgentSettings
from cognateforge.exceptions import QuotaTooSmallError
from training_common.jobs import queue
from training_common.jobs.queue import Demand, Scheduling
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, JobStore, move
from training_common.jobs.waits import Standing, WaitReason, waits
from training_common.store.database import Database

HOST = Amounts(cores=9, memory_bytes=18)


class Shop:
    """A store with tenants, and workers that are only rows."""

    def __init__(self, url: str, capacity: Amounts = HOST, **settings: Any) -> None:
        self.url = url
        self.database = Database(url)
        self.database.upgrade(Path(agent_server.migrations.__file__).parent)
        self.settings = AgentSettings.model_validate(settings)
        self.manager = AgentResourceManager(self.database, self.settings, capacity)
        self.store = JobStore(self.database, self.manager)

    def submit(self, demand: Demand = queue.NOBODYS, **scheduling: Any) -> JobRow:
        with self.database.write() as connection:
            return self.store.submit(
                connection,
                plan=b"",
                total_steps=1,
                caller="test",
                scheduling=Scheduling(**scheduling),
                demand=demand,
            )

    def take(self) -> JobRow | None:
        return self.store.begin_attempt("here")

    def taken(self, most: int = 1000) -> list[str]:
        names: list[str] = []
        while len(names) < most and (job := self.take()) is not None:
            names.append(job.name)
        return names

    def end(self, job: JobRow) -> None:
        with self.database.write() as connection:
            row = move(connection, self.store.get(job.name, connection), JobState.RUNNING)
            row = move(connection, row, JobState.VALIDATING)
            move(connection, row, JobState.SUCCEEDED)

    def held(self) -> dict[str, Amounts]:
        with self.database.read() as connection:
            return self.manager.held(connection)


@pytest.fixture
def open_shop(store_url: str) -> Iterator[Callable[..., Shop]]:
    shops: list[Shop] = []

    def open_one(**options: Any) -> Shop:
        shops.append(Shop(store_url, **options))
        return shops[-1]

    yield open_one
    for shop in shops:
        shop.database.close()


def test_the_example_of_the_paper(open_shop: Callable[..., Shop]) -> None:
    """9 cores, 18 GB; jobs of <1, 4> and of <3, 1>: three of the first tenant's run, and two of the second's."""
    shop = open_shop(tenants={"a": {}, "b": {}})
    for demand in (Demand(tenant="b", cores=3, memory_bytes=1), Demand(tenant="a", cores=1, memory_bytes=4)):
        for _ in range(6):
            shop.submit(demand)
    shop.taken(5)
    expected = {"a": Amounts(slots=3, cores=3, memory_bytes=12), "b": Amounts(slots=2, cores=6, memory_bytes=2)}
    assert expected == shop.held()


def test_within_a_tenant_priority_and_age_decide(open_shop: Callable[..., Shop]) -> None:
    """As without tenants: also what one tenant of several sees of its own jobs."""
    shop = open_shop(tenants={"a": {}, "b": {}})
    jobs = [shop.submit(Demand(tenant="a", cores=1), priority=priority) for priority in (0, -5, 7, 0, 7)]
    others = [shop.submit(Demand(tenant="b", cores=1)) for _ in range(5)]
    order = shop.taken()
    assert [jobs[index].name for index in (2, 4, 0, 3, 1)] == [name for name in order if name in {j.name for j in jobs}]
    assert [job.name for job in others] == [name for name in order if name in {j.name for j in others}]


def test_without_tenants_the_queue_is_one(open_shop: Callable[..., Shop]) -> None:
    """Whoever calls, and whatever the jobs take."""
    shop = open_shop()
    demands = [shop.manager.demand(f"spiffe://forge.test/{index % 2}", index) for index in range(6)]
    assert {"default"} == {demand.tenant for demand in demands}
    jobs = [shop.submit(demand) for demand in demands]
    assert [job.name for job in jobs] == shop.taken()


def test_among_equal_shares_the_queue_decides(open_shop: Callable[..., Shop]) -> None:
    """When nothing runs, the job that matters most is the first, whosever it is."""
    shop = open_shop(tenants={"a": {}, "b": {}})
    shop.submit(Demand(tenant="a", cores=1))
    urgent = shop.submit(Demand(tenant="b", cores=1), priority=50)
    assert [urgent.name] == shop.taken(1)


@pytest.mark.parametrize("seed", range(3))
def test_shares_converge_whatever_the_demands(open_shop: Callable[..., Shop], seed: int) -> None:
    """While all have jobs that wait, dominant shares over weights differ by no more than one job's share.

    Slots become free at random and are filled again; the shares stay together.
    """

    def shares() -> dict[str, float]:
        held = shop.held()
        return {n: max(held[n].cores / 100, held[n].memory_bytes / 1000) / weights[n] for n in names if n in held}

    draw = random.Random(seed)  # noqa: S311 - no secret
    names = ["a", "b", "c"]
    weights = {name: draw.choice([1.0, 2.0, 4.0]) for name in names}
    shop = open_shop(
        tenants={name: {"weight": weights[name]} for name in names}, capacity=Amounts(cores=100, memory_bytes=1000)
    )
    demands = {name: Demand(tenant=name, cores=draw.randint(1, 4), memory_bytes=draw.randint(1, 40)) for name in names}
    most = max(max(d.cores / 100, d.memory_bytes / 1000) / weights[d.tenant] for d in demands.values())
    jobs = [shop.submit(demands[name]) for name in names for _ in range(25)]
    running = set(shop.taken(24))
    for _ in range(8):
        now = shares()
        assert set(names) == set(now)
        assert max(now.values()) - min(now.values()) <= most + 1e-9, (now, demands, weights)
        # The tenant that has most gives way, as it does when jobs end everywhere and others are started.
        richest = max(now, key=lambda name: now[name])
        ended = next(job for job in jobs if job.tenant == richest and job.name in running)
        shop.end(ended)
        running.remove(ended.name)
        running.update(shop.taken(1))


def test_a_job_of_several_processes_is_not_overtaken_by_other_tenants(open_shop: Callable[..., Shop]) -> None:
    """Once its turn has come it is the next, however many small jobs another tenant has, whose share is less."""
    shop = open_shop(tenants={"a": {}, "b": {}})
    long = shop.submit(Demand(tenant="a", cores=2))
    first = shop.submit(Demand(tenant="b", cores=1))
    assert [long.name, first.name] == shop.taken(2)
    large = shop.submit(Demand(tenant="a", processes=3, cores=3))
    assert shop.store.begin_attempt("here", free=2) is None
    shop.submit(Demand(tenant="b", cores=1))
    shop.end(first)
    taken = shop.store.begin_attempt("here", free=3)
    assert taken is not None
    assert large.name == taken.name


def test_no_tenant_starves(open_shop: Callable[..., Shop]) -> None:
    """One with a tiny weight, and jobs that take everything, still has its turn among tenants that never stop."""
    shop = open_shop(tenants={"big": {"weight": 100.0}, "small": {"weight": 0.5}, "steady": {}})
    for _ in range(12):
        shop.submit(Demand(tenant="big", cores=1, memory_bytes=1), priority=100)
        shop.submit(Demand(tenant="steady", cores=1, memory_bytes=1))
    small = shop.submit(Demand(tenant="small", cores=9, memory_bytes=18), priority=-100)
    started: list[str] = []
    running: list[JobRow] = []
    while small.name not in started:
        if len(running) == 3:
            shop.end(running.pop(0))
        job = shop.take()
        assert job is not None
        running.append(job)
        started.append(job.name)
    assert len(started) <= 3


@pytest.mark.parametrize(
    ("quota", "runs"), [({"slots": 2}, 2), ({"cores": 5}, 2), ({"memory_bytes": 9}, 3), ({"slots": 0}, 0)]
)
def test_no_tenant_passes_a_quota(open_shop: Callable[..., Shop], quota: dict[str, int], runs: int) -> None:
    """However much is free; others go on, and the tenant too when one of its jobs has ended."""
    shop = open_shop(tenants={"a": quota, "b": {}})
    mine = [shop.submit(Demand(tenant="a", cores=2, memory_bytes=3)) for _ in range(5)]
    others = [shop.submit(Demand(tenant="b", cores=2, memory_bytes=3)) for _ in range(2)]
    taken = set(shop.taken())
    assert {*[job.name for job in mine[:runs]], *[job.name for job in others]} == taken
    if runs:
        shop.end(mine[0])
        assert [mine[runs].name] == shop.taken()


def test_a_job_at_its_quota_is_told_so(open_shop: Callable[..., Shop]) -> None:
    """By its own reason, with the amounts, however many slots are free; others are told of slots."""
    shop = open_shop(tenants={"a": {"slots": 1, "memory_bytes": 10}, "b": {}})
    jobs = [shop.submit(Demand(tenant=name, cores=1, memory_bytes=6)) for name in "aaab"]
    shop.taken(1)
    with shop.database.read() as connection:
        found = waits(connection, [shop.store.get(job.name) for job in jobs], Standing(slots=4), shop.manager)
    assert [WaitReason.QUOTA, WaitReason.QUOTA, WaitReason.TURN] == [found[job.id].reason for job in jobs[1:]]
    assert [1, 2, 1] == [found[job.id].position for job in jobs[1:]]
    assert "it takes 1 of slots, and tenant a holds 1 of its quota of 1" == found[jobs[1].id].message


def test_a_job_that_no_quota_ever_allows_is_refused(open_shop: Callable[..., Shop]) -> None:
    """Before it is stored, with the amounts and what to do."""
    shop = open_shop(
        tenants={"a": {"callers": ["me"], "memory_bytes": 10}}, default_tenant="rest", workers={"threads": 3}
    )
    assert Demand(tenant="a", cores=3, memory_bytes=10) == shop.manager.demand("me", 10)
    assert Demand(tenant="rest", cores=3, memory_bytes=11) == shop.manager.demand("you", 11)
    with pytest.raises(QuotaTooSmallError, match="it takes 11 bytes of memory, and tenant a holds 0 of"):
        shop.manager.demand("me", 11)


def test_jobs_of_a_tenant_that_is_gone_are_the_default_ones(open_shop: Callable[..., Shop], store_url: str) -> None:
    """They keep running and waiting; the default tenant's quota counts them."""
    shop = open_shop(tenants={"a": {}, "b": {}})
    jobs = [shop.submit(Demand(tenant=name, cores=1)) for name in ("a", "b", "b", "a")]
    shop.taken(1)
    later = open_shop(tenants={"b": {}, "default": {"slots": 2}})
    taken = later.taken()
    assert {job.name for job in jobs[1:]} == set(taken)
    assert {"default": 2, "b": 2} == {name: amounts.slots for name, amounts in later.held().items()}


def test_a_quota_holds_over_several_servers(open_shop: Callable[..., Shop]) -> None:
    """Four servers that look at the same moment take every job once, and no tenant more than its quota."""
    shop = open_shop(tenants={"a": {"slots": 3}, "b": {"slots": 2}, "c": {}})
    for _ in range(8):
        for name in "abc":
            shop.submit(Demand(tenant=name, cores=1, memory_bytes=1))
    others = [open_shop(tenants={"a": {"slots": 3}, "b": {"slots": 2}, "c": {}}) for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        taken = [name for names in threads.map(lambda one: one.taken(), [shop, *others]) for name in names]
    assert len(taken) == len(set(taken))
    assert Counter(a=3, b=2, c=8) == Counter({name: amounts.slots for name, amounts in shop.held().items()})


def test_a_caller_has_one_tenant() -> None:
    """Two that name the same caller are refused, and so is a name that could not be stored."""
    with pytest.raises(ValidationError, match="me is a caller of a and of b: name it in one of them"):
        AgentSettings.model_validate({"tenants": {"a": {"callers": ["me"]}, "b": {"callers": ["me"]}}})
    with pytest.raises(ValidationError, match=r"tenants\.A B: a tenant's name is lower-case letters"):
        AgentSettings.model_validate({"tenants": {"A B": {}}})
