"""`forge smoke` against real servers: nothing is changed, and each thing that does not work is a failure."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cognateforge.client import services
from cognateforge.diagnostics import smoke
from cognateforge.diagnostics.checks import Area, Level
from tests.client.fakes import Fake
from tests.support.published import publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from training_common.store import tables as t
from training_common.store.database import Database

pytestmark = pytest.mark.usefixtures("no_drain_notice")


async def run(service: str, address: str, *args: str) -> tuple[int, str]:
    """Return its exit code and what it printed. A process of its own: servers of this one log to stdout."""
    env = {**os.environ, "FORGE_COGNATE": address, "FORGE_AGENT": address}
    command = [sys.executable, "-m", "cognateforge.cli", "smoke", service, *args]
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    return process.returncode or 0, printed.decode()


async def checks(service: str, address: str, *args: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, printed = await run(service, address, "--json", "--timeout", "3", *args)
    rows = [json.loads(line) for line in printed.splitlines()]
    return code, {row["name"]: row for row in rows}


def failed(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in found.items() if check["level"] != "ok"}


async def test_a_cognate_that_works_passes_and_stays_as_it_was(tmp_path: Path) -> None:
    """Each gRPC service is asked, the newest model is fetched whole, and a plan makes no job."""
    async with running_cognate(tmp_path) as server:
        code, found = await checks("cognate", server.address)
        assert (0, "nothing is published yet") == (code, found["fetch"]["detail"]), found
        model = publish_model(tmp_path)
        code, found = await checks("cognate", server.address, "--expect-version", version("cognateforge-cognate"))
    assert 0 == code, found
    assert {"health", *(f"health {one.full_name}" for one in services.COGNATE)} < set(found)
    assert f"cognate-25m@1, {len(b'weights' * 1000)} bytes, {model.digest}" == found["fetch"]["detail"]
    assert "a plan is taken" == found["dry run"]["detail"]
    database = Database(f"sqlite:///{tmp_path / 'store.db'}")
    with database.read() as connection:
        left = [
            connection.execute(sa.select(sa.func.count()).select_from(one)).scalar() for one in (t.jobs, t.requests)
        ]
    database.close()
    assert [0, 0] == left


async def test_an_agent_service_that_works_passes_with_its_cognate_and_without(tmp_path: Path) -> None:
    """A Cognate that has no model yet is no fault of the agent service."""
    async with (
        running_cognate(tmp_path / "cognate") as cognate,
        running_agent(tmp_path / "agent", cognate={"address": cognate.address}) as agent,
    ):
        publish_agent(tmp_path / "agent")
        code, found = await checks("agent", agent.address)
        assert 0 == code, found
        assert "no version is published yet" in found["dry run"]["detail"]
        assert found["fetch"]["detail"].startswith("intent-router@1, ")
        assert {f"health {one.full_name}" for one in services.AGENT} < set(found)
        await cognate.stop()
        code, found = await checks("agent", agent.address)
        assert (0, "a plan is taken") == (code, found["dry run"]["detail"])


async def test_each_fault_fails_with_a_remedy_and_the_others_are_tried(tmp_path: Path) -> None:
    """Another release than expected, and a folder of artifacts that cannot be read: both are told at once."""
    async with running_cognate(tmp_path) as server:
        publish_model(tmp_path)
        shutil.rmtree(tmp_path / "artifacts")
        code, found = await checks("cognate", server.address, "--expect-version", "0.0.1")
    assert (5, {"release", "fetch"}) == (code, failed(found)), found
    database = Database(f"sqlite:///{tmp_path / 'store.db'}")
    with database.read() as connection:
        # A folder that is not there tells of this server: no version is called damaged for all servers of the store.
        assert [""] == list(connection.execute(sa.select(t.artifacts.c.damage)).scalars())
    database.close()
    assert f"it is {version('cognateforge')}, and 0.0.1 was expected" == found["release"]["detail"]
    assert all(found[name]["remedy"] for name in failed(found))


async def test_a_service_that_takes_no_work_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is asked by service: what trains may be ill while models are still served."""
    async with running_cognate(tmp_path) as server:
        monkeypatch.setattr(server._health._scheduler, "last_launch_failed", True)
        await server._health.check()
        code, found = await checks("cognate", server.address)
    training = "health cognateforge.cognate.v1.CognatePretrainingService"
    assert (5, {"health", training}) == (code, failed(found)), found


async def test_a_service_that_is_not_there_fails_in_every_part(fake: Fake) -> None:
    """Also where nothing can be tried."""
    fake.stop()
    code, found = await checks("cognate", fake.address)
    assert (5, set(found)) == (code, failed(found)), found
    assert all("whether this is its address" in check["remedy"] for check in found.values())


async def test_what_is_not_the_services_fault_is_no_verdict(tmp_path: Path) -> None:
    """An address that is none is told once, as every command does, and with that command's exit code."""
    code, printed = await run("cognate", "nowhere", "--json")
    assert (13, "") == (code, printed)


def test_a_temporary_folder_that_cannot_be_used_is_a_failure_with_its_remedy() -> None:
    """As in a container whose root cannot be written: nothing could be fetched."""

    def attempt() -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check = smoke._tried(Area("cognate smoke test"), "fetch", attempt)
    assert (Level.FAIL, "make room, or set TMPDIR") == (check.level, check.remedy)
    assert "Read-only file system" in check.detail


async def test_people_read_lines(tmp_path: Path) -> None:
    """A line for each check, and below a failed one what to do."""
    async with running_cognate(tmp_path) as server:
        code, printed = await run("cognate", server.address, "--expect-version", "0.0.1")
    assert 5 == code
    assert "  ok    health: SERVING" in printed
    assert "  fail  release: " in printed
    assert "        do not let it take over" in printed
