"""How fast attempts were, by their own reports of progress."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import sqlalchemy as sa
from google.protobuf.message import Message

from training_common.attempt import Json
from training_common.release import release_of
from training_common.store import tables as t

# Attempts that a median is taken of, and the jobs among which they are looked for.
NEWEST = 20
_NEWEST_JOBS = 200


def configuration_of(plan: Message, settings: Mapping[str, Json], *, service: str) -> str:
    """Return a digest of what decides how long a step takes: a plan without what does not, settings, the release."""
    facts = json.dumps({**settings, "version": release_of(service)}, sort_keys=True).encode()
    return hashlib.sha256(plan.SerializeToString(deterministic=True) + facts).hexdigest()


def measured_steps_per_s(connection: sa.Connection, job_id: int, attempt: int) -> float | None:
    """Return the steps a second between an attempt's first and last report; None where there are no two steps apart.

    What training waits for in between, as checkpoints and validations, is part of the time.
    """
    reports = sa.select(t.events.c.time_us, t.events.c.payload).filter_by(
        job_id=job_id, kind="progress", attempt=attempt
    )
    first = connection.execute(reports.order_by(t.events.c.sequence).limit(1)).first()
    last = connection.execute(reports.order_by(t.events.c.sequence.desc()).limit(1)).first()
    if first is None or last is None:
        return None
    steps, seconds = last.payload["step"] - first.payload["step"], (last.time_us - first.time_us) / 1e6
    return steps / seconds if steps > 0 and seconds > 0 else None


def speeds(connection: sa.Connection, *, configuration: str, server: str) -> list[float]:
    """Return the steps a second of the newest attempts of a configuration on a server that were measured."""
    jobs = sa.select(t.jobs.c.id).filter_by(configuration=configuration).order_by(t.jobs.c.id.desc())
    newest = jobs.limit(_NEWEST_JOBS).subquery()
    query = (
        sa.select(t.attempts.c.steps_per_s)
        .join(newest, newest.c.id == t.attempts.c.job_id)
        .where(t.attempts.c.server == server, t.attempts.c.steps_per_s.is_not(None))
        .order_by(newest.c.id.desc())
        .limit(NEWEST)
    )
    return list(connection.execute(query).scalars())
