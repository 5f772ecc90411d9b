"""Why jobs have no worker yet, out of their rows and of what the scheduler saw when it last looked."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa

from training_common.devices import DEVICE
from training_common.jobs.queue import latest_pause_us, positions
from training_common.jobs.states import WAITING
from training_common.jobs.store import JobRow
from training_common.store import tables as t
from training_common.store.database import now_us


class WaitReason(enum.StrEnum):
    """Why there is no worker. The names are those of cognateforge.job.v1.WaitReason."""

    SLOT = "SLOT"
    TURN = "TURN"
    PEER = "PEER"
    PAUSE = "PAUSE"
    LENT = "LENT"
    LAUNCH = "LAUNCH"
    QUOTA = "QUOTA"
    RESERVED = "RESERVED"
    DEVICE = "DEVICE"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the scheduler of this server saw when it last looked.

    taken: of its slots. lent: what stands in the way of a free slot, in words, or nothing. launch_again_s: seconds
    until it tries to start workers again after it could not; None where it can. beyond: why nobody else has a place.
    """

    slots: int
    taken: int = 0
    lent: str = ""
    launch_again_s: float | None = None
    beyond: str = ""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Why a job has no worker. position: in the queue, from 1; 0 before not_before_us."""

    reason: WaitReason
    message: str
    position: int = 0
    not_before_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeldBack:
    """What keeps a job from any place that is free, in words."""

    reason: WaitReason
    message: str


class Bounds(Protocol):
    """Tells what keeps jobs from free places."""

    def held_back(self, connection: sa.Connection, jobs: Sequence[JobRow]) -> Mapping[int, HeldBack]:
        """Return it for those of the waiting jobs that are kept from free places, by their ids."""


def waits(
    connection: sa.Connection, jobs: Sequence[JobRow], standing: Standing, bounds: Bounds | None = None
) -> dict[int, Wait]:
    """Return why those of the jobs that wait do so, by their ids."""
    waiting = [job for job in jobs if job.state in WAITING]
    if not waiting:
        return {}
    places, now = positions(connection, [job.id for job in waiting]), now_us()
    kept = bounds.held_back(connection, waiting) if bounds is not None else {}
    found = {job.id: _in_queue(job, places[job.id], standing, kept.get(job.id)) for job in waiting if job.id in places}
    for job in waiting:
        # One that became due since is in the queue, and is told so by the next answer.
        if job.id not in places and now < job.not_before_us <= latest_pause_us(now):
            found[job.id] = _paused(job)
    return found


def paused_for(connection: sa.Connection) -> dict[WaitReason, int]:
    """Return how many jobs are not to be tried before a moment that is to come, by what they wait for until then."""
    now, j = now_us(), t.jobs.c
    killed = j.kills_without_progress > 0
    query = (
        sa.select(j.waits_for, killed, sa.func.count())
        .where(j.queue_us.is_not(None), j.not_before_us > now, j.not_before_us <= latest_pause_us(now))
        .group_by(j.waits_for, killed)
    )
    found: dict[WaitReason, int] = {}
    for what, was_killed, count in connection.execute(query):
        reason = _pause_reason(what, was_killed)
        found[reason] = found.get(reason, 0) + count
    return found


def _pause_reason(waits_for: str, killed: bool) -> WaitReason:
    if waits_for == DEVICE:
        return WaitReason.DEVICE
    # An earlier release has not kept whom a job waits for.
    return WaitReason.PEER if waits_for or not killed else WaitReason.PAUSE


def _in_queue(job: JobRow, place: int, standing: Standing, kept: HeldBack | None) -> Wait:
    if kept is not None:
        return Wait(reason=kept.reason, message=kept.message, position=place)
    # Those before it want a slot each at least.
    if place - 1 + job.slots > standing.slots - standing.taken:
        return Wait(reason=WaitReason.SLOT, message=_slots(place, standing), position=place)
    if standing.launch_again_s is not None:
        message = f"workers cannot be started on this server; it tries again in {standing.launch_again_s:.0f} s"
        return Wait(reason=WaitReason.LAUNCH, message=message, position=place)
    if standing.lent:
        return Wait(reason=WaitReason.LENT, message=standing.lent, position=place)
    return Wait(reason=WaitReason.TURN, message="a slot is free, and is given when the scheduler looks", position=place)


def _slots(place: int, standing: Standing) -> str:
    if not standing.slots:
        return "this server has no slots (workers.slots): it only takes jobs in"
    message = f"place {place} in the queue; {standing.taken} of {standing.slots} slots of this server are taken"
    return f"{message}; {standing.beyond}" if standing.beyond else message


def _paused(job: JobRow) -> Wait:
    reason = _pause_reason(job.waits_for, job.kills_without_progress > 0)
    match reason:
        case WaitReason.DEVICE:
            message = f"the devices of its worker's host are in use: tried {job.waits} times"
        case WaitReason.PEER:
            message = f"{job.waits_for or 'what it needs'} is away: tried {job.waits} times"
        case _:
            message = f"its workers were ended from outside {job.kills_without_progress} times without a new checkpoint"
    return Wait(reason=reason, message=message, not_before_us=job.not_before_us)
