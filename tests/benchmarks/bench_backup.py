"""MB/s of a backup of published versions, over those of copying the same files, hashing and flushing each.

Ours includes what the yardstick lacks: the snapshot of the database, locks, the manifest. Further figures are of the
same store: restoring it (which hashes twice and writes twice), a second backup of what has not changed, and rows a
second of a database alone, beside copying and hashing its file.
Usage: python tests/benchmarks/bench_backup.py [runs] [folder]
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from cognate_server.settings import CognateSettings
from cognate_server.stored import SERVICE
from tests.benchmarks.common import interleave, report
from training_common.artifacts.open import open_registry
from training_common.backup.create import back_up
from training_common.backup.destination import FolderDestination
from training_common.backup.manifest import newest_backup
from training_common.backup.restore import restore
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database

VERSIONS = 4
# Cognate-25M's weights in float32.
WEIGHTS_BYTES = 100_000_000
EVENTS = 200_000
BUFFER_BYTES = 1 << 20


def settings_of(folder: Path) -> CognateSettings:
    """Return settings of a service below a folder."""
    return CognateSettings(data_dir=folder)


def make_versions(settings: CognateSettings, scratch: Path) -> list[Path]:
    """Publish versions, and return the files of their bytes."""
    generator = random.Random(0)  # noqa: S311
    database = Database(settings.database_url)
    database.upgrade(SERVICE.migrations)
    registry = open_registry(settings, database)
    for _ in range(VERSIONS):
        path = scratch / "weights"
        path.write_bytes(generator.randbytes(WEIGHTS_BYTES))
        file = registry.blobs.put(path, "model.safetensors")
        with database.write() as connection:
            registry.publish(connection, family="cognate-25m", state="READY", job="jobs/x", files=[file], body={})
    database.close()
    return [path for path in (settings.files_dir / "artifacts" / "blobs").rglob("*") if path.is_file()]


def make_events(settings: CognateSettings) -> int:
    """Write a job's history of progress, and return the count of all rows."""
    database = Database(settings.database_url)
    database.upgrade(SERVICE.migrations)
    with database.write() as connection:
        job = JobStore(database).submit(connection, plan=b"", total_steps=EVENTS, caller="bench")
        generator = random.Random(0)  # noqa: S311
        rows = [
            {
                "job_id": job.id,
                "sequence": number,
                "time_us": number,
                "attempt": 1,
                "kind": "progress",
                "payload": {"step": number, "metrics": {"loss": generator.random(), "tokens_per_s": 9000.5}},
            }
            for number in range(10, EVENTS)
        ]
        connection.execute(sa.insert(t.events), rows)
    database.close()
    return EVENTS


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def copy_and_hash(files: list[Path], folder: Path) -> None:
    """Copy files as a backup has to, hash on the way, and flush each."""
    folder.mkdir()
    for path in files:
        sha256, target = hashlib.sha256(), folder / path.name
        with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
            while piece := source.read(BUFFER_BYTES):
                sha256.update(piece)
                out.write(piece)
            os.fsync(out.fileno())


def timed_removal(folder: Path, work: Callable[[], object]) -> float:
    """Return how long some work takes that makes a folder, which is removed."""
    try:
        return seconds_of(work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rows_per_s(scratch: Path, runs: int) -> dict[str, float]:
    """Return rows a second of backup and restore of a database without versions, beside a copy of its file."""
    settings, place = settings_of(scratch / "rows"), scratch / "rows-backups"
    rows, file = make_events(settings), settings.data_dir / "store.db"

    def once() -> tuple[float, float, float]:
        dumped = seconds_of(lambda: back_up(SERVICE, settings, FolderDestination(place)))
        other, destination = settings_of(scratch / "rows-again"), FolderDestination(place)
        found = newest_backup(destination, "cognate")
        loaded = timed_removal(scratch / "rows-again", lambda: restore(SERVICE, other, destination, found))
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        sizes.append(size / file.stat().st_size)
        shutil.rmtree(place)
        copied = timed_removal(scratch / "copy", lambda: copy_and_hash([file], scratch / "copy"))
        return dumped, loaded, copied

    sizes: list[float] = []
    dumped, loaded, copied = (statistics.median(column) for column in zip(*(once() for _ in range(runs)), strict=True))
    return {
        "backup_rows_per_s": round(rows / dumped),
        "restore_rows_per_s": round(rows / loaded),
        "copy_of_database_rows_per_s": round(rows / copied),
        "backup_over_database_bytes": round(statistics.median(sizes), 3),
    }


def main(runs: int, below: str | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-backup-", dir=below) as name:
        scratch = Path(name)
        settings, place = settings_of(scratch / "service"), scratch / "backups"
        files = make_versions(settings, scratch)
        megabytes = sum(path.stat().st_size for path in files) / 1e6

        def ours() -> float:
            return megabytes / timed_removal(place, lambda: back_up(SERVICE, settings, FolderDestination(place)))

        def yardstick() -> float:
            return megabytes / timed_removal(scratch / "copy", lambda: copy_and_hash(files, scratch / "copy"))

        pairs = interleave(ours, yardstick, runs=runs)
        destination = FolderDestination(place)
        made = back_up(SERVICE, settings, destination)
        unchanged = [back_up(SERVICE, settings, destination).seconds for _ in range(runs)]

        def again() -> float:
            other = settings_of(scratch / "again")
            work = lambda: restore(SERVICE, other, destination, made.backup)  # noqa: E731
            return megabytes / timed_removal(scratch / "again", work)

        restored = statistics.median(again() for _ in range(runs))
        shutil.rmtree(place)
        rows = rows_per_s(scratch, runs)
    report(
        "backup",
        pairs,
        unit="MB/s",
        megabytes=round(megabytes),
        restore_mb_per_s=round(restored, 1),
        unchanged_backup_s=round(statistics.median(unchanged), 3),
        **rows,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2] if len(sys.argv) > 2 else None)
