"""The local engine: one worker process on this machine for each attempt.

Workers are started in a session of their own, so that they go on when the server ends or is killed. After a restart
the server finds them by process id and start time, which together never name another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

NAME = "local"
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


def own_handle() -> str:
    """Return this process's handle: "PID:start time"."""
    return _handle(psutil.Process())


def _handle(process: psutil.Process) -> str:
    return f"{process.pid}:{process.create_time():.2f}"


class LocalEngine:
    """Starts worker processes and tells whether they live."""

    name = NAME

    def __init__(self, *, module: str, log_dir: Path) -> None:
        self._module = module
        self._log_dir = log_dir
        self._children: list[subprocess.Popen[bytes]] = []

    def launch(self, arguments: Sequence[str], *, log_name: str, environment: Mapping[str, str] | None = None) -> str:
        """Start a worker and return its handle. Its output goes to a log file. Errors: OSError."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        with (self._log_dir / log_name).open("ab") as log:
            child = subprocess.Popen(  # noqa: S603 - the module and its arguments are ours
                [sys.executable, "-m", self._module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**WORKER_ENVIRONMENT, **os.environ, **(environment or {})},
            )
        self._children.append(child)
        return _handle(psutil.Process(child.pid))

    def alive(self, handle: str) -> bool:
        """Whether the worker of that handle still runs."""
        pid = int(handle.partition(":")[0])
        try:
            process = psutil.Process(pid)
            return _handle(process) == handle and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def tidy(self) -> None:
        """Reap workers that have ended: the process table keeps them until somebody does."""
        self._children = [child for child in self._children if child.poll() is None]

    def kill(self, handle: str) -> None:
        """End a worker that was given up, if it still runs."""
        if self.alive(handle):
            psutil.Process(int(handle.partition(":")[0])).kill()
