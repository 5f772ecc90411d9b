"""`forge keys`, `forge verify` and `forge lineage` against real servers of both services."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from cognate_server.rpc.models import ModelServicer
from cognateforge.cli.app import app
from cognateforge.cli.exits import Exit
from cognateforge.client import AgentClient, CognateClient
from cognateforge.client.lineage import Lineage, Step, Trust
from cognateforge.exchange.v1 import model_pb2
from cognateforge.signatures import KeyPair, make_keys
from tests.support.published import publish_model, publish_stated, publish_stated_agent
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts.registry import ArtifactRow
from training_common.store import tables as t


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


def result_of(run: Result) -> dict[str, Any]:
    """Return what a command printed: servers of the same process log between the lines."""
    [line] = [line for line in run.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


@dataclass
class World:
    """Both services, where they are, and where their files are."""

    cognate: str
    agent: str
    folder: Path

    async def forge(self, *args: str) -> Result:
        """Run a command beside the servers' event loop."""
        env = {"FORGE_COGNATE": self.cognate, "FORGE_AGENT": self.agent}
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(args), env=env, catch_exceptions=False))

    async def json(self, *args: str) -> dict[str, Any]:
        return result_of(await self.forge(*args, "--json"))

    async def lineage(self, name: str, *keys: Path) -> Step:
        def ask() -> Step:
            with CognateClient(self.cognate) as cognate, AgentClient(self.agent) as agents:
                asked = Lineage(cognate, agents, keys)
                return asked.of_model(name) if name.startswith("cognate") else asked.of_agent(name)

        return await asyncio.to_thread(ask)


# What Cognate was told of by another agent service than the one that is asked.
ELSEWHERE = (
    model_pb2.Dependent(name="their-router@4", digest=f"sha256:{'e' * 64}", owner="spiffe://other/agent"),
    model_pb2.Dependent(name=f"jobs/{uuid.UUID(int=7)}", owner="spiffe://other/agent"),
)


async def list_dependents(self: ModelServicer, request: model_pb2.ListDependentsRequest, context: object) -> Any:
    """Tell of one dependent a page."""
    at = int(request.page_token or 0)
    token = str(at + 1) if at + 1 < len(ELSEWHERE) else ""
    return model_pb2.ListDependentsResponse(dependents=[ELSEWHERE[at]], next_page_token=token)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(ModelServicer, "ListDependents", list_dependents)
    async with running_cognate(tmp_path / "cognate") as cognate, running_agent(tmp_path / "agent") as agent:
        yield World(cognate.address, agent.address, tmp_path)


def family(world: World, key: Path | None) -> tuple[ArtifactRow, ArtifactRow, ArtifactRow]:
    """Publish a model, an agent of it, and an agent of that."""
    model = publish_stated(world.folder / "cognate", key=key)
    first = publish_stated_agent(world.folder / "agent", model, key=key)
    return model, first, publish_stated_agent(world.folder / "agent", model, key=key, made_of=first)


async def test_keys_are_made_once(tmp_path: Path) -> None:
    """Paths and fingerprint on stdout; a second time is refused."""
    made = CliRunner().invoke(app, ["keys", "make", "--out", str(tmp_path / "keys"), "--json"])
    assert {"private", "public", "fingerprint"} == json.loads(made.stdout).keys()
    again = CliRunner().invoke(app, ["keys", "make", "--out", str(tmp_path / "keys")])
    assert (Exit.LOCAL, True) == (again.exit_code, "is there already" in again.stderr)


async def test_verify_of_a_version_and_of_its_folder(world: World, keys: KeyPair, tmp_path: Path) -> None:
    """The same answer from the service and from the fetched folder; another key is refused with an exit code."""
    model, first, _ = family(world, keys.private)
    trusted = ("--public-key", str(keys.public))
    remote = await world.json("verify", "cognate-25m", *trusted)
    assert (model.name, model.digest, keys.fingerprint) == (remote["name"], remote["digest"], remote["key"])
    fetched = await world.forge("fetch", "intent-router@1", "--out", str(tmp_path / "agent-1"))
    assert Exit.OK == fetched.exit_code
    local = await world.json("verify", str(tmp_path / "agent-1"), *trusted)
    assert local == await world.json("verify", "intent-router@1", *trusted)
    assert first.digest == local["digest"]
    told = await world.forge("verify", str(tmp_path / "agent-1"), *trusted)
    assert f"signed with {keys.fingerprint}; every byte verified" in told.stdout

    other = make_keys(tmp_path / "other")
    refused = await world.forge("verify", "intent-router@1", "--public-key", str(other.public))
    assert (Exit.PRECONDITION, True) == (refused.exit_code, keys.fingerprint in refused.stderr)
    (tmp_path / "agent-1" / "tail.bin").write_bytes(b"tain")
    damaged = await world.forge("verify", str(tmp_path / "agent-1"), *trusted)
    assert (Exit.CORRUPT, True) == (damaged.exit_code, "tail.bin" in damaged.stderr)


async def test_lineage_goes_down_to_the_data(world: World, keys: KeyPair) -> None:
    """From an agent of an agent to the foundation's rows, each step verified."""
    model, first, second = family(world, keys.private)
    found = await world.json("lineage", "intent-router", "--public-key", str(keys.public))
    [below] = found["made_of"]
    [bottom] = below["made_of"]
    assert [second.digest, first.digest, model.digest] == [step["digest"] for step in (found, below, bottom)]
    assert ["verified"] * 3 == [step["trust"] for step in (found, below, bottom)]
    assert ["forge-arithmetic"] == [source["name"] for source in bottom["data"]]
    assert ("0.1.0", []) == (bottom["code"]["version"], bottom["made_of"])
    drawn = (await world.forge("lineage", "intent-router", "--public-key", str(keys.public))).stdout
    wanted = [
        "agent intent-router@2",
        "data forge-intents",
        "made of agent intent-router@1",
        "made of model cognate-25m@1",
    ]
    assert sorted(drawn.index(part) for part in wanted) == [drawn.index(part) for part in wanted]


async def test_lineage_goes_back_to_every_agent(world: World, keys: KeyPair) -> None:
    """An agent of an agent stands below that one; agents of another model do not stand there."""
    model, first, second = family(world, keys.private)
    publish_stated_agent(world.folder / "agent", publish_stated(world.folder / "cognate"))
    found = await world.lineage(model.name, keys.public)
    made, *elsewhere = found.made
    [again] = made.made
    assert [first.name, second.name] == [made.name, again.name]
    assert [Trust.VERIFIED] * 3 == [step.trust for step in (found, made, again)]
    assert [("agent", "their-router@4"), ("job", f"jobs/{uuid.UUID(int=7)}")] == [(s.kind, s.name) for s in elsewhere]
    assert {(Trust.UNKNOWN, "told by spiffe://other/agent")} == {(step.trust, step.trust_detail) for step in elsewhere}
    drawn = (await world.forge("lineage", model.name)).stdout
    assert "made into agent intent-router@1" in drawn


async def test_a_step_that_is_not_proved_is_told(world: World, keys: KeyPair) -> None:
    """The chain is drawn all the same, and the exit code says that it is not whole."""
    model = publish_stated(world.folder / "cognate")
    publish_stated_agent(world.folder / "agent", model, key=keys.private)
    result = await world.forge("lineage", "intent-router", "--public-key", str(keys.public))
    assert Exit.PRECONDITION == result.exit_code
    assert "refused (cognate-25m@1 is refused: it is not signed)" in result.stdout
    unasked = await world.forge("lineage", "intent-router")
    assert (Exit.OK, True) == (unasked.exit_code, "unsigned" in unasked.stdout)


async def test_a_chain_that_does_not_fit_together_is_told(world: World, keys: KeyPair) -> None:
    """Another model under the name that the agent was made of: its digest tells, whoever signed it."""
    model, _, _ = family(world, keys.private)
    engine = sa.create_engine(f"sqlite:///{world.folder / 'cognate' / 'store.db'}")
    other = publish_stated(world.folder / "cognate", key=keys.private)
    with engine.begin() as connection:
        connection.execute(
            sa.update(t.artifacts)
            .where(t.artifacts.c.id == model.id)
            .values(digest=other.digest, manifest=other.manifest)
        )
    found = await world.lineage("intent-router@1", keys.public)
    assert (Trust.VERIFIED, Trust.REFUSED) == (found.trust, found.made_of[0].trust)
    assert model.digest in found.made_of[0].trust_detail


async def test_a_service_that_is_away_leaves_its_steps_unknown(world: World, keys: KeyPair) -> None:
    """What the agent says of its foundation is still drawn."""
    model, _, _ = family(world, keys.private)
    nowhere = World("127.0.0.1:1", world.agent, world.folder)
    [below] = (await nowhere.json("lineage", "intent-router@1", "--timeout", "1"))["made_of"]
    assert (model.name, model.digest, "unknown") == (below["name"], below["digest"], below["trust"])


async def test_versions_of_before_have_a_lineage_too(world: World) -> None:
    """Without a statement the registry's own fields tell it."""
    publish_model(world.folder / "cognate")
    found = await world.lineage("cognate-25m")
    assert (Trust.UNSIGNED, "cognate-25m@1") == (found.trust, found.name)
