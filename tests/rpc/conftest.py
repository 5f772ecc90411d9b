"""Both services, and clients of them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from tests.support.servers import running_agent, running_cognate
from training_common.rpc.server import RunningServer


@pytest.fixture(autouse=True)
def quick_stop(no_drain_notice: None) -> None:
    """Every server of these tests stops at once."""


@pytest.fixture
async def cognate_server_up(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_cognate(tmp_path / "cognate") as server:
        yield server


@pytest.fixture
async def cognate(cognate_server_up: RunningServer) -> AsyncIterator[AsyncCognateClient]:
    async with AsyncCognateClient(cognate_server_up.address) as client:
        yield client


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[AsyncAgentClient]:
    async with running_agent(tmp_path / "agent") as server, AsyncAgentClient(server.address) as client:
        yield client
