"""Real servers of both services in the test's event loop, on free ports, with no worker unless asked for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import agent_server.server
import cognate_server.server
from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from training_common.rpc.server import RunningServer


@asynccontextmanager
async def running_cognate(folder: Path, **settings: Any) -> AsyncIterator[RunningServer]:
    """Yield a Cognate service; its jobs stay QUEUED unless `workers` gives it slots."""
    values = {"address": "127.0.0.1:0", "data_dir": folder, "workers": {"slots": 0}, "drain_grace_s": 0.5, **settings}
    server = cognate_server.server.build(CognateSettings.model_validate(values), None)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def running_agent(folder: Path, **settings: Any) -> AsyncIterator[RunningServer]:
    """Yield an agent service; its jobs stay QUEUED unless `workers` gives it slots.

    It asks no Cognate about foundations unless `cognate` says where.
    """
    values = {
        "address": "127.0.0.1:0",
        "data_dir": folder,
        "workers": {"slots": 0},
        "drain_grace_s": 0.5,
        "cognate": {"ask_within_s": 0},
        **settings,
    }
    server = agent_server.server.build(AgentSettings.model_validate(values), None)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
