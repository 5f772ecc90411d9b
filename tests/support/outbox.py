"""Published models and job events as rows, without files or a worker: for tests about how they are watched."""

from __future__ import annotations

import json
from pathlib import Path

import sqlalchemy as sa

from training_common.digests import sha256_bytes
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database, now_us

DIGEST = f"sha256:{'a' * 64}"


def manifest(*, detail: str = "") -> bytes:
    """Return a manifest that a model can be told from. detail: makes it, and each frame with it, longer."""
    check = {"name": "loss_is_finite", "passed": True, "detail": detail}
    body = {
        "architecture": {
            "name": "cognate_v1",
            "fingerprint": DIGEST,
            "parameter_count": 24_998_668,
            "act_version": 1,
            "ltm_version": 1,
        },
        "tokenizer_digest": DIGEST,
        "files": [{"path": "model.safetensors", "size_bytes": 1, "digest": DIGEST}],
        "data": [],
        "checks": [check] * (8 if detail else 1),
        "training": {"steps": 1, "tokens": 512},
    }
    return json.dumps(body).encode()


def publish_rows(database: Database, count: int, *, detail: str = "", keep: int | None = None) -> None:
    """Publish so many models in one transaction: their rows, and an outbox entry for each.

    keep: all but so many entries are removed in the same transaction, so that nobody sees a state between.
    """
    body = manifest(detail=detail)
    with database.write() as connection:
        versions = connection.execute(sa.select(sa.func.max(t.artifacts.c.version))).scalar() or 0
        sequence = connection.execute(sa.select(sa.func.max(t.artifact_events.c.sequence))).scalar() or 0
        ids = connection.execute(sa.select(sa.func.max(t.artifacts.c.id))).scalar() or 0
        values = {"family": "cognate-25m", "state": "READY", "manifest": body, "size_bytes": 1, "job": "jobs/x"}
        connection.execute(
            sa.insert(t.artifacts),
            [
                {
                    **values,
                    "id": ids + n,
                    "version": versions + n,
                    "digest": sha256_bytes(b"%d" % (versions + n)),
                    "create_us": now_us(),
                }
                for n in range(1, count + 1)
            ],
        )
        connection.execute(
            sa.insert(t.artifact_events),
            [
                {"sequence": sequence + n, "time_us": now_us(), "kind": "published", "artifact_id": ids + n}
                for n in range(1, count + 1)
            ],
        )
        if keep is not None:
            connection.execute(
                sa.delete(t.artifact_events).where(t.artifact_events.c.sequence <= sequence + count - keep)
            )


def job_with_events(database: Database, count: int, *, message: str = "", end: bool = True) -> str:
    """Store a job with so many events beside its first one, and return its name. end: it has ended, as CANCELLED."""
    store = JobStore(database)
    with database.write() as connection:
        job = store.submit(connection, plan=b"", total_steps=9, caller="test")
    append_job_events(database, job.name, count, message=message)
    if end:
        with database.write() as connection:
            connection.execute(
                sa.update(t.jobs).where(t.jobs.c.id == job.id).values(state=JobState.CANCELLED.value, queue_us=None)
            )
    return job.name


def append_job_events(database: Database, name: str, count: int, *, message: str = "") -> None:
    """Append so many notes to a job's history, in one transaction."""
    with database.write() as connection:
        job = connection.execute(sa.select(t.jobs).filter_by(name=name)).mappings().one()
        values = {"job_id": job["id"], "time_us": now_us(), "attempt": 0, "kind": "note"}
        payload = {"kind": "test", "message": message}
        rows = [{**values, "sequence": job["last_sequence"] + n, "payload": payload} for n in range(1, count + 1)]
        connection.execute(sa.insert(t.events), rows)
        last = {"last_sequence": job["last_sequence"] + count}
        connection.execute(sa.update(t.jobs).where(t.jobs.c.id == job["id"]).values(**last))


def open_database(folder: Path) -> Database:
    """Return a connection of its own to a service's store."""
    return Database(f"sqlite:///{folder / 'store.db'}")
