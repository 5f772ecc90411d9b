"""The life of a job: its states and the moves between them.

    QUEUED -> PREPARING -> RUNNING -> VALIDATING -> SUCCEEDED
                 |            |            |
                 +------------+------------+--> RECOVERING -> PREPARING     the worker was lost
                 +------------+------------+--> FAILED
                 +------------+---> PAUSING -> PAUSED -> QUEUED
                 +------------+------------+--> CANCELLING -> CANCELLED
    QUEUED, PAUSED, RECOVERING -> FAILED                                    a deadline of the job has passed
                 +--> QUEUED                                                what it needs is away: another job's turn

Losing sight of a worker is no state: see the `observed` column.
"""

from __future__ import annotations

import enum


class JobState(enum.StrEnum):
    """Where a job stands. The names are those of cognateforge.job.v1.JobState."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    VALIDATING = "VALIDATING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    PAUSED = "PAUSED"
    PAUSING = "PAUSING"
    CANCELLING = "CANCELLING"
    RECOVERING = "RECOVERING"


S = JobState

MOVES: dict[JobState, frozenset[JobState]] = {
    S.QUEUED: frozenset({S.PREPARING, S.FAILED, S.PAUSED, S.CANCELLED}),
    S.PREPARING: frozenset({S.RUNNING, S.RECOVERING, S.FAILED, S.PAUSING, S.CANCELLING}),
    S.RUNNING: frozenset({S.VALIDATING, S.RECOVERING, S.FAILED, S.PAUSING, S.CANCELLING}),
    S.VALIDATING: frozenset({S.SUCCEEDED, S.RECOVERING, S.FAILED, S.CANCELLING}),
    S.RECOVERING: frozenset({S.PREPARING, S.FAILED, S.PAUSED, S.CANCELLED}),
    S.PAUSING: frozenset({S.PAUSED, S.FAILED, S.CANCELLING}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.PAUSED: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}

FINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
# A worker process holds the job, or is being started for it.
HELD = frozenset({S.PREPARING, S.RUNNING, S.VALIDATING, S.PAUSING, S.CANCELLING})
# From here a worker may give its job back to the queue. It is no move of MOVES: no owner's request leads there.
MAY_WAIT = frozenset({S.PREPARING})
# Waiting for a worker.
WAITING = frozenset({S.QUEUED, S.RECOVERING})
