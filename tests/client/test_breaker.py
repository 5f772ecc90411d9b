"""The breaker opens after repeated failures, lets one probe through, and closes on its answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

import grpc
import grpc.aio
import pytest

from cognateforge import exceptions
from cognateforge.client import BreakerSnapshot, CallBreaker
from cognateforge.client.breaker import FAILURES
from tests.client.fakes import Driver, Fake, driver

RESET_S = 0.15


def breaker() -> CallBreaker:
    """Return a breaker that a test can wait for."""
    return CallBreaker("test", fail_max=3, reset_timeout_s=RESET_S)


async def trip(client: Driver, fake: Fake) -> None:
    """Fail until the breaker opens."""
    fake.script.always = grpc.StatusCode.INTERNAL
    for _ in range(3):
        with pytest.raises(exceptions.InternalError):
            await client.get_job()
    assert client.cognate.breaker_state == "open"


async def until_half_open() -> None:
    """Wait until the reset timeout has passed."""
    await asyncio.sleep(RESET_S * 1.2)


async def test_an_open_circuit_sends_nothing(kind: str, fake: Fake) -> None:
    """CircuitOpenError for unary calls and streams, which tells why; the server sees none of them."""
    async with driver(kind, fake.address, breaker=CallBreaker("the service", fail_max=3, reset_timeout_s=60)) as client:
        await trip(client, fake)
        seen = len(fake.script.calls)
        for call in (client.get_job, client.stream):
            with pytest.raises(exceptions.CircuitOpenError, match=r"the last one INTERNAL.*; try again in 60 s"):
                await call()
        assert seen == len(fake.script.calls)


async def test_one_good_probe_closes_the_circuit(kind: str, fake: Fake) -> None:
    """After the reset timeout a single answer is enough."""
    async with driver(kind, fake.address, breaker=breaker()) as client:
        await trip(client, fake)
        fake.script.always = None
        await until_half_open()
        await client.get_job()
        assert client.cognate.breaker_state == "closed"


async def test_a_bad_probe_opens_it_again(kind: str, fake: Fake) -> None:
    """One failure in the half-open state is enough."""
    async with driver(kind, fake.address, breaker=breaker()) as client:
        await trip(client, fake)
        await until_half_open()
        with pytest.raises(exceptions.InternalError):
            await client.get_job()
        with pytest.raises(exceptions.CircuitOpenError):
            await client.get_job()


@pytest.mark.parametrize("probe", ["unary", "stream"])
async def test_only_one_probe_goes_at_a_time(kind: str, fake: Fake, probe: str) -> None:
    """While the probe is out, everybody else is held back."""
    async with driver(kind, fake.address, breaker=CallBreaker(fail_max=3, reset_timeout_s=0.4)) as client:
        await trip(client, fake)
        fake.script.always, fake.script.gate = None, threading.Event()
        await asyncio.sleep(0.45)
        first = asyncio.create_task(client.get_job() if probe == "unary" else client.stream())
        assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=5)
        others = await asyncio.gather(*(client.get_job() for _ in range(8)), return_exceptions=True)
        assert {exceptions.CircuitOpenError} == {type(other) for other in others}
        assert len(fake.script.calls) == 3 + 1
        fake.script.gate.set()
        await first
        assert client.cognate.breaker_state == "closed"


async def test_a_cancelled_probe_does_not_close_the_circuit(fake: Fake) -> None:
    """A call without an outcome proves nothing, and it gives its place to the next probe."""
    async with driver("aio", fake.address, breaker=breaker()) as client:
        await trip(client, fake)
        fake.script.always, fake.script.gate = None, threading.Event()
        await until_half_open()
        probe = asyncio.create_task(client.get_job())
        assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=5)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        with pytest.raises(exceptions.CircuitOpenError):
            await client.get_job()
        fake.script.gate.set()
        fake.script.gate = None
        await until_half_open()
        await client.get_job()
        assert client.cognate.breaker_state == "closed"


def test_a_silent_probe_does_not_block_the_next_one() -> None:
    """A stream that nobody reads keeps its place for one reset timeout at most."""
    one = CallBreaker(fail_max=1, reset_timeout_s=0.05)
    one.admit().failed(failure())
    time.sleep(0.06)
    silent = one.admit()
    with pytest.raises(exceptions.CircuitOpenError):
        one.admit()
    time.sleep(0.06)
    one.admit().answered()
    assert one.state == "closed"
    silent.abandoned()


def test_streams_that_break_with_their_connection_count_once() -> None:
    """A server that leaves ends all of them in one moment. Whether it is away is said by what is opened after that."""
    one = CallBreaker(fail_max=3)
    streams = [one.admit() for _ in range(50)]
    for stream in streams:
        stream.answered()
    for stream in streams:
        stream.failed(failure())
    assert ("closed", 1) == (one.state, one.snapshot().failures_in_a_row)
    for expected in ("closed", "open"):
        one.admit().failed(failure())
        assert expected == one.state


def failure() -> grpc.RpcError:
    """Return what gRPC raises when a service is away."""
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())


async def test_failures_must_come_in_a_row(kind: str, fake: Fake) -> None:
    """An answer between two failures starts the count again."""
    async with driver(kind, fake.address, breaker=breaker()) as client:
        for _ in range(3):
            fake.script.failures = deque([grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL])
            for _ in range(2):
                with pytest.raises(exceptions.InternalError):
                    await client.get_job()
            await client.get_job()
        assert client.cognate.breaker_state == "closed"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_only_failures_of_the_service_count(kind: str, fake: Fake, code: grpc.StatusCode) -> None:
    """A refusal is an answer; unary calls and streams are judged alike."""
    fake.script.always = code
    for method in ("get_job", "stream"):
        async with driver(kind, fake.address, breaker=CallBreaker(fail_max=1, reset_timeout_s=60)) as client:
            with pytest.raises(exceptions.ForgeError):
                await getattr(client, method)()
            assert ("open" if code in FAILURES else "closed") == client.cognate.breaker_state


async def test_a_stream_that_breaks_later_counts(kind: str, fake: Fake) -> None:
    """Frames before the failure do not hide it."""
    fake.history.cuts = deque([3])
    async with driver(kind, fake.address, breaker=CallBreaker(fail_max=1, reset_timeout_s=60)) as client:
        with pytest.raises(exceptions.UnavailableError):
            await client.stream()
        assert client.cognate.breaker_state == "open"


async def test_a_stream_that_ends_at_its_own_deadline_does_not_count(kind: str, fake: Fake) -> None:
    """A watch's stream lives for a while and is opened again: that is no illness."""
    fake.history.pause_before_end = threading.Event()
    async with driver(kind, fake.address, breaker=CallBreaker(fail_max=1, reset_timeout_s=60)) as client:
        with pytest.raises(exceptions.DeadlineExceededError):
            await client.stream(timeout=0.3)
        assert client.cognate.breaker_state == "closed"
    fake.history.pause_before_end.set()


async def test_every_change_of_state_is_told(kind: str, fake: Fake) -> None:
    """In order, with the breaker's name, and outside its locks: the callback may ask the breaker and even call."""
    told: list[tuple[str, str, str]] = []
    asked: list[str] = []

    def on_state_change(name: str, before: str, after: str) -> None:
        told.append((name, before, after))
        asked.append(one.snapshot().state)
        raise RuntimeError("a metric that is broken breaks no call")

    one = CallBreaker("cognate", fail_max=3, reset_timeout_s=RESET_S, on_state_change=on_state_change)
    async with driver(kind, fake.address, breaker=one) as client:
        await trip(client, fake)
        await until_half_open()
        with pytest.raises(exceptions.InternalError):
            await client.get_job()
        fake.script.always = None
        await until_half_open()
        await client.get_job()
    half = [("cognate", "open", "half-open"), ("cognate", "half-open", "open")]
    ends = [("cognate", "open", "half-open"), ("cognate", "half-open", "closed")]
    assert told == [("cognate", "closed", "open"), *half, *ends]
    assert asked == ["open", "half-open", "open", "half-open", "closed"]


async def test_counts_can_be_exported(kind: str, fake: Fake) -> None:
    """What was sent, refused, failed and probed; the server saw exactly what counts as admitted."""
    async with driver(kind, fake.address, breaker=breaker()) as client:
        assert client.cognate.breaker_snapshot() == BreakerSnapshot(name="test", state="closed", failures_in_a_row=0)
        await client.get_job()
        await trip(client, fake)
        for call in (client.get_job, client.stream):
            with pytest.raises(exceptions.CircuitOpenError):
                await call()
        expected = BreakerSnapshot(
            name="test", state="open", failures_in_a_row=3, admitted=4, refused=2, failed=3, opened=1
        )
        assert client.cognate.breaker_snapshot() == expected
        fake.script.always = None
        await until_half_open()
        await client.get_job()
        counts = client.cognate.breaker_snapshot()
        assert (counts.state, counts.admitted, counts.probes, counts.failures_in_a_row) == ("closed", 5, 1, 0)
        assert counts.admitted == len(fake.script.calls)


def test_clients_that_were_held_back_together_do_not_probe_together() -> None:
    """Each breaker draws its own pause every time that it opens, never longer than the reset timeout."""
    drawn = []
    for _ in range(20):
        one = CallBreaker(fail_max=1, reset_timeout_s=10)
        one.admit().failed(failure())
        drawn.append(one._breaker.reset_timeout)
    assert len(set(drawn)) == 20
    assert min(drawn) >= 8
    assert max(drawn) <= 10


def test_calls_run_side_by_side(fake: Fake) -> None:
    """The breaker holds no lock while a call runs."""
    fake.script.gate = threading.Event()

    async def together() -> None:
        async with driver("sync", fake.address) as client:
            calls = [asyncio.create_task(client.get_job()) for _ in range(4)]
            for _ in calls:
                assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=5)
            assert fake.script.gate is not None
            fake.script.gate.set()
            await asyncio.gather(*calls)

    started = time.monotonic()
    asyncio.run(together())
    assert time.monotonic() - started < 5
