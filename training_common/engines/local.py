"""The local engine: a worker on this machine for each attempt, of one process or of several under a torchrun agent.

Workers are started in a session of their own, so that they go on when the server ends or is killed. After a restart
the server finds them by process id and start time, which together never name another process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from training_common.attempt_log import open_log
from training_common.engines.processes import (
    EX_TEMPFAIL,
    OUTSIDE_SIGNALS,
    WORKER_ENVIRONMENT,
    find,
    handle_of,
    kill_tree,
)
from training_common.jobs.scheduler import Ending

NAME = "local"
_TORCHRUN = "training_common.engines.torchrun"
# Workers that have ended are kept so long that whoever looks at their jobs can still ask how.
_REMEMBERED = 100


class LocalEngine:
    """Starts worker processes and tells whether they live."""

    name = NAME

    def __init__(self, *, module: str, log_dir: Path) -> None:
        self._module = module
        self._log_dir = log_dir
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def launch(
        self,
        arguments: Sequence[str],
        *,
        log_name: str,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Start a worker and return its handle. Its output goes to a log file. Errors: OSError."""
        command = [self._module, *arguments]
        if processes > 1:
            run_id = log_name.removesuffix(".log").replace("/", "-")
            command = [_TORCHRUN, "--processes", str(processes), "--run-id", run_id, *command]
        log = open_log(self._log_dir / log_name)
        try:
            child = subprocess.Popen(  # noqa: S603 - the module and its arguments are ours
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**WORKER_ENVIRONMENT, **os.environ, **(environment or {})},
            )
        finally:
            os.close(log)
        handle = handle_of(psutil.Process(child.pid))
        self._children[handle] = child
        return handle

    def alive(self, handle: str) -> bool:
        """Whether the worker of that handle still runs."""
        child = self._children.get(handle)
        if child is not None:
            # Threads can outlast a process that looks dead, and until they have ended nobody is told how it did.
            return child.poll() is None
        return find(handle) is not None

    def waits(self, _handle: str) -> bool:
        """Return False: nothing is queued here but in the store."""
        return False

    def tidy(self) -> None:
        """Reap workers that have ended: the process table keeps them until somebody does."""
        ended = [handle for handle, child in self._children.items() if child.poll() is not None]
        for handle in ended[:-_REMEMBERED]:
            del self._children[handle]

    def ending(self, handle: str) -> Ending:
        """Return how a worker ended. One that an earlier server has started leaves no status to this one."""
        child = self._children.pop(handle, None)
        status = None if child is None else child.poll()
        if status is None:
            return Ending(words="the worker process ended without a word", from_outside=True)
        if status == EX_TEMPFAIL:
            return Ending(words="the worker's machine failed it", from_outside=True)
        if status >= 0:
            return Ending(words=f"the worker process ended with status {status} and without a word", from_outside=False)
        number = signal.Signals(-status)
        words = f"the worker process was ended by {number.name}"
        if number is signal.SIGKILL:
            words += ", which a machine short of memory sends too"
        return Ending(words=words, from_outside=number in OUTSIDE_SIGNALS)

    def kill(self, handle: str) -> None:
        """End a worker that was given up, with all its processes, if it still runs."""
        process = find(handle)
        if process is not None:
            kill_tree(process)
