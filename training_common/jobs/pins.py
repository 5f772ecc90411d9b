"""Pins: checkpoints whose files nothing removes until they are unpinned."""

from __future__ import annotations

import sqlalchemy as sa

from cognateforge.exceptions import CheckpointGoneError, CheckpointNotFoundError
from training_common.jobs.store import CheckpointRow
from training_common.store import tables as t


def set_pinned(connection: sa.Connection, job_id: int, *, step: int, digest: str, pinned: bool) -> CheckpointRow:
    """Pin or unpin a job's checkpoint in the caller's transaction, and return it.

    digest: which one of that step; "" means the newest whose files are there.
    Errors: CheckpointNotFoundError; CheckpointGoneError, when one without files is to be pinned.
    """
    query = sa.select(t.checkpoints).filter_by(job_id=job_id, step=step)
    if digest:
        query = query.filter_by(digest=digest)
    query = query.order_by(t.checkpoints.c.available.desc(), t.checkpoints.c.id.desc()).limit(1)
    found = connection.execute(query.with_for_update()).mappings().first()
    if found is None:
        with_digest = f" with digest {digest}" if digest else ""
        raise CheckpointNotFoundError(f"the job has no checkpoint of step {step}{with_digest}; list them to see which")
    if pinned and not found["available"]:
        raise CheckpointGoneError(f"the files of the checkpoint of step {step} are gone; pin one that is available")
    connection.execute(sa.update(t.checkpoints).filter_by(id=found["id"]).values(pinned=pinned))
    return CheckpointRow(**{**found, "pinned": pinned})
