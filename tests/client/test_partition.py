"""The link between the services fails: how many calls are spent on it, when it is used again, who notices."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cognate_server.rpc.models import ModelServicer
from cognateforge import exceptions
from cognateforge.agent.v1 import training_pb2
from cognateforge.client import AsyncAgentClient, AsyncCognateClient, CallBreaker, CognateClient
from cognateforge.client.breaker import EARLIEST_PROBE, RESET_TIMEOUT_S
from cognateforge.client.channel import MAX_RECONNECT_BACKOFF_MS
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.client.fakes import JOB, Fake
from tests.support.proxy import FaultyProxy
from tests.support.servers import running_agent, running_cognate
from tests.support.waiting import until

CALLERS = 32
FAIL_MAX = 5
# A fifth of the real ones, so that their relation holds: see test_a_probe_comes_after_a_reconnect.
RESET_S, RECONNECT_MS = RESET_TIMEOUT_S / 5, MAX_RECONNECT_BACKOFF_MS // 5
TIMEOUT_S = 0.5
# What one caller does between two calls that were refused, as a worker would.
PACE_S = 0.005


class Callers:
    """Many callers of one client, in threads or in tasks, until they are stopped."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @asynccontextmanager
    async def of(
        self, kind: str, address: str, call: Call, breaker: CallBreaker, *, timeout_s: float = TIMEOUT_S
    ) -> AsyncIterator[None]:
        """Let them call."""
        if kind == "sync":
            with CognateClient(address, breaker=breaker, timeout_s=timeout_s) as client:
                pool = ThreadPoolExecutor(CALLERS)
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(pool, self._connect, lambda: call(client))
                running = [loop.run_in_executor(pool, self._in_thread, lambda: call(client)) for _ in range(CALLERS)]
                yield
                self._stopping.set()
                await asyncio.gather(*running)
                pool.shutdown()
        else:
            async with AsyncCognateClient(address, breaker=breaker, timeout_s=timeout_s) as aio_client:
                await self._once(lambda: call(aio_client))  # a channel's first call takes longer than others may
                tasks = [asyncio.create_task(self._in_task(lambda: call(aio_client))) for _ in range(CALLERS)]
                yield
                self._stopping.set()
                await asyncio.gather(*tasks)

    def count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def _connect(self, call: Callable[[], Any]) -> None:
        """Make one call before all of them begin at once: a channel's first takes longer than the others may."""
        try:
            call()
            self.count("OK")
        except exceptions.ForgeError as error:
            self.count(error.reason_name())

    def _in_thread(self, call: Callable[[], Any]) -> None:
        while not self._stopping.is_set():
            try:
                call()
                self.count("OK")
            except exceptions.ForgeError as error:
                self.count(error.reason_name())
            self._stopping.wait(PACE_S)

    async def _in_task(self, call: Callable[[], Awaitable[Any]]) -> None:
        while not self._stopping.is_set():
            await self._once(call)
            await asyncio.sleep(PACE_S)

    async def _once(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            await call()
            self.count("OK")
        except exceptions.ForgeError as error:
            self.count(error.reason_name())


Call = Callable[[Any], Any]


class Changes:
    """What a breaker told, with its probes at each moment."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int]] = []
        self.breaker = CallBreaker(
            "cognate", fail_max=FAIL_MAX, reset_timeout_s=RESET_S, on_state_change=self._on_state_change
        )

    def _on_state_change(self, name: str, before: str, after: str) -> None:
        self.told.append((before, after, self.breaker.snapshot().probes))

    async def until(self, before: str, after: str, *, times: int = 1) -> None:
        """Wait for a change to have come so often."""
        await until(lambda: self._count(before, after) >= times, timeout_s=30)

    async def until_probes_failed(self, times: int) -> None:
        """Wait for so many probes to have failed, and for none to be under way: it would find the link healed."""
        await until(lambda: self._count("half-open", "open") >= times and self.told[-1][1] == "open", timeout_s=30)

    def _count(self, before: str, after: str) -> int:
        return sum(change[:2] == (before, after) for change in self.told)


def get_model(client: Any) -> Any:
    """What the agent service asks first. There is no model: the answer is NOT_FOUND, and it is an answer."""
    return client.models.GetModel(model_pb2.GetModelRequest(name="cognate-25m"))


def get_job(client: Any) -> Any:
    """A call that is safe to repeat."""
    return client.pretraining.GetJob(pretraining_pb2.GetJobRequest(name=JOB))


def start(**more: Any) -> training_pb2.StartTrainingRequest:
    """Return a submission that names a foundation."""
    plan = training_pb2.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name="cognate-25m"),
        classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=5)),
        adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
        total_steps=3,
        **more,
    )
    return training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)


def test_a_probe_comes_after_a_reconnect() -> None:
    """gRPC tries to connect more often than a breaker probes: one probe is enough once a connection is possible."""
    longest_reconnect_s = MAX_RECONNECT_BACKOFF_MS / 1000 * 1.2  # gRPC's jitter
    assert longest_reconnect_s < EARLIEST_PROBE * RESET_TIMEOUT_S


@pytest.mark.parametrize("fault", ["partition", "refuse"])
async def test_a_lost_link_costs_few_calls_and_one_probe_finds_it_again(
    kind: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 callers, one breaker: it opens, nothing reaches Cognate, one probe closes it; both services serve on."""
    reached: list[float] = []
    original = ModelServicer.GetModel

    async def counted(self: ModelServicer, request: Any, context: Any) -> Any:
        reached.append(time.monotonic())
        return await original(self, request, context)

    monkeypatch.setattr(ModelServicer, "GetModel", counted)
    monkeypatch.setattr("cognateforge.client.channel.MAX_RECONNECT_BACKOFF_MS", RECONNECT_MS)
    changes, callers = Changes(), Callers()
    async with running_cognate(tmp_path / "cognate") as cognate:
        proxy = FaultyProxy(int(cognate.address.rpartition(":")[2]))
        endpoint = {"address": proxy.address, "ask_within_s": 0.3}
        try:
            async with (
                running_agent(tmp_path / "agent", cognate=endpoint) as agent,
                AsyncCognateClient(cognate.address) as operators,
                AsyncAgentClient(agent.address) as users,
                callers.of(kind, proxy.address, get_model, changes.breaker),
            ):
                await until(lambda: callers.outcomes["MODEL_NOT_FOUND"] >= 100)
                # The first of so many callers at once may come too late, and the circuit with them. All answer now.
                callers.outcomes.clear()
                changes.told.clear()
                await until(lambda: callers.outcomes["MODEL_NOT_FOUND"] >= 100)
                assert {"MODEL_NOT_FOUND"} == set(callers.outcomes)

                before, connections = changes.breaker.snapshot(), proxy.connections
                lost, late = time.monotonic(), callers.outcomes["MODEL_NOT_FOUND"]
                getattr(proxy, fault)()
                await changes.until("closed", "open")
                late = callers.outcomes["MODEL_NOT_FOUND"] - late
                opened_s = time.monotonic() - lost
                waits_s = [await served(operators, users) for _ in range(3)]
                await changes.until_probes_failed(2)
                during = changes.breaker.snapshot()
                calls_during = sum(moment > lost + 0.1 for moment in reached)
                connections = proxy.connections - connections

                at_heal = len(reached)
                proxy.heal()
                # One that had set out before may fail yet.
                probes = changes.breaker.snapshot().probes
                await changes.until("half-open", "closed")
                closing = next(change for change in changes.told if change[1] == "closed")
                answers = callers.outcomes["MODEL_NOT_FOUND"]
                await until(lambda: callers.outcomes["MODEL_NOT_FOUND"] >= answers + 100)
        finally:
            proxy.close()
    lost_calls = during.failed - before.failed - during.probes
    with capsys.disabled():
        print(
            f"\n  {fault}, {kind}, {CALLERS} callers: opened after {opened_s:.2f} s, {lost_calls} calls were lost; "
            f"{during.refused} refused, {during.probes} probes, {connections} connections, {calls_during} calls at "
            f"Cognate during the outage; closed by {closing[2] - probes} probe; slowest own user {max(waits_s):.2f} s"
        )
    assert changes.told[0][:2] == ("closed", "open")
    # Five in a row open it. Those that were under way beside them are lost too, and so are what the first ones tried
    # next. An answer that was still on its way makes it count anew, after four failures at most.
    most = CALLERS + FAIL_MAX + (FAIL_MAX - 1) * late
    assert FAIL_MAX <= lost_calls <= most
    assert during.admitted - before.admitted - during.probes <= most + late
    assert during.refused > 10 * CALLERS
    assert calls_during == 0
    # Probes' own tries, and those of the agent service's three questions, which have channels of their own.
    assert connections <= 24
    assert closing[2] - probes == 1
    assert len(reached) - at_heal >= 100
    assert max(waits_s) < 5


async def served(operators: AsyncCognateClient, users: AsyncAgentClient) -> float:
    """Return how long both services took for a user of their own; a submission is taken in without Cognate."""
    started = time.monotonic()
    await operators.pretraining.GetServerInfo(pretraining_pb2.GetServerInfoRequest())
    job = (await users.training.StartTraining(start())).job.job
    assert job.state == job_pb2.JOB_STATE_QUEUED
    return time.monotonic() - started


async def test_retries_do_not_add_to_an_outage(kind: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that only says UNAVAILABLE sees each caller about once, then a probe now and then."""
    fake.script.always = grpc.StatusCode.UNAVAILABLE
    changes, callers = Changes(), Callers()
    async with callers.of(kind, fake.address, get_job, changes.breaker):
        await changes.until("half-open", "open", times=3)
        counts, seen = changes.breaker.snapshot(), len(fake.script.calls)
    with capsys.disabled():
        print(
            f"\n  UNAVAILABLE, {kind}, {CALLERS} callers: {counts.refused + counts.admitted} calls wanted, "
            f"{counts.admitted} sent, {counts.probes} of them probes; {seen} attempts at the server"
        )
    # Without a budget each call would be four attempts.
    assert counts.admitted <= CALLERS + FAIL_MAX + counts.probes
    assert seen <= counts.admitted + 3 * FAIL_MAX
    assert counts.refused > 10 * counts.admitted


async def test_many_callers_wait_for_one_probe(kind: str, fake: Fake) -> None:
    """While the probe of a half-open circuit is on its way, 32 callers send nothing; then all are answered."""
    fake.script.always = grpc.StatusCode.INTERNAL
    changes, callers = Changes(), Callers()
    # A probe that ran out of time would be followed by another one.
    async with callers.of(kind, fake.address, get_job, changes.breaker, timeout_s=30):
        await changes.until("closed", "open")
        # Those that were under way have ended.
        await until(lambda: callers.outcomes["INTERNAL"] == changes.breaker.snapshot().admitted)
        seen = len(fake.script.calls)
        fake.script.always, fake.script.gate = None, threading.Event()
        while fake.script.arrived.acquire(blocking=False):
            pass
        assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=10)
        refused = changes.breaker.snapshot().refused
        await until(lambda: changes.breaker.snapshot().refused >= refused + 2 * CALLERS)
        assert len(fake.script.calls) == seen + 1
        fake.script.gate.set()
        fake.script.gate = None
        await changes.until("half-open", "closed")
        answered = callers.outcomes["OK"]
        await until(lambda: callers.outcomes["OK"] >= answered + CALLERS)
    assert (changes.breaker.snapshot().opened, changes.breaker.snapshot().probes) == (1, 1)


@pytest.mark.slow
async def test_an_agent_job_waits_for_cognate_and_goes_on(tmp_path: Path) -> None:
    """Real services and workers: the job gives its slot back and says so, is paused at once, and later asks again."""
    services = Services(tmp_path)
    async with running_cognate(tmp_path / "cognate") as cognate:
        proxy = FaultyProxy(int(cognate.address.rpartition(":")[2]))
        proxy.refuse()
        settings = {"COGNATE__ADDRESS": proxy.address, "COGNATE__HOLD_SLOT_S": "0", "COGNATE__ASK_WITHIN_S": "0.2"}
        try:
            agent = await asyncio.to_thread(services.start, "agent_server", address="127.0.0.1:0", settings=settings)
            async with AsyncAgentClient(agent.address) as users:
                steer = {"name": (await users.training.StartTraining(start())).job.job.name}
                waits, paused = [], None
                async for frame in users.watch_job(steer["name"]):
                    if frame.event.note.kind == "waiting_for_cognate":
                        waits.append(frame.event.note)
                    if paused is None and waits and frame.event.state_change.to == job_pb2.JOB_STATE_QUEUED:
                        request = training_pb2.PauseJobRequest(**steer, request_id=str(uuid.uuid4()))
                        paused = (await users.training.PauseJob(request)).job.job
                        proxy.heal()
                        again = training_pb2.ResumeJobRequest(**steer, request_id=str(uuid.uuid4()))
                        await users.training.ResumeJob(again)
                end = (await users.training.GetJob(training_pb2.GetJobRequest(**steer))).job.job
        finally:
            await asyncio.to_thread(services.stop)
            proxy.close()
    assert waits[0].message.startswith("waits for Cognate and is not tried again before ")
    assert paused is not None
    assert paused.state == job_pb2.JOB_STATE_PAUSED
    # Cognate has no such model: that answer is what the job went on for.
    assert (end.state, end.failure.reason) == (job_pb2.JOB_STATE_FAILED, "MODEL_NOT_FOUND")
    assert (end.attempt, len(waits)) == (2, 1)
