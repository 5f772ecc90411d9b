"""The admin listener: a few pages, plain HTTP, this machine only, and nothing that a stranger could hold up."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from cognate_server.settings import CognateSettings
from tests.support.servers import running_agent, running_cognate
from tests.telemetry.scraping import get
from training_common.rpc.server import RunningServer
from training_common.telemetry import admin

LISTENING = {"address": "127.0.0.1:0"}


@pytest.fixture
async def cognate(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_cognate(tmp_path / "cognate", telemetry=LISTENING) as server:
        yield server


async def say(server: RunningServer, sent: bytes) -> bytes:
    """Send bytes and return the whole answer."""
    host, _, port = server.admin_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


async def test_there_is_none_by_default(tmp_path: Path) -> None:
    """Nor does anything count then."""
    async with running_cognate(tmp_path) as server:
        assert server.admin_address == ""
        assert server.telemetry.calls is None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /../metrics HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400 Bad Request"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"431 Request Header Fields Too Large"),
        (b"GET /healthz?x=1 HTTP/1.0\r\n\r\n", b"200 OK"),
    ],
)
async def test_what_is_no_request_for_a_page_is_refused(cognate: RunningServer, sent: bytes, status: bytes) -> None:
    """With its status, and the connection ends."""
    assert (await say(cognate, sent)).startswith(b"HTTP/1.1 " + status)


async def test_probes_ask_for_different_things(cognate: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do not start keep no call away; only a process that goes on by itself no more is not alive."""

    async def statuses() -> list[int]:
        await cognate._health.check()
        return [(await get(cognate, path)).status for path in ("/healthz", "/readyz", "/livez")]

    assert await statuses() == [200, 200, 200]
    monkeypatch.setattr(cognate._health, "_scheduler", SimpleNamespace(last_launch_failed=True))
    assert await statuses() == [503, 200, 200]
    await cognate._health.give_up()
    assert await statuses() == [503, 503, 503]
    # One that drains was told to.
    await cognate._health.drain()
    assert await statuses() == [503, 503, 200]


async def test_a_look_that_a_drain_overtakes_calls_nobody(
    cognate: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers after the drain has begun: the server is not ready all the same."""
    asked, answers = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        asked.set()
        await answers.wait()

    health = cognate._health
    monkeypatch.setattr(health._database, "check", slow)
    look = asyncio.create_task(health.check())
    await asked.wait()
    await health.drain()
    answers.set()
    await look
    assert (False, False, True) == (health.ready, health.serving, health.alive)


async def test_head_has_the_headers_alone(cognate: RunningServer) -> None:
    """As probes ask."""
    page = await get(cognate, "/metrics", method="HEAD")
    assert (page.status, page.text) == (200, "")
    assert page.kind == "text/plain; version=0.0.4; charset=utf-8"


async def test_connections_that_ask_nothing_are_bounded(
    cognate: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound they are closed at once, and those that say nothing after a while."""
    monkeypatch.setattr(admin, "_REQUEST_S", 0.3)
    host, _, port = cognate.admin_address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
    closed = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in silent)), 20)
    assert closed == [b""] * 40
    for _, writer in silent:
        writer.close()
    assert (await get(cognate, "/healthz")).status == 200


async def test_who_holds_connections_open_keeps_nobody_from_health(
    cognate: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by asking nothing nor by reading nothing: the oldest gives way, and what it did not read is let go."""
    host, _, port = cognate.admin_address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
    assert (await get(cognate, "/healthz")).status == 200
    deaf = []
    for _ in range(60):
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        deaf.append((reader, writer))
    assert (await get(cognate, "/healthz")).status == 200
    for _, writer in [*silent, *deaf]:
        writer.close()


async def test_an_answer_that_nobody_reads_is_let_go(cognate: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes and its connection are kept for a while and no longer."""
    monkeypatch.setattr(admin, "_ANSWER_S", 0.3)

    async def much(accept: str) -> tuple[bytes, str]:
        return b"#" * (16 << 20), "text/plain"

    listener = cognate.telemetry._admin
    assert listener is not None
    monkeypatch.setattr(listener, "_metrics", much)
    host, _, port = cognate.admin_address.rpartition(":")
    with socket.create_connection((host, int(port))) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(20):
            while not listener._open:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            while listener._open:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        deaf.setblocking(False)
        received = 0
        # By the loop, which has to close the connection meanwhile.
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(20):
                while piece := await asyncio.get_running_loop().sock_recv(deaf, 1 << 20):
                    received += len(piece)
        assert received < 16 << 20, "what had been sent by then is all"


async def test_an_accept_header_that_makes_no_sense_gets_the_plain_form(cognate: RunningServer) -> None:
    """A version that is no number is no reason to answer nothing."""
    for accept in ("application/openmetrics-text; version=abc", "text/plain;version=1.x;escaping", ";;=,"):
        answer = await say(cognate, f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
        assert b"200 OK" in answer.split(b"\r\n")[0]
        assert b"text/plain; version=0.0.4" in answer


async def test_a_socket_file_serves_too(tmp_path: Path) -> None:
    """Its file is gone when the server has stopped, and one that a killed server left behind is no hindrance."""
    path = tmp_path / "admin"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    async with running_cognate(tmp_path / "cognate", telemetry={"address": f"unix:{path}"}) as server:
        assert server.admin_address == f"unix:{path}"
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\nSERVING\n")
        writer.close()
    assert not path.exists()


async def test_an_address_that_is_taken_is_named(cognate: RunningServer, tmp_path: Path) -> None:
    """The start is refused, and the next one can use the folder."""
    with pytest.raises(RuntimeError, match=r"port \d+ of 127\.0\.0\.1 is in use"):
        async with running_agent(tmp_path / "agent", telemetry={"address": cognate.admin_address}):
            pass
    async with running_agent(tmp_path / "agent", telemetry=LISTENING) as server:
        assert (await get(server, "/healthz")).text == "SERVING\n"


@pytest.mark.parametrize(
    ("telemetry", "told"),
    [
        ({"address": "0.0.0.0:9101"}, "is not loopback, and the listener speaks plain HTTP"),
        ({"address": ":9101"}, "is no address"),
        ({"address": "localhost"}, "is no address"),
        ({"otlp_endpoint": "http://collector:4317"}, "is not on this machine, and http:// is plaintext"),
        ({"otlp_endpoint": "collector:4317"}, "String should match pattern"),
        ({"otlp_endpoint": "http://me:secret@localhost:4317"}, "String should match pattern"),
    ],
)
def test_plaintext_stays_on_this_machine(telemetry: dict[str, str], told: str) -> None:
    """Unless the settings say that it may leave."""
    with pytest.raises(ValidationError, match=told):
        CognateSettings.model_validate({"telemetry": telemetry})


def test_plaintext_may_be_allowed() -> None:
    """Where only the monitoring system reaches the address."""
    told = {"address": "0.0.0.0:9101", "otlp_endpoint": "http://collector:4317", "allow_plaintext": True}
    assert CognateSettings.model_validate({"telemetry": told}).telemetry.address == "0.0.0.0:9101"
