"""What both services tell of their scheduler, their jobs and their artifacts."""

from __future__ import annotations

from collections.abc import Iterator

from training_common.artifacts.scrub import Scrubber
from training_common.jobs.scheduler import Scheduler
from training_common.store.database import now_us
from training_common.telemetry.readings import Reading


def of_scheduler(scheduler: Scheduler) -> Iterator[Reading]:
    """Yield how many workers this server has and may have."""
    yield Reading("forge_worker_slots", scheduler.standing.slots)
    yield Reading("forge_worker_slots_used", scheduler.standing.taken)
    if scheduler.tick_age_s is not None:
        yield Reading("forge_scheduler_tick_age_seconds", scheduler.tick_age_s)


def of_artifacts(scrubber: Scrubber) -> Iterator[Reading]:
    """Yield how stored versions were when they were last looked at."""
    yield Reading("forge_artifacts_damaged", scrubber.damaged)
    if scrubber.oldest_look_us is not None:
        yield Reading("forge_artifacts_unverified_seconds", max(0, now_us() - scrubber.oldest_look_us) / 1e6)
