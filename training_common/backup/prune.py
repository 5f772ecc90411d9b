"""Letting go of old backups: manifests first, then the objects that no manifest names any more.

Cut off at any moment, every backup whose manifest is left is whole, and the next prune goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from cognateforge.exceptions import ArtifactCorruptError, PreconditionError
from training_common.backup.destination import OBJECTS, Destination, is_half_written, object_digits
from training_common.backup.digest_table import DigestTable
from training_common.backup.locks import PRUNE, at_work
from training_common.backup.manifest import Backup, backup_ids, delete_manifest, open_backup
from training_common.backup.segments import kept_checkpoints, kept_files


@dataclass(kw_only=True)
class Pruned:
    """What was let go of."""

    backups: int = 0
    objects: int = 0
    size_bytes: int = 0


def prune(destination: Destination, service: str, *, keep: int) -> Pruned:
    """Keep a service's newest `keep` backups that are whole, and whatever is newer than the oldest of them.

    Other services' backups stay. keep: at least 1.
    Errors: PreconditionError, while a backup or another prune is at work, and when a manifest that stays, or its list
    of files, is damaged: nothing is removed then, as nobody knows what it names.
    """
    with at_work(destination, PRUNE, alone=True) as require_held, contextlib.closing(DigestTable()) as named:
        ids = backup_ids(destination)
        old = _old(destination, backup_ids(destination, service), keep)
        _name(destination, (name for name in ids if name not in old), named)
        require_held()
        pruned = Pruned()
        for name in old:
            delete_manifest(destination, name)
            pruned.backups += 1
        _remove_others(destination, named, pruned)
    return pruned


def _old(destination: Destination, ids: list[str], keep: int) -> set[str]:
    whole = 0
    for at, name in enumerate(reversed(ids)):
        with contextlib.suppress(ArtifactCorruptError):
            whole += open_backup(destination, name).manifest.whole
        if whole == keep:
            return set(ids[: len(ids) - at - 1])
    return set()


def _name(destination: Destination, ids: Iterable[str], named: DigestTable) -> None:
    """Collect the digests of everything in some backups."""
    for name in ids:
        try:
            backup = open_backup(destination, name)
            for listing in backup.manifest.listings:
                for segment in listing.segments:
                    named.add(segment.digest, segment.size_bytes)
            _name_files(destination, backup, named)
        except ArtifactCorruptError as error:
            raise PreconditionError(
                f"backup {name} is damaged, so nobody knows which objects it names, and nothing was removed: "
                f"{error.message}; remove its manifest to give it up"
            ) from error


def _name_files(destination: Destination, backup: Backup, named: DigestTable) -> None:
    for digest, size_bytes, *_ in kept_files(destination, backup.manifest.blobs, what="list of files"):
        named.add(digest, size_bytes)
    for _, digest, size_bytes in kept_checkpoints(destination, backup.manifest.checkpoints, what="list of checkpoints"):
        named.add(digest, size_bytes)


def _remove_others(destination: Destination, named: DigestTable, pruned: Pruned) -> None:
    """Remove objects that are not named, and what writers that are gone have left half-written: nobody else writes.

    What else lies there is somebody else's, and stays.
    """
    for entry in destination.entries(OBJECTS):
        digits = object_digits(entry.key)
        if is_half_written(entry.key) or (digits and named.size(digits) is None):
            destination.delete(entry.key)
            pruned.objects += 1
            pruned.size_bytes += entry.size_bytes
