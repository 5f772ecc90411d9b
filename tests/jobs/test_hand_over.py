"""Servers that hand their jobs over when they are stopped: real workers, and another server that goes on at once."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import running_cognate
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow

LONG: dict[str, Any] = {"steps": 80, "step_s": 0.02, "checkpoint_every": 1000}


def running(row: JobRow) -> bool:
    return row.state is JobState.RUNNING and row.step > 0


@pytest.fixture
def pair(store_url: str, tmp_path: Path) -> Callable[..., list[ToyService]]:
    """Return a maker of two servers that share a store and a folder."""

    def make(**workers: Any) -> list[ToyService]:
        made = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            made.append(
                ToyService(tmp_path / name, store_url=store_url, server=name, shared_dir=tmp_path / "shared", **workers)
            )
        return made

    return make


async def hand_over(service: ToyService) -> float:
    """Let a server hand over, as its drain does, and return how many seconds that took."""
    clock = asyncio.get_running_loop().time
    looking, began = asyncio.create_task(service.scheduler.run()), clock()
    await service.scheduler.hand_over()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    service.database.close()
    return clock() - began


async def test_another_server_goes_on_at_once_from_where_the_job_was(pair: Callable[..., list[ToyService]]) -> None:
    """The worker saves and ends; no step is lost or done twice, no retry is counted, and it takes no silence."""
    one, two = pair()
    job = one.submit(**LONG)
    await one.until(job, running)
    waiting = one.submit(steps=2)
    assert await hand_over(one) < 30
    handed = two.store.get(job.name)
    assert (JobState.RECOVERING, JobState.QUEUED) == (handed.state, two.store.get(waiting.name).state)
    job = await two.until(job, ended)
    assert (JobState.SUCCEEDED, 2, 0, 0) == (
        job.state,
        job.attempt,
        job.retries_without_progress,
        job.kills_without_progress,
    )
    events = two.events(job)
    assert [event.payload["step"] for event in events if event.kind == "progress"] == list(range(1, 81))
    assert [expected_result(80)] == two.result(job)
    assert ["handed_over"] == [e.payload["kind"] for e in events if e.payload.get("kind") == "handed_over"]
    assert JobState.SUCCEEDED is (await two.until(waiting, ended)).state
    two.database.close()


async def test_a_worker_that_does_not_let_go_is_ended_after_the_grace(pair: Callable[..., list[ToyService]]) -> None:
    """Its job goes on elsewhere from its last checkpoint, and no retry is counted."""
    one, two = pair(hand_over_grace_s=0.5)
    job = one.submit(**{**LONG, "checkpoint_every": 5, "steps": 30}, keeps_going=True)
    await one.until(job, lambda row: running(row) and row.step >= 6)
    await hand_over(one)
    assert JobState.RECOVERING is two.store.get(job.name).state
    job = await two.until(job, ended)
    assert (JobState.SUCCEEDED, 0, 0) == (job.state, job.retries_without_progress, job.kills_without_progress)
    assert [expected_result(30)] == two.result(job)
    two.database.close()


async def test_what_an_owner_asked_for_meanwhile_holds(pair: Callable[..., list[ToyService]]) -> None:
    """A job that is being paused becomes PAUSED, and no other server starts it."""
    one, two = pair()
    job = one.submit(**LONG)
    await one.until(job, running)
    one.steer("pause", job)
    await hand_over(one)
    assert JobState.PAUSED is two.store.get(job.name).state
    two.database.close()


async def test_a_server_without_workers_hands_over_in_no_time(pair: Callable[..., list[ToyService]]) -> None:
    """And starts nothing any more."""
    one, two = pair()
    assert await hand_over(one) < 5
    one, job = two, two.submit(steps=1)
    two.scheduler._leaving_s = 0.0
    two.scheduler.tick()
    assert JobState.QUEUED is one.store.get(job.name).state
    two.database.close()


@pytest.mark.usefixtures("no_drain_notice")
@pytest.mark.parametrize("on_drain", ["keep", "hand_over"])
async def test_a_drain_hands_over_where_the_settings_say_so(
    on_drain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves workers alone otherwise."""
    handed: list[Scheduler] = []

    async def hand_over(scheduler: Scheduler) -> None:
        handed.append(scheduler)

    monkeypatch.setattr(Scheduler, "hand_over", hand_over)
    async with running_cognate(tmp_path, workers={"on_drain": on_drain}):
        pass
    assert (on_drain == "hand_over") == (len(handed) == 1)
