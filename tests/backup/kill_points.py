"""Work that dies at a point of its way: run in a process of its own by tests of kill -9."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.backup.stores import service_of, settings_of
from training_common.artifacts.blobs import BlobStore
from training_common.backup import create, prune, restore
from training_common.backup.destination import FolderDestination
from training_common.backup.manifest import newest_backup
from training_common.store import revisions

# Where each point is: a function, and whether the process dies before or after its work.
_POINTS: dict[str, tuple[Any, str, str]] = {
    "between objects": (FolderDestination, "put", "before"),
    "within an object": (Path, "replace", "before"),
    "after an object": (Path, "replace", "after"),
    "before the manifest": (create, "put_manifest", "before"),
    "deleted": (FolderDestination, "delete", "after"),
    "claimed": (restore, "_restore_blobs", "before"),
    "blob": (BlobStore, "put", "after"),
    "table": (restore, "_set_sequence", "after"),
    "committed": (restore, "settle", "before"),
    "settled": (restore, "settle", "after"),
    "version": (BlobStore, "put_manifest", "after"),
    "upgraded": (revisions, "upgrade_to", "after"),
}


def run(work: str, point: str, count: int, folder: Path) -> None:
    """Do some work below a folder, and die by SIGKILL at the so-many-th pass of a point."""
    place = FolderDestination(folder / "backups")
    cognate = service_of("cognate")
    if work == "backup":
        _die_at(point, count, only=_is_no_lock)
        create.back_up(cognate, settings_of("cognate", folder / "service"), place)
    elif work == "prune":
        _die_at(point, count, only=_is_no_lock)
        prune.prune(place, "cognate", keep=1)
    else:
        backup = newest_backup(place, "cognate")
        _die_at(point, count, only=lambda _arguments: True)
        restore.restore(cognate, settings_of("cognate", folder / "b"), place, backup)


def _is_no_lock(arguments: tuple[Any, ...]) -> bool:
    return "locks/" not in str(arguments)


def _die_at(point: str, count: int, *, only: Callable[[tuple[Any, ...]], bool]) -> None:
    owner, name, moment = _POINTS[point]
    original, passed = getattr(owner, name), [0]

    def dies(*arguments: Any, **named: Any) -> Any:
        passed[0] += only(arguments)
        last = passed[0] == count
        if last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dies)
