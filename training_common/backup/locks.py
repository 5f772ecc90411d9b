"""Who is at work on a place for backups: those that only add do not mind each other, one that removes works alone.

Each puts a file of its own, then looks at those of others: of two that begin at once, at least one sees the other. A
file is put again now and then; one that has not been for long, or whose process has ended on this machine, is nobody's.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cognateforge.exceptions import PreconditionError
from training_common.backup.destination import LOCKS, Destination, Entry
from training_common.engines.processes import find, own_handle

BACKUP, PRUNE, RESTORE = "backup", "prune", "restore"
REFRESH_S = 60.0
# Ten refreshes that failed: by then the process or its network is gone.
STALE_S = 600.0


@contextmanager
def at_work(destination: Destination, kind: str, *, alone: bool) -> Iterator[Callable[[], None]]:
    """Be at work while the context lasts, and yield what makes sure that nobody has taken this process for gone.

    alone: whether nobody else may be at work; otherwise only those that are alone are in the way.
    Errors: PreconditionError, naming who is in the way; from what is yielded, when it is too late to go on.
    """
    with _announced(destination, kind) as (key, require_held):
        _require_free(destination, key, alone=alone)
        yield require_held


@contextmanager
def at_restore(destination: Destination) -> Iterator[None]:
    """Keep prunes away while the context lasts. Nobody is in a restore's way.

    A place that this process cannot write to is read all the same.
    """
    from obstore.exceptions import BaseError

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, BaseError):
            stack.enter_context(_announced(destination, RESTORE))
        yield


@contextmanager
def _announced(destination: Destination, kind: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Put a file of one's own while the context lasts, and yield its key and what makes sure that it is still there."""
    key = f"{LOCKS}/{kind}-{uuid.uuid4().hex}"
    content = json.dumps({"host": socket.gethostname(), "process": own_handle()}).encode()
    refreshed, ended = [time.monotonic()], threading.Event()

    def put() -> None:
        destination.put(key, iter([content]), len(content))
        refreshed[0] = time.monotonic()

    def go_on_putting() -> None:
        while not ended.wait(REFRESH_S):
            try:
                put()
            except Exception:  # noqa: S112 - another try comes, and `require_held` tells when it is too late
                continue

    def require_held() -> None:
        held = any(entry.key == key for entry in destination.entries(LOCKS))
        if not held or time.monotonic() - refreshed[0] > STALE_S / 2:
            raise PreconditionError("this process was stopped or cut off for too long; start it again")

    put()
    thread = threading.Thread(target=go_on_putting, daemon=True)
    thread.start()
    try:
        yield key, require_held
    finally:
        ended.set()
        thread.join()
        destination.delete(key)


def _require_free(destination: Destination, own: str, *, alone: bool) -> None:
    entries = list(destination.entries(LOCKS))
    now_s = next((entry.modified_s for entry in entries if entry.key == own), 0.0)
    for entry in entries:
        kind = entry.key.removeprefix(f"{LOCKS}/").partition("-")[0]
        if entry.key == own or kind not in (BACKUP, PRUNE, RESTORE) or not (alone or kind == PRUNE):
            continue
        if problem := _holder(destination, entry, now_s):
            raise PreconditionError(
                f"a {kind} is at work on the same place ({problem}): try again when it has ended; if it was cut off, "
                f"in {STALE_S / 60:.0f} minutes"
            )
        if alone:  # it must not find its file when it wakes up
            destination.delete(entry.key)


def _holder(destination: Destination, entry: Entry, now_s: float) -> str:
    """Return who holds a lock, in words, "" where nobody does."""
    if now_s - entry.modified_s > STALE_S:
        return ""
    try:
        found = json.loads(b"".join(destination.pieces(entry.key)))
    except FileNotFoundError:
        return ""
    if found["host"] == socket.gethostname() and find(found["process"]) is None:
        return ""
    return f"process {found['process'].partition(':')[0]} on {found['host']}"
