"""Where a client may dial, and how it moves to other addresses under running calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import grpc
import pytest

from cognateforge import exceptions
from cognateforge.client import AsyncCognateClient, CognateClient, ConsulDiscovery, StaticDiscovery
from cognateforge.client.channel import is_local, target_of
from tests.client.fakes import Fake, driver, until


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


class ConsulDouble:
    """Consul's /v1/health/service with blocking queries, over real HTTP."""

    def __init__(self) -> None:
        self.index = 10
        self.nodes: list[tuple[str, int]] = []
        self.queries: list[dict[str, str]] = []
        self.broken = False
        self._changed = threading.Condition()
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlparse(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
                double.answer(self, url.path, query)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.port = self._server.server_port

    def answer(self, handler: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> None:
        with self._changed:
            self.queries.append({**query, "path": path})
            if "index" in query and not self.broken:
                wait_s = float(query["wait"].removesuffix("ms")) / 1000
                self._changed.wait_for(lambda: self.index > int(query["index"]) or self.broken, wait_s)
            broken, index, nodes = self.broken, self.index, list(self.nodes)
        body = json.dumps(
            [{"Node": {"Address": host}, "Service": {"Address": "", "Port": port}} for host, port in nodes]
        ).encode()
        with contextlib.suppress(BrokenPipeError):
            handler.send_response(500 if broken else 200)
            handler.send_header("X-Consul-Index", str(index))
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

    def change(self, *addresses: str, index: int | None = None, broken: bool = False) -> None:
        """Register exactly these, and wake every query that waits."""
        with self._changed:
            pairs = [address.rpartition(":") for address in addresses]
            self.nodes, self.broken = [(host, int(port)) for host, _, port in pairs], broken
            self.index = self.index + 1 if index is None else index
            self._changed.notify_all()

    def close(self) -> None:
        self.change(broken=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def consul() -> Iterator[ConsulDouble]:
    """A Consul that knows nothing yet."""
    double = ConsulDouble()
    yield double
    double.close()


def discovery(consul: ConsulDouble, **kwargs: Any) -> ConsulDiscovery:
    """Return a discovery with short waits."""
    return ConsulDiscovery("cognate", host="127.0.0.1", port=consul.port, retry_s=0.02, wait_s=0.5, **kwargs)


async def test_a_client_moves_with_its_service(kind: str, fake: Fake, consul: ConsulDouble) -> None:
    """New calls go to the new address, a call that runs finishes at the old one."""
    consul.change(fake.address)
    other, found = Fake(), discovery(consul)
    try:
        async with driver(kind, found) as client:
            await client.get_job()
            fake.script.gate = threading.Event()
            running = asyncio.create_task(client.get_job())
            assert await asyncio.to_thread(fake.script.arrived.acquire, timeout=5)
            consul.change(other.address)
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
    consul.change(fake.address)
    found = discovery(consul, tag="blue")
    try:
        assert found.addresses() == (fake.address,)
        await until(lambda: len(consul.queries) >= 2)
        assert {"/v1/health/service/cognate"} == {query["path"] for query in consul.queries}
        first, second = consul.queries[:2]
        assert (first["passing"], first["tag"], "index" in first) == ("1", "blue", False)
        assert (second["passing"], second["index"], second["wait"]) == ("1", "11", "500ms")
    finally:
        found.close()


async def test_known_addresses_outlive_a_consul_that_forgets(fake: Fake, consul: ConsulDouble) -> None:
    """Empty lists, errors, and an index that goes back change nothing; the next list does."""
    consul.change(fake.address)
    found = discovery(consul)
    seen: list[tuple[str, ...]] = []
    found.subscribe(seen.append)
    try:
        assert found.addresses() == (fake.address,)
        forgetful: list[dict[str, Any]] = [{}, {"broken": True}, {"index": 1}]
        for change in forgetful:
            consul.queries.clear()
            consul.change(**change)
            await until(lambda: len(consul.queries) > 1)
            assert found.addresses() == (fake.address,)
        consul.change("127.0.0.1:9")
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
    consul.change(fake.address)
    found = discovery(consul)
    try:
        async with driver("sync", found) as client:
            consul.change("10.1.2.3:7101")
            await until(lambda: found.addresses() == ("10.1.2.3:7101",))
            await client.get_job()
            assert client.cognate.addresses == (fake.address,)
    finally:
        found.close()
