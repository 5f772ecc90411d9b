"""What a restored store tells that cannot be so any more: workers that hold jobs, checkpoints without files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from training_common.backup.manifest import Backup
from training_common.backup.snapshot import live_versions
from training_common.checkpoints import MANIFEST
from training_common.jobs.folders import folder_name
from training_common.jobs.states import FINAL
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database, now_us

_OPEN = t.jobs.c.state.not_in([state.value for state in FINAL])


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What was changed of what the backup holds.

    cut: jobs that a worker held. checkpoints_gone: those whose files are not there. anew: open jobs that are left
    without any, and begin again. damaged: versions whose bytes the backup lacks.
    """

    cut: int
    checkpoints_gone: int
    anew: int
    damaged: tuple[str, ...]


def settle(database: Database, backup: Backup, jobs: Path) -> Settled:
    """Make a restored store one that a server can go on with. jobs: the folder of all jobs' folders.

    Workers that held jobs are treated as lost by no fault of their own. No worker of the store that was lost, should
    one still be at work, can write: the fencing tokens of open jobs go on beyond any that it has given.
    """
    store = JobStore(database)
    held = store.held()
    for job, attempt in held:
        message = f"attempt {attempt.number}: its worker was left behind; the store is restored from backup {backup.id}"
        store.cut(job, attempt, message=message)
    with database.write() as connection:
        # Tokens grow by one with each attempt and cut: none of that time has come as far as this clock.
        connection.execute(sa.update(t.jobs).where(_OPEN).values(fencing_token=now_us()))
        connection.execute(sa.update(t.artifacts).where(t.artifacts.c.tier != "STANDARD").values(tier="STANDARD"))
        gone = _checkpoints_gone(connection, jobs)
        for key in gone:
            connection.execute(sa.update(t.checkpoints).filter_by(id=key).values(available=False))
        return Settled(
            cut=len(held),
            checkpoints_gone=len(gone),
            anew=_begin_anew(connection),
            damaged=tuple(_mark_damaged(connection, backup)),
        )


def _checkpoints_gone(connection: sa.Connection, jobs: Path) -> list[int]:
    """Return the checkpoints whose files are not there."""
    query = sa.select(t.checkpoints.c.id, t.jobs.c.name, t.checkpoints.c.folder).join_from(t.checkpoints, t.jobs)
    found = connection.execute(query.where(t.checkpoints.c.available))
    return [
        key
        for key, name, folder in found
        if not (jobs / folder_name(name) / "checkpoints" / folder / MANIFEST).exists()
    ]


def _begin_anew(connection: sa.Connection) -> int:
    """Return how many open jobs have had checkpoints and have none now."""
    had = sa.exists().where(t.checkpoints.c.job_id == t.jobs.c.id)
    has = sa.exists().where(t.checkpoints.c.job_id == t.jobs.c.id, t.checkpoints.c.available)
    return connection.execute(sa.select(sa.func.count()).select_from(t.jobs).where(_OPEN, had, ~has)).scalar_one()


def _mark_damaged(connection: sa.Connection, backup: Backup) -> list[str]:
    """Note at each version what of its bytes the backup lacks, and return the versions' names."""
    problems = {one.digest: one.problem for one in backup.manifest.missing}
    damaged = []
    for version in list(live_versions(connection, t.artifacts)) if problems else ():
        lacking = next((file for file in version.files if file.digest in problems), None)
        if lacking is not None:
            damage = f"{lacking.path}: not in backup {backup.id}: {problems[lacking.digest]}"[:500]
            connection.execute(sa.update(t.artifacts).filter_by(id=version.id).values(damage=damage))
            damaged.append(version.name)
    return damaged
