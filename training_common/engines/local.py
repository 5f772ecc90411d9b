"""The local engine: a worker on this machine for each attempt, of one process or of several under a torchrun agent.

One that is spread over several machines has such an agent on each of them. The one on this machine is the worker, and
invites nodes for the others (`training_common.engines.node`).

Workers are started in a session of their own, so that they go on when the server ends or is killed. After a restart
the server finds them by process id and start time, which together never name another process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from training_common.attempt_log import open_log
from training_common.compute import share_of
from training_common.engines.invitations import Run, runs
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
_SPREAD = "training_common.engines.spread"
# Workers that have ended are kept so long that whoever looks at their jobs can still ask how.
_REMEMBERED = 100


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How workers are spread over machines.

    folder: where nodes find invitations. owner: names this server's among them. host: its address for nodes.
    lost_after_s: silence of a node after which it counts as lost.
    """

    folder: Path
    owner: str
    host: str
    lost_after_s: float


class LocalEngine:
    """Starts worker processes and tells whether they live. spread: without it all of them are on this machine."""

    name = NAME

    def __init__(self, *, module: str, log_dir: Path, spread: Spread | None = None) -> None:
        self._module = module
        self._log_dir = log_dir
        self._spread = spread
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def launch(
        self,
        arguments: Sequence[str],
        *,
        log_name: str,
        processes: int = 1,
        nodes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Start a worker and return its handle. Its output goes to a log file. Errors: OSError."""
        command = [self._module, *arguments]
        run_id = log_name.removesuffix(".log").replace("/", "-")
        if nodes > 1:
            command = [*self._over(run_id, processes, nodes), *command]
        elif processes > 1:
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

    def _over(self, run_id: str, processes: int, nodes: int) -> list[str]:
        if self._spread is None:
            raise OSError(0, "this server cannot be met by nodes: workers.rendezvous_host is not set")
        spread = self._spread
        return [
            *(_SPREAD, "--invite", str(spread.folder / f"{spread.owner}-{run_id}"), "--host", spread.host),
            *("--nodes", str(nodes), "--all-processes", str(processes)),
            *("--processes", str(share_of(processes, nodes, 0)), "--lost-after", f"{spread.lost_after_s:g}"),
        ]

    def alive(self, handle: str) -> bool:
        """Whether the worker of that handle still runs."""
        child = self._children.get(handle)
        if child is not None:
            # Threads can outlast a process that looks dead, and until they have ended nobody is told how it did.
            return child.poll() is None
        return find(handle) is not None

    def waits(self, handle: str) -> bool:
        """Whether the worker lives and waits for nodes."""
        try:
            return any(not run.has_begun for run in self._invited(handle)) and find(handle) is not None
        except OSError:  # the shared folder is away
            return False

    def _invited(self, handle: str = "") -> Iterator[Run]:
        """Yield this server's runs on several machines: that of a worker, or without one those whose worker is gone."""
        for run in runs(self._spread.folder, owner=f"{self._spread.owner}-") if self._spread else ():
            invitation = run.invitation()
            own = "" if invitation is None else invitation.handle
            if (own == handle) if handle else (find(own) is None):
                yield run

    def tidy(self) -> None:
        """Reap workers that have ended: the process table keeps them until somebody does. Call off their runs."""
        with contextlib.suppress(OSError):  # the shared folder is away: nodes see their runs silent
            for run in self._invited():
                run.remove()
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
        with contextlib.suppress(OSError):
            for run in self._invited(handle):
                run.remove()
