"""Ten tenants' jobs at once on one machine, with real workers: nobody starves, quotas hold, a crash is one's own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import agent_server.migrations
from agent_server.resources import AgentResourceManager, Amounts
from agent_server.settings import AgentSettings
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.jobs.queue import Demand
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow, JobStore

pytestmark = pytest.mark.slow
TENANTS = tuple(f"tenant-{number}" for number in range(10))
# The greedy one hands in far more than all others, and first; it may hold one slot of the four.
GREEDY, KILLED, BROKEN = TENANTS[0], TENANTS[3], TENANTS[7]
QUOTA, SLOTS, STEPS = 1, 4, 20


class Shared(ToyService):
    """The agent service's way of sharing, over toy workers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, slots=SLOTS)
        self.database.upgrade(Path(agent_server.migrations.__file__).parent)
        tenants = {name: {"callers": [name]} for name in TENANTS} | {GREEDY: {"callers": [GREEDY], "slots": QUOTA}}
        settings = AgentSettings.model_validate({"tenants": tenants})
        self.manager = AgentResourceManager(self.database, settings, Amounts(cores=8, memory_bytes=1 << 40))
        self.store = JobStore(self.database, self.manager)
        self.scheduler = Scheduler(
            self.store, self.engine, self.settings.workers, settings_file=self.settings_file, server=self.server
        )

    def hand_in(self, tenant: str, **wrong: Any) -> JobRow:
        return self.submit(demand=Demand(tenant=tenant, cores=1), steps=STEPS, step_s=0.02, **wrong)

    def running(self) -> Counter[str]:
        """Return how many jobs of each tenant hold a slot."""
        return Counter(job.tenant for job, _ in self.store.held())


async def test_ten_tenants_share_one_machine(tmp_path: Path) -> None:
    """Everyone's jobs end; the greedy tenant stays within its quota, and a killed worker costs one job time."""
    service = Shared(tmp_path)
    jobs = {GREEDY: [service.hand_in(GREEDY) for _ in range(8)]}
    for tenant in TENANTS[1:]:
        jobs[tenant] = [service.hand_in(tenant, **({"raise_at": 5} if tenant == BROKEN else {})) for _ in range(2)]
    most: Counter[str] = Counter()
    order: list[str] = []
    killed = ""
    async with asyncio.timeout(120):
        while True:
            service.scheduler.tick()
            for tenant, count in service.running().items():
                most[tenant] = max(most[tenant], count)
            now = {job.name: service.store.get(job.name) for rows in jobs.values() for job in rows}
            order += [name for name, job in now.items() if ended(job) and name not in order]
            victim = now[jobs[KILLED][0].name]
            if not killed and victim.state is JobState.RUNNING and victim.step > 0:
                killed = service.handle(victim)
                os.kill(int(killed.partition(":")[0]), signal.SIGKILL)
            if len(order) == len(now):
                break
            await asyncio.sleep(0.02)
    states = {tenant: [now[job.name].state for job in rows] for tenant, rows in jobs.items()}
    assert states[BROKEN] == [JobState.FAILED] * 2
    assert all(set(found) == {JobState.SUCCEEDED} for tenant, found in states.items() if tenant != BROKEN)
    # Whoever shared the machine with a crash has computed what it would have computed alone, in one attempt.
    others = [job for tenant, rows in jobs.items() for job in rows if tenant != BROKEN]
    assert all(service.result(job) == [expected_result(STEPS)] for job in others)
    again = [job.name for job in others if now[job.name].attempt > 1]
    assert again == [jobs[KILLED][0].name]
    assert most[GREEDY] == QUOTA
    # Nobody waits for the greedy tenant's long queue: all others have ended before its last jobs.
    places = {name: place for place, name in enumerate(order)}
    last = max(places[job.name] for tenant in TENANTS[1:] for job in jobs[tenant])
    assert last < max(places[job.name] for job in jobs[GREEDY])
    service.database.close()
