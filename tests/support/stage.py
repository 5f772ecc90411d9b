"""Both services and the dashboard in a thread of their own, over stores that a test fills without any training."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvicorn

from cognateforge.agent.v1 import training_pb2
from cognateforge.client import AsyncAgentClient, AsyncCognateClient, CallBreaker
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.dashboard.app import build
from cognateforge.dashboard.serve import Impatient, listen, url_of
from cognateforge.dashboard.upstream import Upstreams
from tests.support.servers import running_agent, running_cognate
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobStore
from training_common.rpc.server import RunningServer
from training_common.store import tables as t
from training_common.store.database import Database

# Workers of another server: the one that serves leaves their jobs alone, and believes in them for an hour.
_ELSEWHERE = {"workers": {"slots": 0, "lost_after_s": 3600}}


@dataclass
class Stage:
    """Where everything is, while it runs."""

    folder: Path
    url: str = ""
    actions: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop | None = None
    _servers: dict[str, tuple[AsyncExitStack, RunningServer]] = field(default_factory=dict)

    def store(self, service: str = "cognate") -> JobStore:
        """Return the store of a service, for a test that writes as a worker does."""
        return JobStore(Database(f"sqlite:///{self.folder / service / 'store.db'}"))

    def run(self, work: Any) -> Any:
        """Run a coroutine where the servers are."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def start_service(self, name: str, address: str = "127.0.0.1:0") -> str:
        """Start a service, and return its address."""
        running = running_cognate if name == "cognate" else running_agent
        stack = AsyncExitStack()
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        server = await stack.enter_async_context(running(folder, address=address, **_ELSEWHERE, **self.settings))
        self._servers[name] = stack, server
        return server.address

    async def stop_service(self, name: str) -> str:
        """Stop a service, and return the address that it had."""
        stack, server = self._servers.pop(name)
        await stack.aclose()
        return server.address

    async def _serve(self, ready: threading.Event, over: asyncio.Event) -> None:
        addresses = {name: await self.start_service(name) for name in ("cognate", "agent")}
        upstreams = Upstreams(
            AsyncCognateClient(addresses["cognate"], breaker=CallBreaker(reset_timeout_s=0.5)),
            AsyncAgentClient(addresses["agent"], breaker=CallBreaker(reset_timeout_s=0.5)),
        )
        listening = listen("127.0.0.1", 0)
        self.url = url_of(listening).rstrip("/")
        config = uvicorn.Config(
            build(upstreams, actions=self.actions),
            http=Impatient,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=0,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        ready.set()  # it listens: what is asked before it has begun waits
        await over.wait()
        server.should_exit = True
        await serving
        for name in list(self._servers):
            await self.stop_service(name)


@contextmanager
def stage(folder: Path, *, actions: bool = False, **settings: Any) -> Iterator[Stage]:
    """Yield both services, empty, and the dashboard. actions: whether it can steer jobs. settings: of both services."""
    found = Stage(folder, actions=actions, settings=settings)
    ready = threading.Event()
    over: list[asyncio.Event] = []

    async def serve() -> None:
        found._loop = asyncio.get_running_loop()
        over.append(asyncio.Event())
        await found._serve(ready, over[0])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not ready.wait(0.1):
            if not thread.is_alive():
                raise RuntimeError("the dashboard did not start")
        yield found
    finally:
        if found._loop is not None and thread.is_alive():
            found._loop.call_soon_threadsafe(over[0].set)
        thread.join(30)


# --- jobs, as a worker would have told of them


def submit(store: JobStore, plan: Any, *, caller: str = "spiffe://forge/operator") -> str:
    """Store a job, and return its name."""
    with store.database.write() as connection:
        job = store.submit(connection, plan=plan.SerializeToString(), total_steps=plan.total_steps, caller=caller)
    return job.name


def pretraining(total_steps: int = 400) -> pretraining_pb2.PretrainingPlan:
    """Return a plan."""
    return pretraining_pb2.PretrainingPlan(
        total_steps=total_steps, seed=7, batch_size=16, sequence_length=128, peak_learning_rate=7.5e-4, warmup_steps=40
    )


def agent_plan(agent: str = "intent-router", total_steps: int = 200) -> training_pb2.TrainingPlan:
    """Return a plan of a classifier."""
    return training_pb2.TrainingPlan(
        agent=agent,
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name="cognate-25m@2"),
        classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=1)),
        total_steps=total_steps,
        batch_size=16,
    )


def seeded_series(store: JobStore, name: str, count: int, spike_step: int = 0) -> None:
    """Write a long job's progress in one transaction. spike_step: where the loss stands out."""
    rows = []
    job = store.get(name)
    for step in range(1, count + 1):
        loss = 99.0 if step == spike_step else 3 + 6 * math.exp(-7 * step / count) + step % 7 / 100
        payload = {"step": step, "total_steps": count, "metrics": {"loss": loss, "learning_rate": 1e-4}}
        rows.append(
            {
                "job_id": job.id,
                "sequence": job.last_sequence + step,
                "time_us": job.create_us + step * 1000,
                "attempt": job.attempt,
                "kind": "progress",
                "payload": payload,
            }
        )
    with store.database.write() as connection:
        connection.execute(sa.insert(t.events), rows)
        values = {"last_sequence": job.last_sequence + count, "step": count}
        connection.execute(sa.update(t.jobs).filter_by(id=job.id).values(**values))


def begin(store: JobStore) -> AttemptStore:
    """Begin the next job of the queue on a worker of another server, and return its hand on the store."""
    job = store.begin_attempt("local", "elsewhere")
    assert job is not None
    attempt = store.attempt(job.name, job.attempt, job.fencing_token)
    attempt.register("1:1")
    attempt.move(JobState.RUNNING)
    return attempt


def tell(attempt: AttemptStore, step: int, total_steps: int, metrics: Mapping[str, Any]) -> None:
    """Record a step."""
    attempt.progress(step=step, payload={"step": step, "total_steps": total_steps, "metrics": dict(metrics)})


def measures(step: int, total_steps: int, seed: int = 0) -> dict[str, Any]:
    """Return made-up numbers of a pretraining step, of the shapes that real ones have."""
    noise = random.Random(f"{seed} {step}")  # noqa: S311 - made-up numbers
    share = step / total_steps
    loss = 3.1 + 6.2 * math.exp(-7 * share) + noise.gauss(0, 0.07)
    deep = max(0.02, 0.42 - 0.25 * share)
    bins = [max(0.01, noise.gauss(deep * (1 - deep) ** at, 0.008)) for at in range(8)]
    found: dict[str, Any] = {
        "loss": loss,
        "learning_rate": 7.5e-4 * min(1.0, step / 40) * (0.5 + 0.5 * math.cos(math.pi * share)),
        "mean_ponder_steps": 3.4 + 1.2 * share + noise.gauss(0, 0.08),
        "halting_histogram": [one / sum(bins) for one in bins],
        "memory_slot_utilization_ratio": min(1.0, 0.2 + 1.3 * share + noise.gauss(0, 0.01)),
        "slow_gradient_norm_ratio": 0.1 + 0.35 * (1 - math.exp(-4 * share)) + noise.gauss(0, 0.01),
        "slow_gradient_cosine": 0.05 + 0.2 * (1 - math.exp(-4 * share)) + noise.gauss(0, 0.015),
        "gradient_norm": 1.1 + 3 * math.exp(-9 * share) + abs(noise.gauss(0, 0.12)),
        "grokfast_lambda": 2.0 * min(1.0, step / 40),
        "tokens_per_s": noise.gauss(5200, 130),
        "peak_memory_bytes": 1_470_000_000 + step * 40_000,
        "seconds_left": (total_steps - step) * 0.41,
    }
    if step % 40 == 0:
        found |= {"validation_loss": loss + 0.12, "validation_loss_memory_off": loss + 0.31}
    return found


RECOVERY: Mapping[str, Any] = {
    "kind": "recovery",
    "message": "step 180: loss_trend, restart_slow_gradient",
    "facts": {
        "step": "180",
        "detector": "loss_trend",
        "evidence": '{"slope": 0.021, "window": 60, "z": 4.2}',
        "action": "restart_slow_gradient",
        "before": '{"lambda": 2.0}',
        "after": '{"lambda": 1.0}',
        "budget_left": "2",
        "budget_left_in_all": "5",
    },
}
