"""Fixtures: a scripted server, and each test's clients once sync and once asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from cognateforge.client.retry import RETRY_POLICY
from tests.client.fakes import Driver, Fake, driver


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as often as always, with shorter pauses."""
    monkeypatch.setitem(RETRY_POLICY, "initialBackoff", "0.01s")
    monkeypatch.setitem(RETRY_POLICY, "maxBackoff", "0.02s")


@pytest.fixture
def fake() -> Iterator[Fake]:
    """A server of its own for the test."""
    server = Fake()
    yield server
    server.stop()


@pytest.fixture(params=["sync", "aio"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which clients the test runs with."""
    return str(request.param)


@pytest.fixture
async def client(kind: str, fake: Fake) -> AsyncIterator[Driver]:
    """Clients of the fake server, with default settings."""
    async with driver(kind, fake.address) as opened:
        yield opened
