"""One machine's part of a worker that is spread over several: a torchrun agent in a place of a run.

    python -m training_common.engines.spread --invite FOLDER --nodes N --processes P --host HOST MODULE ARGUMENT...
    python -m training_common.engines.spread --place K --nodes N --processes P --host HOST --port N MODULE ARGUMENT...

The first form is the worker that an engine sees. It runs on the server's machine, in place 0, with the process that
leads. It invites nodes, waits until all places are taken, and is where all meet: it lives as long as the run, and ends
as the process that failed first, wherever that was. The second form is started by a node, for its place.

Nothing is restarted within a run: the next attempt begins from the newest checkpoint under a new fencing token, so that
processes which are cut off from the others, and go on, can write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import structlog
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not typed
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from training_common import logs
from training_common.engines.invitations import BEAT_S, Beats, Invitation, Run, beat
from training_common.engines.network import interface_to, listen
from training_common.engines.processes import EX_TEMPFAIL, own_handle
from training_common.engines.torchrun import ENDED_FOR_ANOTHER, SHUTDOWN_S, end_as, first_cause

log = structlog.get_logger(__name__)

# How long machines that have begun may take to meet: a node's agent starts in seconds, in tens of them on a slow disk.
_MEET = timedelta(seconds=60)
# Once a process has ended, how long the others' exit statuses are waited for, which may tell better why.
_WORDS_S = 5.0
# The first process ends last, and the place where all meet with it: nobody has to wait at the end.
_EXIT_BARRIER_S = 1.0


class Meeting(RendezvousHandler):
    """A rendezvous in which every machine has its place before it begins. store: where all of them meet."""

    def __init__(self, *, run_id: str, place: int, nodes: int, host: str, port: int, store: Store) -> None:
        self._run_id, self._place, self._nodes, self._store = run_id, place, nodes, store
        self._address = RendezvousStoreInfo(host, port)

    def get_backend(self) -> str:
        return "places"

    @property
    def use_agent_store(self) -> bool:
        """Let processes meet there too: no other port is listened on for that."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(PrefixStore(self._run_id, self._store), self._place, self._nodes, self._address)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class Gathering:
    """A run as its host sees it: it tells nodes that the run goes on, and sees whether they do."""

    def __init__(self, run: Run, *, nodes: int, lost_after_s: float) -> None:
        self._run, self._lost_after_s = run, lost_after_s
        self._places = range(1, nodes)
        self._beats = Beats()
        self._over = threading.Event()
        # Why the run was ended, in words.
        self.lost = ""

    def wait(self) -> None:
        """Return when every place is taken, or the run is `lost`. A node that took one and is silent loses it."""
        told = None
        while True:
            with contextlib.suppress(OSError):  # a folder that is away for a while
                try:
                    beat(self._run.invitation_path)
                except FileNotFoundError:
                    self.lost = "the run was given up"
                    return
                taken = self._run.taken()
                for place in taken:
                    if self._beats.silent_s(self._run.place_path(place)) > self._lost_after_s:
                        self._run.leave(place)
                missing = len(self._places) - len(taken)
                if not missing:
                    self._run.begin()
                    log.info("run begins", nodes=[self._run.holder(place) for place in self._places])
                    return
                if missing != told:
                    log.info("waits for nodes", missing=missing)
                    told = missing
            time.sleep(BEAT_S)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """End this process by SIGTERM when a node is lost while the body runs."""
        watcher = threading.Thread(target=self._watch, name="nodes", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self) -> None:
        ended_at: float | None = None
        while not self._over.wait(BEAT_S):
            try:
                beat(self._run.invitation_path)
                ended = self._run.ended()
                silent = [
                    place
                    for place in self._places
                    if place not in ended and self._beats.silent_s(self._run.place_path(place)) > self._lost_after_s
                ]
            except FileNotFoundError:
                self.lost = "the run was given up"
            except OSError as error:
                log.warning("nodes cannot be looked at", error=str(error))
                continue
            else:
                failed = [place for place, status in ended.items() if status]
                ended_at = (ended_at or time.monotonic()) if failed else None
                if silent:
                    self.lost = f"the node in place {silent[0]} is silent or gone"
                elif ended_at is not None and time.monotonic() - ended_at > _WORDS_S:
                    # Processes of this machine would have missed it by now if they could.
                    self.lost = f"the processes in place {failed[0]} have ended with status {ended[failed[0]]}"
            if self.lost and not self._over.is_set():
                log.warning("node lost", detail=self.lost)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def statuses(self) -> list[int]:
        """Return how the other machines' processes have failed, as far as that is told in a few seconds."""
        until = time.monotonic() + _WORDS_S
        while True:
            ended = {}
            with contextlib.suppress(OSError):
                ended = self._run.ended()
            failed = [status for status in ended.values() if status]
            if self.lost or len(ended) == len(self._places) or time.monotonic() > until:
                return failed
            if any(status not in ENDED_FOR_ANOTHER for status in failed):
                return failed
            time.sleep(BEAT_S)


def main(argv: list[str]) -> int:
    """Run one machine's part to its end. Returns its exit status; one ended by a signal ends this process so."""
    options = _options(argv)
    logs.configure()
    os.environ["GLOO_SOCKET_IFNAME"] = interface_to(options.host)
    if options.invite is None:
        try:
            store = TCPStore(options.host, options.port, timeout=_MEET, wait_for_workers=False)
        except (dist.DistError, TimeoutError) as error:
            log.warning(
                "the run's host cannot be reached", host=options.host, port=options.port, error=str(error)[:500]
            )
            return EX_TEMPFAIL
        return end_as(first_cause(_run(options, place=options.place, port=options.port, store=store)))
    return end_as(_host(options, Run(options.invite)))


def _host(options: argparse.Namespace, run: Run) -> int:
    # On this address alone, where torch by itself listens on all of them.
    listening = listen(options.host)
    port = listening.getsockname()[1]
    store = TCPStore(
        options.host,
        port,
        is_master=True,
        timeout=_MEET,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    handle, own = own_handle(), _asked(options.arguments)
    run.invite(
        Invitation(
            handle=handle,
            host=options.host,
            port=port,
            processes=options.all_processes,
            nodes=options.nodes,
            job=own.job,
            attempt=own.attempt,
            token=own.token,
            threads=own.threads,
            create_us=time.time_ns() // 1000,
        )
    )
    gathering = Gathering(run, nodes=options.nodes, lost_after_s=options.lost_after)
    try:
        gathering.wait()
        if gathering.lost:
            return EX_TEMPFAIL
        with gathering.watched():
            statuses = _run(options, place=0, port=port, store=store)
        if statuses and all(status in ENDED_FOR_ANOTHER for status in statuses):
            statuses += gathering.statuses()
    finally:
        run.remove()
    if gathering.lost and all(status in ENDED_FOR_ANOTHER for status in statuses):
        return EX_TEMPFAIL
    return first_cause(statuses)


def _run(options: argparse.Namespace, *, place: int, port: int, store: Store) -> list[int]:
    """Run this machine's processes to their end. Returns the statuses of those that failed."""
    meeting = Meeting(
        run_id=f"{options.host}:{port}", place=place, nodes=options.nodes, host=options.host, port=port, store=store
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=options.processes,
        entrypoint=sys.executable,
        args=("-m", options.module, *options.arguments),
        rdzv_handler=meeting,
        max_restarts=0,
    )
    agent = LocalElasticAgent(
        spec,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        exit_barrier_timeout=_EXIT_BARRIER_S,
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        result = agent.run()
    except SignalException as error:
        return [-error.sigval]
    except (dist.DistError, TimeoutError) as error:
        log.warning("the machines of the run did not meet", error=str(error)[:500])
        return [EX_TEMPFAIL]
    return [failure.exitcode for failure in result.failures.values()] if result.is_failed() else []


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs one machine's part of a worker. Started by an engine or a node.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--invite", type=Path, help="a folder to make, by which nodes are asked to take part")
    what.add_argument("--place", type=int, help="of this machine in the run: 1 or more")
    parser.add_argument("--nodes", type=int, required=True, help="machines of the run")
    parser.add_argument("--processes", type=int, required=True, help="on this machine")
    parser.add_argument("--all-processes", type=int, default=0, help="with --invite: on all machines")
    parser.add_argument("--lost-after", type=float, default=30.0, help="seconds after which a silent node is lost")
    parser.add_argument("--host", required=True, help="address of the server's machine, where all meet")
    parser.add_argument("--port", type=int, default=0, help="with --place: where on it")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a worker's arguments say of its attempt."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--token", type=int, required=True)
    parser.add_argument("--threads", type=int)
    return parser.parse_known_args(arguments)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
