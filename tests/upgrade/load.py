"""Callers of both services that never stop while servers are exchanged below them, and what they saw."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient, ModelSnapshot
from cognateforge.client.patience import Patience
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exceptions import ForgeError
from cognateforge.exchange.v1 import model_pb2
from tests.upgrade.calls import Client, Watched, client_of, fetch, get, start, watch

COGNATE, AGENT = "consul://cognate", "consul://agent"
_STEPS, _STEP_MS = 12, 40
# A queue that outgrows what the machine can do would only lengthen the end.
_MOST_OPEN = 4


class _UnretriedCognate(CognateClient):
    """Its channel repeats no call: what it meets is what the retries of the others hide."""

    _services = ()  # type: ignore[assignment]


class _UnretriedAgent(AgentClient):
    """The same of the agent service."""

    _services = ()  # type: ignore[assignment]


@dataclass
class Seen:
    """What all callers saw. failed: of calls through the client library as users have it."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    unretried_calls: int = 0
    unretried_failed: int = 0
    broken_streams: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, kind: str, work: Callable[[], object]) -> None:
        """Make one call and count it."""
        try:
            work()
        except ForgeError as error:
            with self.lock:
                self.failed.append(f"{kind}: {error.reason_name()}: {error.message}"[:300])
        with self.lock:
            self.calls[kind] += 1


class Load:
    """Many callers at once.

    pause_s: of a caller between two rounds. job_every_s: between two jobs of one service. models_before: published
    already.
    """

    def __init__(self, folder: Path, *, pause_s: float, job_every_s: float, models_before: int) -> None:
        self.seen = Seen()
        self.watched: dict[str, Watched] = {}
        self.model_sequences: list[int] = []
        self._folder = folder
        self._pause_s = pause_s
        self._job_every_s = job_every_s
        self.models_before = models_before
        self._ending = threading.Event()
        self._jobs: dict[str, list[str]] = {"cognate": [], "agent": []}
        self._watchers: list[threading.Thread] = []
        self.clients: dict[str, Client] = {"cognate": client_of("cognate", COGNATE), "agent": client_of("agent", AGENT)}
        callers = [
            *(self._look_at_cognate for _ in range(2)),
            *(self._look_at_agents for _ in range(2)),
            *(lambda service=service: self._begin_jobs(service) for service in self._jobs),
            *(lambda service=service: self._fetch(service) for service in self._jobs),
            *(self._look_without_retries for _ in range(2)),
        ]
        self._threads = [threading.Thread(target=caller, daemon=True) for caller in callers]
        self._models = threading.Thread(target=self._watch_models, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        """Let the callers run while the body does; afterwards every job and watch has come to its end."""
        pause_s = Patience.pause_s

        def counted(patience: Patience, error: ForgeError) -> float:
            with self.seen.lock:
                self.seen.broken_streams += 1
            return pause_s(patience, error)

        with mock.patch.object(Patience, "pause_s", counted):
            for thread in (*self._threads, self._models):
                thread.start()
            try:
                yield self
            finally:
                self._ending.set()
                for thread in (*self._threads, *self._watchers):
                    thread.join(180)
                # The watch of models has no end: it has to tell of all that was published.
                with contextlib.suppress(AssertionError):
                    wait_until(lambda: len(self.model_sequences) >= self.models_before + len(self.published), "models")
        for client in self.clients.values():
            client.close()

    @property
    def jobs(self) -> list[str]:
        """Every job that was taken in."""
        return [name for names in self._jobs.values() for name in names]

    @property
    def published(self) -> list[str]:
        """Every model that the watched jobs published."""
        names = set(self._jobs["cognate"])
        return [made for name, seen in self.watched.items() if name in names for made in seen.published]

    def begin(self, service: str, *, steps: int, step_ms: int) -> str:
        """Start one more job, and watch it to its end."""
        client = self.clients[service]
        name = start(client, steps=steps, step_ms=step_ms)
        self._jobs[service].append(name)
        thread = threading.Thread(target=self._watch, args=(client, name), daemon=True)
        self._watchers.append(thread)
        thread.start()
        return name

    def _again(self) -> Iterator[int]:
        for number in itertools.count():
            if self._ending.is_set():
                return
            yield number
            self._ending.wait(self._pause_s * random.uniform(0.5, 1.5))  # noqa: S311

    def _look_at_cognate(self) -> None:
        client = self.clients["cognate"]
        assert isinstance(client, CognateClient)
        jobs = self._jobs["cognate"]
        for _ in self._again():
            self.seen.call("ListModels", lambda: client.models.ListModels(model_pb2.ListModelsRequest(page_size=5)))
            self.seen.call("ListJobs", lambda: client.pretraining.ListJobs(cognate_v1.ListJobsRequest(page_size=5)))
            if jobs:
                self.seen.call("GetJob", lambda: get(client, jobs[-1]))

    def _look_at_agents(self) -> None:
        client = self.clients["agent"]
        assert isinstance(client, AgentClient)
        jobs = self._jobs["agent"]
        for _ in self._again():
            self.seen.call("ListAgents", lambda: client.agents.ListAgents(agent_pb2.ListAgentsRequest(page_size=5)))
            self.seen.call("ListJobs", lambda: client.training.ListJobs(agent_v1.ListJobsRequest(page_size=5)))
            if jobs:
                self.seen.call("GetJob", lambda: get(client, jobs[-1]))

    def _look_without_retries(self) -> None:
        with _UnretriedCognate(COGNATE) as cognate, _UnretriedAgent(AGENT) as agents:
            for _ in self._again():
                for work in (
                    lambda: cognate.models.ListModels(model_pb2.ListModelsRequest(page_size=5)),
                    lambda: agents.agents.ListAgents(agent_pb2.ListAgentsRequest(page_size=5)),
                ):
                    failed = False
                    try:
                        work()
                    except ForgeError:
                        failed = True
                    with self.seen.lock:
                        self.seen.unretried_calls += 1
                        self.seen.unretried_failed += failed

    def _begin_jobs(self, service: str) -> None:
        while not self._ending.is_set():
            if sum(name not in self.watched for name in self._jobs[service]) < _MOST_OPEN:
                self.seen.call("Start", lambda: self.begin(service, steps=_STEPS, step_ms=_STEP_MS))
            self._ending.wait(self._job_every_s)

    def _watch(self, client: Client, name: str) -> None:
        def work() -> None:
            self.watched[name] = watch(client, name)

        self.seen.call("WatchJob", work)

    def _fetch(self, service: str) -> None:
        client = self.clients[service]
        name = "cognate-25m" if isinstance(client, CognateClient) else "router"
        for number in self._again():
            folder = self._folder / f"{service}-{number}"
            self.seen.call("Fetch", functools.partial(fetch, client, name, folder))
            shutil.rmtree(folder, ignore_errors=True)

    def _watch_models(self) -> None:
        client = self.clients["cognate"]
        assert isinstance(client, CognateClient)

        def work() -> None:
            for item in client.watch_models():
                assert not isinstance(item, ModelSnapshot)
                self.model_sequences.append(item.sequence)

        with self.seen.lock:
            self.seen.calls["WatchModels"] += 1
        try:
            work()
        except ForgeError as error:
            if not self._ending.is_set():
                self.seen.failed.append(f"WatchModels: {error.message}")


def wait_until(check: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Ask until the answer is yes. Errors: AssertionError."""
    give_up = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.05)
