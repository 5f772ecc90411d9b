"""Where a client may dial, and how it moves to other addresses under running calls."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cognateforge import exceptions
from cognateforge.client import AsyncCognateClient, CognateClient, ConsulDiscovery, StaticDiscovery
from cognateforge.client.channel import is_local, target_of
from tests.client.fakes import Fake, driver
from tests.support.consul_double import ConsulDouble
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:7101", True),
        ("127.8.8.8:1", True),
        ("[::1]:7101", True),
        ("localhost:7101", True),
        ("unix:/run/forge.sock", True),
        ("10.0.0.1:7101", False),
        ("0.0.0.0:7101", False),
        ("[::]:7101", False),
        ("cognate.internal:7101", False),
        ("localhost.evil.example:7101", False),
        ("127.0.0.1.evil.example:7101", False),
    ],
)
async def test_plaintext_stays_on_this_machine(kind: str, address: str, local: bool) -> None:
    """Any other address is refused without TLS, before anything is sent, and accepted with it."""
    assert is_local(address) is local
    if local:
        async with driver(kind, address):
            return
    with pytest.raises(exceptions.ClientSetupError, match=r"plaintext to .* is refused"):
        async with driver(kind, ["127.0.0.1:1", address]):
            raise AssertionError
    async with driver(kind, address, tls=grpc.ssl_channel_credentials()):
        pass


@pytest.mark.parametrize("address", ["", " , ", "host", "host:", ":7101", "host:port", "dns:///host:1:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    """The error shows what an address looks like."""
    with pytest.raises(exceptions.ClientSetupError, match="address"):
        CognateClient(address)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
async def test_tls_is_checked_against_the_servers_name(kind: str, fake: Fake, tmp_path: Path) -> None:
    """With the right authority and name calls pass; with another name nothing is sent."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = ("-subj", "/CN=cognate.test", "-addext", "subjectAltName=DNS:cognate.test")
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1")
    subprocess.run([*make, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)  # noqa: ASYNC221
    fake.stop()
    fake.tls = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    fake.start()
    tls = grpc.ssl_channel_credentials(cert.read_bytes())
    async with driver(kind, fake.address, tls=tls, tls_server_name="cognate.test") as client:
        await client.get_job()
    async with driver(kind, fake.address, tls=tls, tls_server_name="evil.test") as client:
        with pytest.raises(exceptions.UnavailableError):
            await client.get_job()
    assert fake.script.count("GetJob") == 1


def test_several_addresses_make_one_target() -> None:
    """gRPC's lists hold numbers of one family."""
    assert target_of(("127.0.0.1:1", "127.0.0.2:2")) == "ipv4:127.0.0.1:1,127.0.0.2:2"
    assert target_of(("[::1]:1", "[::1]:2")) == "ipv6:[::1]:1,[::1]:2"
    with pytest.raises(exceptions.ClientSetupError, match="all IPv4 or all IPv6"):
        target_of(("127.0.0.1:1", "[::1]:2"))


async def test_a_unix_socket_is_an_address(kind: str, fake: Fake, tmp_path: Path) -> None:
    """unix:path works like any other."""
    fake.stop()
    fake.unix_path = tmp_path / "s"
    fake.start()
    async with driver(kind, f"unix:{tmp_path}/s") as client:
        await client.get_job()


async def test_calls_are_spread_over_several_addresses(kind: str, fake: Fake) -> None:
    """Two servers behind one client: both answer, and one that is gone is not missed."""
    other = Fake()
    try:
        async with driver(kind, StaticDiscovery([fake.address, other.address])) as client:
            for _ in range(200):
                await client.get_job()
                if fake.script.count("GetJob") and other.script.count("GetJob"):
                    break
            assert min(fake.script.count("GetJob"), other.script.count("GetJob")) > 0
            fake.stop()
            for _ in range(5):
                await client.get_job()
    finally:
        other.stop()


def test_an_asyncio_client_says_when_it_is_not_open() -> None:
    """A call before `async with` has a clear error."""
    client = AsyncCognateClient("127.0.0.1:1")
    with pytest.raises(exceptions.ClientSetupError, match="async with"):
        client.pretraining.GetJob(None)  # type: ignore[arg-type]


@pytest.fixture
def consul() -> Iterator[ConsulDouble]:
    """A Consul that knows nothing yet."""
    double = ConsulDouble()
    yield double
    double.close()


async def asked_again(consul: ConsulDouble) -> None:
    """Wait until the watch has asked twice from now on: the answer to the first is then known."""
    seen = len(consul.queries)
    await until(lambda: len(consul.queries) > seen + 1)


def discovery(consul: ConsulDouble, **kwargs: Any) -> ConsulDiscovery:
    """Return a discovery with short waits."""
    return ConsulDiscovery("cognate", host="127.0.0.1", port=consul.port, retry_s=0.02, wait_s=0.5, **kwargs)


async def test_a_client_moves_with_its_service(kind: str, fake: Fake, consul: ConsulDouble) -> None:
    """New calls go to the new address, a call that runs finishes at the old one."""
    consul.put_instances("cognate", fake.address)
    other, found = Fake(), discovery(consul)
    try:
        async with driver(kind, found) as client:
            await client.get_job()
            fake.script.gate = threading.Event()
            running = asyncio.create_task(client.get_job())
            assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=5)
            consul.put_instances("cognate", other.address)
            await until(lambda: client.cognate.addresses == (other.address,))
            await client.get_job()
            assert other.script.count("GetJob") == 1
            fake.script.gate.set()
            await running
            assert fake.script.count("GetJob") == 2
    finally:
        found.close()
        other.stop()


async def test_consul_is_asked_with_wait_and_passing(fake: Fake, consul: ConsulDouble) -> None:
    """Only passing instances, and never a blocking query without an end."""
    consul.put_instances("cognate", fake.address)
    found = discovery(consul)
    try:
        assert found.addresses() == (fake.address,)
        await until(lambda: len(consul.queries) >= 2)
        assert {("GET", "/v1/health/service/cognate")} == {(method, path) for method, path, _ in consul.queries}
        (_, _, first), (_, _, second) = consul.queries[:2]
        assert (first["passing"], "index" in first) == ("1", False)
        assert (second["passing"], second["wait"]) == ("1", "500ms")
        assert int(second["index"]) > 1
    finally:
        found.close()


async def test_known_addresses_outlive_a_consul_that_forgets(fake: Fake, consul: ConsulDouble) -> None:
    """Empty lists, errors, and an index that goes back change nothing; the next list does."""
    consul.put_instances("cognate", fake.address)
    found = discovery(consul)
    seen: list[tuple[str, ...]] = []
    found.subscribe(seen.append)
    try:
        assert found.addresses() == (fake.address,)
        consul.put_instances("cognate")
        await asked_again(consul)
        assert found.addresses() == (fake.address,)
        with consul.breakage():
            await asked_again(consul)
            assert found.addresses() == (fake.address,)
        consul.stop()
        consul.forget()
        consul.start()
        await asked_again(consul)
        assert found.addresses() == (fake.address,)
        consul.put_instances("cognate", "127.0.0.1:9")
        await until(lambda: found.addresses() == ("127.0.0.1:9",))
        assert seen[-1] == ("127.0.0.1:9",)
    finally:
        found.close()


def test_a_service_that_consul_does_not_know_is_unavailable(consul: ConsulDouble) -> None:
    """No instance within the time: UnavailableError that names the service."""
    found = discovery(consul, first_answer_s=0.1)
    with pytest.raises(exceptions.UnavailableError, match="no passing instance of cognate"):
        CognateClient(found)
    found.close()


async def test_a_far_address_from_consul_is_refused_without_tls(fake: Fake, consul: ConsulDouble) -> None:
    """A registry cannot talk a client into plaintext over the network: it stays where it was."""
    consul.put_instances("cognate", fake.address)
    found = discovery(consul)
    try:
        async with driver("sync", found) as client:
            consul.put_instances("cognate", "10.1.2.3:7101")
            await until(lambda: found.addresses() == ("10.1.2.3:7101",))
            await client.get_job()
            assert client.cognate.addresses == (fake.address,)
    finally:
        found.close()


async def test_a_closed_client_refuses_calls(kind: str, fake: Fake) -> None:
    """It names what to do about it."""
    async with driver(kind, fake.address) as client:
        await client.get_job()
    with pytest.raises(exceptions.ClientSetupError, match="the client is closed: make another one"):
        await client.get_job()


def test_closing_under_a_call_crashes_nothing() -> None:
    """Also in gRPC, which crashes where a method of a generated stub is bound to a closed channel."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.support.closing_client"]
    assert 0 == subprocess.run(command, timeout=60).returncode
