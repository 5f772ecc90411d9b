"""Ends what a worker has started and left behind: a plugin or an environment may start processes that outlive it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from typing import ParamSpec

import psutil
import structlog

P = ParamSpec("P")
log = structlog.get_logger(__name__)


def ending_leftovers(work: Callable[P, None]) -> Callable[P, None]:
    """Return work after which, however it ends, nothing that it has started in this process's session still runs."""

    @functools.wraps(work)
    def alone(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            work(*args, **kwargs)
        finally:
            end_leftovers()

    return alone


def end_leftovers() -> None:
    """Kill what this process has started, and, where it leads its session, all others of it.

    The latter finds what was left by a process that has ended itself. What made a session of its own and lost its
    parent belongs to nobody that could be known here.
    """
    ended = 0
    for process in _left():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(signal.SIGKILL)
            ended += 1
    if ended:
        log.warning("ended processes that the training had left", processes=ended)


def _left() -> Iterator[psutil.Process]:
    own = psutil.Process()
    found = set(own.children(recursive=True))
    if os.getsid(0) == own.pid:
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.pid != own.pid and os.getsid(process.pid) == own.pid:
                    found.add(process)
    yield from found
