"""Workers' processes: names that outlive a server, children that do not outlive their parent, what they run under."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import psutil

# From sysexits.h, "try again later": the worker has told of a fault of its machine.
EX_TEMPFAIL = 75
# Sent from outside, SIGKILL also for want of memory. A process that fails by itself raises others, such as SIGSEGV.
OUTSIDE_SIGNALS = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM})
# The same as exit statuses tell of them, and what a worker itself tells of its machine.
OUTSIDE_STATUSES = frozenset({EX_TEMPFAIL, *(128 + sent for sent in OUTSIDE_SIGNALS)})
# Torch's threads wait for each other many times a step. By default they spin for milliseconds, which slows a step
# several times as soon as anything else runs: the server itself, a second worker. Never to spin costs a tenth on an
# idle machine. Some ten microseconds cost nothing in either case (docs/log.md has the figures).
# By default glibc gives a freed tensor of megabytes back to the kernel, and every step faults its pages in anew: a step
# of Cognate-25M took a quarter longer. These keep up to 2 GiB, and let tensors of up to 32 MiB come from what is kept.
WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30),
}
_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.5


def handle_of(process: psutil.Process) -> str:
    """Return what names a process for ever: "PID:start time"."""
    return f"{process.pid}:{process.create_time():.2f}"


def pid_of(handle: str) -> int:
    """Return the process id of a handle."""
    return int(handle.partition(":")[0])


def own_handle() -> str:
    """Return this process's handle."""
    return handle_of(psutil.Process())


def parent_handle() -> str:
    """Return the handle of the process that started this one."""
    return handle_of(psutil.Process(os.getppid()))


def find(handle: str) -> psutil.Process | None:
    """Return the running process of a handle, or None."""
    try:
        process = psutil.Process(pid_of(handle))
        return process if handle_of(process) == handle and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, ValueError):  # the latter: another engine's
        return None


def kill_tree(process: psutil.Process) -> None:
    """End a process and all that it has started, the parent first so that it starts nothing more."""
    try:
        children = process.children(recursive=True)
        process.kill()
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def end_with_parent(parent: int) -> None:
    """Let this process end as soon as the one of that id, its parent, has ended, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(EX_TEMPFAIL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(EX_TEMPFAIL)


def exit_at_once(status: int) -> NoReturn:
    """End this process without the interpreter's own end, but with what it has written.

    A thread of torch may wait for a process that is lost. On the usual way out it aborts this one, and a worker that
    aborts reads as a job that fails by itself.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
