"""A small real run for the simulator of capacities: jobs of toy workers that come at random moments.

What a job holds its slot for beyond its steps is measured first, on jobs of their own. The simulation then gets the
moments of arrival and the numbers of steps, and nothing of what was measured in the run. On a machine with other work
workers start more slowly at one time than at another; so the waits are also worked out from the times that jobs held
their slots in the run itself.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.support.toy_service import ToyService, ended
from tools.capacity_queue import between_of, follow
from training_common.jobs.scheduler import TICK_S
from training_common.jobs.states import JobState
from training_common.retention import LEAST_KEPT
from training_common.store import tables as t

SLOTS = 2
STEP_S = 0.1
MEAN_STEPS = 80
CHECKPOINT_EVERY = 10
ALONE = 4
JOBS = 30
# Of the slots' time, so that jobs wait, and a run of minutes still comes near its mean.
OFFERED = 0.75
# A toy job's events beside progress and checkpoints: QUEUED, PREPARING, its attempt, RUNNING, VALIDATING, its result,
# SUCCEEDED.
EVENTS = 7


@dataclass(frozen=True, kw_only=True)
class Lived:
    """A job's moments in seconds since the run began, and its steps."""

    came_s: float
    began_s: float
    ended_s: float
    steps: int


async def run(service: ToyService, jobs: Sequence[tuple[float, int]]) -> list[Lived]:
    """Submit jobs at these moments with so many steps, and return how they lived."""
    start_us = time.time_ns() // 1000
    rows = []
    async with asyncio.TaskGroup() as group:
        scheduler = group.create_task(service.scheduler.run())
        started = time.monotonic()
        for moment_s, steps in jobs:
            await asyncio.sleep(max(0.0, started + moment_s - time.monotonic()))
            rows.append(service.submit(steps=steps, step_s=STEP_S, checkpoint_every=CHECKPOINT_EVERY))
            service.scheduler.wake()
        while not all(ended(service.store.get(row.name)) for row in rows):  # noqa: ASYNC110
            await asyncio.sleep(0.2)  # workers end in processes of their own
        scheduler.cancel()
    lived = []
    for row, (_, steps) in zip(rows, jobs, strict=True):
        job, attempt = service.store.get(row.name), service.store.attempt_row(row.id, 1)
        if job.state is not JobState.SUCCEEDED or attempt is None or job.attempt != 1 or job.end_us is None:
            raise AssertionError(f"{job.name} is {job.state} after {job.attempt} attempts")
        moments = [(moment - start_us) / 1e6 for moment in (job.create_us, attempt.start_us, job.end_us)]
        lived.append(Lived(came_s=moments[0], began_s=moments[1], ended_s=moments[2], steps=steps))
    return lived


def beyond_steps_s(lived: Sequence[Lived]) -> float:
    """Return the seconds that jobs held their slots beyond their steps, mean."""
    return statistics.mean(one.ended_s - one.began_s - STEP_S * one.steps for one in lived)


def rows_of(steps: Sequence[int]) -> dict[str, int]:
    """Return how many rows jobs of so many steps are to leave."""
    saved = [number // CHECKPOINT_EVERY for number in steps]
    retired = [max(0, number - LEAST_KEPT) for number in saved]  # each with a note of its own
    return {
        "jobs": len(steps),
        "attempts": len(steps),
        "checkpoints": sum(saved),
        "events": EVENTS * len(steps) + sum(steps) + sum(saved) + sum(retired),
    }


def compare(folder: Path) -> dict[str, Any]:
    """Let jobs come, and return waits, throughput and rows beside what was foretold."""
    folder.mkdir()
    chance = random.Random(1)  # noqa: S311 - of arrivals
    alone_folder = folder / "alone"
    alone_folder.mkdir()
    alone = ToyService(alone_folder, slots=SLOTS, heartbeat_interval_s=1.0)
    beyond_s = beyond_steps_s(asyncio.run(run(alone, [(0.0, MEAN_STEPS)] * ALONE)))
    alone.database.close()
    holds_s = beyond_s + STEP_S * MEAN_STEPS
    moment_s, jobs = 0.0, []
    for _ in range(JOBS):
        moment_s += chance.expovariate(OFFERED * SLOTS / holds_s)
        jobs.append((moment_s, max(1, round(chance.expovariate(1 / MEAN_STEPS)))))
    between_s = between_of([moment for moment, _ in jobs])
    held_s = [beyond_s + STEP_S * steps for _, steps in jobs]
    foretold = waits_of(between_s, held_s)
    run_folder = folder / "run"
    run_folder.mkdir()
    service = ToyService(run_folder, slots=SLOTS, heartbeat_interval_s=1.0)
    lived = asyncio.run(run(service, jobs))
    with service.database.read() as connection:
        tables = {"jobs": t.jobs, "attempts": t.attempts, "checkpoints": t.checkpoints, "events": t.events}
        rows = {
            name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in tables.items()
        }
    service.database.close()
    whole_s = max(one.ended_s for one in lived)
    held_there_s = [one.ended_s - one.began_s for one in lived]
    ends_s = [jobs[n][0] + wait_s + held_s[n] for n, wait_s in enumerate(foretold)]
    return {
        "jobs": JOBS,
        "measured_wait_s": round(statistics.mean(one.began_s - one.came_s for one in lived), 2),
        "foretold_wait_s": round(statistics.mean(foretold), 2),
        "wait_by_held_times_s": round(statistics.mean(waits_of(between_s, held_there_s)), 2),
        "measured_jobs_per_s": round(JOBS / whole_s, 3),
        "foretold_jobs_per_s": round(JOBS / max(ends_s), 3),
        "beyond_steps_s": round(beyond_s, 2),
        "beyond_steps_in_the_run_s": round(beyond_steps_s(lived), 2),
        "rows": rows,
        "foretold_rows": rows_of([steps for _, steps in jobs]),
    }


def waits_of(between_s: Sequence[float], held_s: Sequence[float]) -> Sequence[float]:
    """Return the waits of jobs by the simulation. A slot that is let go is given away at the next look."""
    return follow([(one, held + TICK_S / 2) for one, held in zip(between_s, held_s, strict=True)], slots=SLOTS).waits_s
