"""A node: lends this machine's slots to jobs of a service that are spread over several machines.

It looks for invitations in the folder that it shares with the service's servers, takes places, and starts its service's
worker in them. It opens no port. What it started ends with it, with the run, and when the run's host is silent.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import structlog

from training_common import logs
from training_common.engines.invitations import BEAT_S, Beats, Invitation, Run, beat, runs
from training_common.engines.processes import EX_TEMPFAIL, WORKER_ENVIRONMENT, kill_tree
from training_common.jobs.folders import jobs_dir, log_name, nodes_dir
from training_common.settings import ServiceSettings, SettingsError

log = structlog.get_logger(__name__)
S = TypeVar("S", bound=ServiceSettings)


@dataclass(kw_only=True)
class Part:
    """A place that this node has taken. child: its agent, once the run has begun."""

    run: Run
    invitation: Invitation
    place: int
    child: subprocess.Popen[bytes] | None = None

    @property
    def processes(self) -> int:
        """How many it has."""
        return self.invitation.share(self.place)

    @property
    def order(self) -> tuple[int, str]:
        """Its run's turn among others: the first invited goes first."""
        return self.invitation.create_us, self.run.name


class Node:
    """Takes part in runs, as many at once as it has slots for. module: the service's worker."""

    def __init__(self, settings: ServiceSettings, *, module: str, settings_file: Path | None, slots: int) -> None:
        self._folder, self._logs = nodes_dir(settings), jobs_dir(settings)
        self._lost_after_s = settings.workers.node_lost_after_s
        self._module, self._settings_file, self._slots = module, settings_file, slots
        # Names this node for as long as it runs: another one on this machine is another.
        self._name = f"{socket.gethostname()}:{uuid.uuid4()}"
        self._beats = Beats()
        self._parts: dict[str, Part] = {}

    def look(self) -> None:
        """Look at every run once, and take places that are free. Errors: OSError, while the folder is away."""
        present = {run.name: run for run in runs(self._folder)}
        silent = {name: self._beats.silent_s(run.invitation_path) for name, run in present.items()}
        self._beats.keep_only([run.invitation_path for run in present.values()])
        for part in list(self._parts.values()):
            if silent.get(part.run.name, float("inf")) > self._lost_after_s:
                self._drop(part, "run is over, or its host is silent")
            else:
                self._look_at(part)
        self._take_places([run for run in present.values() if self._beats.moves(run.invitation_path)])

    def _look_at(self, part: Part) -> None:
        status = None if part.child is None else part.child.poll()
        if status is not None:
            log.info("part ended", run=part.run.name, status=status)
            part.run.end(part.place, status)
            del self._parts[part.run.name]
        elif not part.run.is_held(part.place, self._name):
            self._drop(part, "place was given to another node")
        elif part.child is None and part.run.has_begun:
            self._start(part)
        else:
            beat(part.run.place_path(part.place))

    def _drop(self, part: Part, why: str) -> None:
        log.info("part dropped", run=part.run.name, why=why)
        if part.child is not None:
            kill_tree(psutil.Process(part.child.pid))
            part.child.wait()
        del self._parts[part.run.name]

    def _take_places(self, present: list[Run]) -> None:
        """Take places in the order in which runs were invited: two that wait for each other's nodes would for ever."""
        open_ = [
            (invitation.create_us, run.name, run, invitation)
            for run in present
            if run.name not in self._parts and not run.has_begun and (invitation := run.invitation()) is not None
        ]
        for *order, run, invitation in sorted(open_, key=lambda one: one[:2]):
            taken = run.taken()
            place = next((place for place in range(1, invitation.nodes) if place not in taken), None)
            if place is None or invitation.share(place) > self._slots:
                continue
            self._make_room(invitation.share(place), tuple(order))
            if invitation.share(place) > self._free():
                return  # those behind it would never let it have a turn
            if run.take(place, self._name):
                self._parts[run.name] = Part(run=run, invitation=invitation, place=place)
                log.info("place taken", run=run.name, place=place, processes=invitation.share(place))

    def _make_room(self, slots: int, order: tuple[object, ...]) -> None:
        """Give back places of later runs that have not begun, as far as an earlier one needs their slots."""
        for part in sorted(self._parts.values(), key=lambda part: part.order, reverse=True):
            if self._free() >= slots or part.order <= order:
                return
            if part.child is None and not part.run.has_begun:
                part.run.leave(part.place)
                self._drop(part, "an earlier run needs its slots")

    def _free(self) -> int:
        return self._slots - sum(part.processes for part in self._parts.values())

    def _start(self, part: Part) -> None:
        invitation = part.invitation
        settings = [] if self._settings_file is None else ["--settings", str(self._settings_file)]
        command = [
            # Ends with this process, however that ends.
            *(sys.executable, "-m", "training_common.engines.child", str(os.getpid())),
            *("training_common.engines.spread", "--place", str(part.place), "--nodes", str(invitation.nodes)),
            *("--processes", str(part.processes), "--host", invitation.host, "--port", str(invitation.port)),
            *(self._module, *invitation.arguments(), *settings),
        ]
        try:
            # The first process has made it. It is made here only where that comes later.
            output = os.open(
                self._logs / log_name(invitation.job, invitation.attempt),
                os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW,
            )
        except OSError as error:
            log.warning("no log there", job=invitation.job, error=error.strerror)
            output = os.open(os.devnull, os.O_WRONLY)
        try:
            part.child = subprocess.Popen(  # noqa: S603 - the module is ours, and the arguments were checked
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**WORKER_ENVIRONMENT, **os.environ},
            )
        except OSError as error:
            log.warning("part not started", run=part.run.name, error=error.strerror)
            part.run.end(part.place, EX_TEMPFAIL)
            del self._parts[part.run.name]
        else:
            log.info("part started", run=part.run.name, job=invitation.job, attempt=invitation.attempt)
        finally:
            os.close(output)

    def stop(self) -> None:
        """End all parts, and say so: their runs go on elsewhere."""
        for part in list(self._parts.values()):
            begun = part.child is not None
            self._drop(part, "this node stops")
            try:
                part.run.end(part.place, EX_TEMPFAIL) if begun else part.run.leave(part.place)
            except OSError as error:
                log.warning("end not told", run=part.run.name, error=error.strerror)


def main(name: str, *, load_settings: Callable[[Path | None], S], module: str) -> None:
    """Run a service's node until SIGTERM. Exit status 2 tells of settings that cannot be used."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", allow_abbrev=False, description="Lends this machine to jobs on several machines."
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="TOML file; the environment goes over it")
    parser.add_argument("--slots", type=int, help="processes at the same time; by default workers.slots")
    options = parser.parse_args()
    logs.configure()
    settings_file = options.settings.resolve() if options.settings else None
    try:
        settings = load_settings(settings_file)
    except SettingsError as error:
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(2)
    slots = settings.workers.slots if options.slots is None else options.slots
    node = Node(settings, module=module, settings_file=settings_file, slots=slots)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopped.set())
    log.info("node started", slots=slots, folder=str(nodes_dir(settings)))
    while not stopped.wait(BEAT_S):
        try:
            node.look()
        except OSError as error:
            # Its runs' hosts decide how long is too long.
            log.warning("invitations cannot be looked at", error=error.strerror)
    node.stop()
