"""Ends what a worker has started and left: a plugin, an environment or an exporter may start what outlives it."""

from __future__ import annotations

import contextlib
import os

import psutil
import structlog

log = structlog.get_logger(__name__)


def end_leftovers() -> None:
    """Kill what this process has started, and, where it leads its session, all others of it.

    The latter finds what was left by a process that has ended itself. What made a session of its own and lost its
    parent belongs to nobody that could be known here.
    """
    left = _left()
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()
    if left:
        log.warning("ended processes that the attempt had left", processes=len(left))


def _left() -> set[psutil.Process]:
    own = psutil.Process()
    found = set(own.children(recursive=True))
    if os.getsid(0) == own.pid:
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.pid != own.pid and os.getsid(process.pid) == own.pid:
                    found.add(process)
    return found
