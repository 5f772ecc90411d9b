"""Servers in Consul, and clients that find them there: real servers, real clients, the double in between."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cognateforge import exceptions
from cognateforge.client import AsyncCognateClient, ConsulDiscovery
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.support.consul_double import ConsulDouble, FakeClock
from tests.support.servers import running_agent, running_cognate
from tests.support.waiting import until
from training_common.discovery import Registration, advertised
from training_common.rpc.health import HealthMonitor
from training_common.rpc.server import RunningServer
from training_common.settings import ConsulSettings

RIGHT, WRONG = "right", "wrong"


@pytest.fixture
def consul() -> Iterator[ConsulDouble]:
    """A Consul that knows nothing yet."""
    double = ConsulDouble()
    yield double
    double.close()


def entry(consul: ConsulDouble, **more: Any) -> dict[str, Any]:
    """Return the settings of a server that registers at the double, with a short TTL."""
    return {"service": "cognate", "port": consul.port, "ttl_s": 1, **more}


def id_of(server: RunningServer, service: str = "cognate") -> str:
    """Return the id under which a server is registered."""
    return f"{service}-{server.address.replace(':', '-')}"


@asynccontextmanager
async def discovered(consul: ConsulDouble, **more: Any) -> AsyncIterator[tuple[ConsulDiscovery, AsyncCognateClient]]:
    """Open a client that looks in Consul."""
    found = ConsulDiscovery("cognate", host="127.0.0.1", port=consul.port, retry_s=0.02, wait_s=5, **more)
    try:
        async with AsyncCognateClient(found) as client:
            yield found, client
    finally:
        await asyncio.to_thread(found.close)


async def a_job(client: AsyncCognateClient) -> str:
    """Submit a job and return its name: only the server that took it knows it."""
    plan = pb.PretrainingPlan(total_steps=2, batch_size=2, sequence_length=64)
    request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    return (await client.pretraining.StartPretraining(request)).job.job.name


async def knows(client: AsyncCognateClient, job: str) -> bool:
    """Return whether the server that answered is the one that took the job."""
    try:
        await client.pretraining.GetJob(pb.GetJobRequest(name=job))
    except exceptions.JobNotFoundError:
        return False
    return True


async def job_at(server: RunningServer) -> str:
    """Submit a job to one server."""
    async with AsyncCognateClient(server.address) as client:
        return await a_job(client)


async def test_a_client_finds_a_server_by_its_name(consul: ConsulDouble, tmp_path: Path) -> None:
    """With its tags and address; a client that asks for another tag, or too briefly, is told so."""
    async with running_cognate(tmp_path, consul=entry(consul, tags=["blue"])) as server:
        async with discovered(consul, tag="blue") as (found, client):
            assert found.addresses() == (server.address,)
            assert await client.health() == "SERVING"
        with pytest.raises(exceptions.UnavailableError, match="no passing instance of cognate within"):
            async with discovered(consul, tag="green", first_answer_s=0.2):
                raise AssertionError
        assert consul.status_of(id_of(server)) == "passing"
    assert consul.services == {}


async def test_both_services_register(consul: ConsulDouble, tmp_path: Path) -> None:
    """Each under the name that its settings give."""
    agent_entry = entry(consul, service="agents", advertise="localhost")
    async with (
        running_cognate(tmp_path / "c", consul=entry(consul)) as cognate,
        running_agent(tmp_path / "a", consul=agent_entry) as agent,
    ):
        port = int(agent.address.rpartition(":")[2])
        await until(lambda: consul.status_of(f"agents-localhost-{port}") == "passing")
        await until(lambda: consul.status_of(id_of(cognate)) == "passing")
        assert ("localhost", port) == (consul.services[f"agents-localhost-{port}"].address, port)


async def test_a_server_whose_store_fails_is_left(consul: ConsulDouble, tmp_path: Path) -> None:
    """Its check turns critical, and clients move to the other instance; no call fails on the way."""
    async with (
        running_cognate(tmp_path / "a", consul=entry(consul)) as first,
        running_cognate(tmp_path / "b", consul=entry(consul)) as second,
    ):
        at_second = await job_at(second)
        await until(lambda: consul.status_of(id_of(first)) == consul.status_of(id_of(second)) == "passing")
        async with discovered(consul) as (found, client):
            await until(lambda: len(client.addresses) == 2)
            store = tmp_path / "a" / "store.db"
            store.rename(tmp_path / "a" / "gone.db")
            store.mkdir()
            await until(lambda: consul.status_of(id_of(first)) == "critical")
            await until(lambda: found.addresses() == client.addresses == (second.address,))
            assert [True] * 20 == [await knows(client, at_second) for _ in range(20)]
            store.rmdir()
            (tmp_path / "a" / "gone.db").rename(store)
            await until(lambda: len(client.addresses) == 2)


async def test_no_call_fails_while_a_server_drains(
    consul: ConsulDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is out of Consul before its health says so and before the notice wait; some hundred calls run meanwhile."""
    told: list[tuple[str, bool]] = []
    drain = HealthMonitor.drain

    async def noted(self: HealthMonitor) -> None:
        told.append(("drain", len(consul.services) == 1))
        await drain(self)

    outcomes: list[str] = []
    stopping = asyncio.Event()

    async def call_on(client: AsyncCognateClient) -> None:
        while not stopping.is_set():
            try:
                await client.pretraining.GetServerInfo(pb.GetServerInfoRequest())
                outcomes.append("OK")
            except exceptions.ForgeError as error:
                outcomes.append(error.reason_name())

    async with (
        running_cognate(tmp_path / "b", consul=entry(consul)) as staying,
        running_cognate(tmp_path / "a", consul=entry(consul), drain_grace_s=5) as leaving,
    ):
        await until(lambda: consul.status_of(id_of(leaving)) == consul.status_of(id_of(staying)) == "passing")
        async with discovered(consul) as (_, client):
            await until(lambda: len(client.addresses) == 2)
            callers = [asyncio.create_task(call_on(client)) for _ in range(8)]
            await until(lambda: len(outcomes) >= 100)
            monkeypatch.setattr(HealthMonitor, "drain", noted)
            before = len(outcomes)
            await leaving.stop()
            during = len(outcomes) - before
            await until(lambda: client.addresses == (staying.address,))
            after = len(outcomes)
            await until(lambda: len(outcomes) >= after + 100)
            stopping.set()
            await asyncio.gather(*callers)
        monkeypatch.undo()
        leaving.stop = _nothing  # type: ignore[method-assign]
    assert told == [("drain", True)]
    with capsys.disabled():
        print(
            f"\n  calls {len(outcomes)}, of them {during} during the drain,"
            f" failed {len(outcomes) - outcomes.count('OK')}"
        )
    assert during > 50
    assert {"OK"} == set(outcomes)


async def _nothing() -> None:
    """Stand for a stop that was done before."""


async def test_a_server_that_is_not_serving_gets_no_calls(tmp_path: Path) -> None:
    """Round robin over a list leaves out who says NOT_SERVING, without Consul."""
    async with running_cognate(tmp_path / "a") as ill, running_cognate(tmp_path / "b") as well:
        at_ill = await job_at(ill)
        async with AsyncCognateClient([ill.address, well.address]) as client:

            async def both_answer() -> bool:
                return {True, False} == {await knows(client, at_ill) for _ in range(10)}

            async with asyncio.timeout(10):
                while not await both_answer():
                    pass
            await ill._health.give_up()
            async with asyncio.timeout(10):
                while True in [await knows(client, at_ill) for _ in range(10)]:
                    pass
            assert [False] * 100 == [await knows(client, at_ill) for _ in range(100)]


async def test_a_server_needs_no_consul(consul: ConsulDouble, tmp_path: Path) -> None:
    """Away at the start, broken, and forgetful: the server serves all the time, and is registered in the end."""
    consul.stop()
    async with running_cognate(tmp_path, consul=entry(consul)) as server:
        async with AsyncCognateClient(server.address) as client:
            assert await client.health() == "SERVING"
            consul.start()
            await until(lambda: consul.status_of(id_of(server)) == "passing")
            with consul.breakage():
                seen = len(consul.queries)
                await until(lambda: len(consul.queries) > seen)
                assert await client.health() == "SERVING"
            await until(lambda: consul.status_of(id_of(server)) == "passing")
            consul.forget()
            await until(lambda: consul.status_of(id_of(server)) == "passing")
            assert await client.health() == "SERVING"
        consul.stop()
        started = time.monotonic()
    assert time.monotonic() - started < 10


async def test_a_refused_token_is_told_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log says so; the right token, from the settings, is sent with every call."""
    guarded = ConsulDouble(token=RIGHT)
    try:
        async with running_cognate(tmp_path / "a", consul=entry(guarded, token=WRONG)) as server:
            await until(lambda: any(path.endswith("/register") for _, path, _ in guarded.queries))
            async with AsyncCognateClient(server.address) as client:
                assert await client.health() == "SERVING"
            assert guarded.services == {}
        async with running_cognate(tmp_path / "b", consul=entry(guarded, token=RIGHT)) as server:
            await until(lambda: guarded.status_of(id_of(server)) == "passing")
            async with discovered(guarded, token=RIGHT) as (found, _):
                assert found.addresses() == (server.address,)
        assert guarded.services == {}
    finally:
        guarded.close()
    assert "ACLPermissionDenied" in capsys.readouterr().out


def registration(consul: ConsulDouble, serving: Callable[[], bool], **more: Any) -> Registration:
    """Return a registration without a server."""
    settings = ConsulSettings.model_validate(entry(consul, **more))
    return Registration(settings, host="10.0.0.7", port=7101, serving=serving, look_s=0.01)


async def test_a_server_that_died_turns_critical_and_is_dropped_later() -> None:
    """Nothing deregistered it: its silence does. After its restart the same entry is used again."""
    clock = FakeClock()
    consul = ConsulDouble(clock=clock)
    try:
        dead = registration(consul, lambda: True, deregister_critical_after_s=60)
        dead.start()
        await until(lambda: consul.status_of(dead.id) == "passing")
        dead._closed.set()  # what kill -9 does to the thread
        await asyncio.to_thread(dead._thread.join)
        clock.now += 2
        assert consul.status_of(dead.id) == "critical"
        again = registration(consul, lambda: True)
        again.start()
        await until(lambda: consul.status_of(again.id) == "passing")
        assert [dead.id] == list(consul.services)
        again._closed.set()
        await asyncio.to_thread(again._thread.join)
        clock.now += 2
        assert consul.status_of(dead.id) == "critical"
        clock.now += 631
        assert consul.status_of(dead.id) == ""
    finally:
        consul.close()


async def test_health_reaches_consul_before_the_next_beat(consul: ConsulDouble) -> None:
    """With a TTL of an hour a change would otherwise take twenty minutes."""
    serving = threading.Event()
    one = registration(consul, serving.is_set, ttl_s=3600)
    one.start()
    await until(lambda: one.id in consul.services)
    assert consul.status_of(one.id) == "critical"
    serving.set()
    await until(lambda: consul.status_of(one.id) == "passing")
    serving.clear()
    await until(lambda: consul.status_of(one.id) == "critical")
    await asyncio.to_thread(one.close)
    assert consul.services == {}


async def test_an_event_loop_that_hangs_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of health that is old counts as none: the thread that beats would go on for a hung server."""
    async with running_cognate(tmp_path) as server:
        assert server._health.serving
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 20)
        assert not server._health.serving
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("advertise", "address", "expected"),
    [
        ("", "127.0.0.1:7101", ("127.0.0.1", 7101)),
        ("", "[::1]:7101", ("::1", 7101)),
        ("cognate.internal", "0.0.0.0:7101", ("cognate.internal", 7101)),
        ("cognate.internal:443", "0.0.0.0:7101", ("cognate.internal", 443)),
        ("10.0.0.7:443", "unix:/run/s", ("10.0.0.7", 443)),
        ("[fd00::7]:443", "[::]:7101", ("fd00::7", 443)),
        ("[fd00::7]", "[::]:7101", ("fd00::7", 7101)),
        ("fd00::7", "[::]:7101", ("fd00::7", 7101)),
    ],
)
def test_what_is_advertised(advertise: str, address: str, expected: tuple[str, int]) -> None:
    """The host and port that clients dial; the port is the bound one where none is given."""
    assert expected == advertised(ConsulSettings(service="s", advertise=advertise), address)
