"""A server that cannot start says why in one line, and leaves the one that runs alone."""

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from cognateforge.client import AsyncCognateClient
from cognateforge.exchange.v1 import model_pb2
from deploy.services import Services
from tests.support.servers import running_agent, running_cognate
from training_common.rpc.server import RunningServer
from training_common.settings import SettingsError

Running = Callable[..., AbstractAsyncContextManager[RunningServer]]


async def test_a_port_that_is_in_use_is_named_in_one_line(tmp_path: Path) -> None:
    """Exit status 1, and nothing of gRPC's log or of what was not awaited."""
    async with running_cognate(tmp_path / "first") as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cognate_server", "--address-file", str(tmp_path / "address")),
            env={
                **os.environ,
                "COGNATE_SERVER_ADDRESS": server.address,
                "COGNATE_SERVER_DATA_DIR": str(tmp_path / "second"),
            },
            stderr=asyncio.subprocess.PIPE,
        )
        _, told = await process.communicate()
    port = server.address.rpartition(":")[2]
    said = f"port {port} of 127.0.0.1 is in use: stop the server that listens there, or set another address"
    assert (1, f"cognate_server: {said}\n") == (process.returncode, told.decode())
    assert not (tmp_path / "address").exists()


async def test_a_store_of_artifacts_that_leads_nowhere_ends_the_start(tmp_path: Path) -> None:
    """Exit status 2, the setting and the remedy, and no traceback; the secret is not shown."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cognate_server"),
        env={
            **os.environ,
            "COGNATE_SERVER_ADDRESS": "127.0.0.1:0",
            "COGNATE_SERVER_DATA_DIR": str(tmp_path / "data"),
            "COGNATE_SERVER_ARTIFACTS__URL": "s3://models",
            "COGNATE_SERVER_ARTIFACTS__OPTIONS__ENDPOINT": "http://127.0.0.1:1",
            "COGNATE_SERVER_ARTIFACTS__OPTIONS__ALLOW_HTTP": "true",
            "COGNATE_SERVER_ARTIFACTS__OPTIONS__ACCESS_KEY_ID": "key",
            "COGNATE_SERVER_ARTIFACTS__OPTIONS__SECRET_ACCESS_KEY": "a-secret-that-is-kept",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await process.communicate()
    last = told.decode().splitlines()[-1]
    assert (2, "cognate_server: artifacts.url: s3://models cannot be used: ") == (process.returncode, last[:59])
    assert last.endswith("check artifacts.options (endpoint, region, allow_http), and that its service is up")
    assert b"Traceback" not in told
    assert b"a-secret-that-is-kept" not in told


async def test_a_living_unix_socket_is_not_taken_over(tmp_path: Path) -> None:
    """gRPC would remove the socket's file, and the first server would lose its callers in silence."""
    address = f"unix:{tmp_path / 'socket'}"
    async with running_cognate(tmp_path / "first", address=address):
        with pytest.raises(RuntimeError, match="socket is in use"):
            async with running_cognate(tmp_path / "second", address=address):
                pass
        async with AsyncCognateClient(address) as client:
            assert [] == list((await client.models.ListModels(model_pb2.ListModelsRequest())).models)
    async with running_cognate(tmp_path / "first", address=address) as server:
        assert address == server.address


@pytest.mark.parametrize("running", [running_cognate, running_agent])
async def test_a_folder_has_one_server_at_a_time(running: Running, tmp_path: Path) -> None:
    """The second is told who has it; when the first has ended, or could not listen, the folder is free again."""
    async with running(tmp_path / "data"):
        with pytest.raises(SettingsError, match=rf"data_dir: .*/data is in use by process {os.getpid()}; stop it"):
            async with running(tmp_path / "data"):
                pass
    async with running(tmp_path / "other") as server:
        with pytest.raises(RuntimeError, match="is in use"):
            async with running(tmp_path / "data", address=server.address):
                pass
        async with running(tmp_path / "data"):
            pass


async def test_a_second_starter_touches_nothing(tmp_path: Path) -> None:
    """`make up` beside a running one: its address file and its log are still the first one's."""
    async with running_cognate(tmp_path / "cognate") as server:
        for name in ("address", "server.log"):
            (tmp_path / "cognate" / name).write_text(f"the first one's {name}")
        services = Services(tmp_path)
        with pytest.raises(RuntimeError, match=r"port \d+ of 127\.0\.0\.1 is in use"):
            services.start_both(cognate=server.address, agent="127.0.0.1:0")
        with pytest.raises(RuntimeError, match=rf"/cognate is in use by process {os.getpid()}"):
            services.start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
        for name in ("address", "server.log"):
            assert f"the first one's {name}" == (tmp_path / "cognate" / name).read_text()
    assert ["cognate"] == os.listdir(tmp_path)
