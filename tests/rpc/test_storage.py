"""How published versions are kept, over gRPC: pins, tiers, verification, collection. Both services, real servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from agent_server.agents import find_agent
from agent_server.bases import resolve
from cognate_server.models import find_model
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.artifact.v1 import storage_pb2 as pb
from cognateforge.cli.app import app
from cognateforge.cli.exits import Exit
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import (
    AgentNotFoundError,
    ArtifactCorruptError,
    ArtifactInUseError,
    ForgeError,
    IllegalTransitionError,
    ModelNotFoundError,
    NotFoundError,
    RequestIdReusedError,
    ResourceExhaustedError,
)
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from tests.support.published import open_registry, publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRow
from training_common.rpc import fetch
from training_common.store import tables as t

Client = AsyncCognateClient | AsyncAgentClient
DAY_S = 86_400


def new_id() -> str:
    return str(uuid.uuid4())


@dataclass
class Side:
    """One of the two services, up, with its folder and a client."""

    folder: Path
    client: Any
    publish: Callable[..., ArtifactRow]
    family: str
    not_found: type[NotFoundError]

    @property
    def storage(self) -> Any:
        return self.client.storage

    async def names(self) -> list[str]:
        """Return what is listed, newest first."""
        if isinstance(self.client, AsyncCognateClient):
            return [one.name for one in (await self.client.models.ListModels(model_pb2.ListModelsRequest())).models]
        return [one.name for one in (await self.client.agents.ListAgents(agent_pb2.ListAgentsRequest())).agents]

    async def stored(self, name: str) -> pb.Storage:
        if isinstance(self.client, AsyncCognateClient):
            model = (await self.client.models.GetModel(model_pb2.GetModelRequest(name=name))).model
            return model.storage
        agent: agent_pb2.Agent = (await self.client.agents.GetAgent(agent_pb2.GetAgentRequest(name=name))).agent
        return agent.storage

    async def fetch(self, name: str, to: Path) -> Path:
        fetch = self.client.fetch_model if isinstance(self.client, AsyncCognateClient) else self.client.fetch_agent
        fetched = await fetch(name, to, give_up_after_s=0.5)
        return Path(fetched.path)

    async def info(self) -> job_pb2.ServerInfo:
        if isinstance(self.client, AsyncCognateClient):
            return (await self.client.pretraining.GetServerInfo(pretraining_pb2.GetServerInfoRequest())).info
        info: job_pb2.ServerInfo = (await self.client.training.GetServerInfo(training_pb2.GetServerInfoRequest())).info
        return info

    async def verify(self, name: str = "") -> tuple[list[pb.Damage], pb.VerifyProgress]:
        """Return what is damaged, and the summary."""
        frames = [frame async for frame in self.storage.VerifyArtifacts(pb.VerifyArtifactsRequest(name=name))]
        assert "summary" == frames[-1].WhichOneof("frame")
        return [frame.damage for frame in frames if frame.HasField("damage")], frames[-1].summary

    async def collect(self, *names: str, validate_only: bool = False) -> pb.CollectArtifactsResponse:
        request = pb.CollectArtifactsRequest(request_id=new_id(), names=names, validate_only=validate_only)
        answer: pb.CollectArtifactsResponse = await self.storage.CollectArtifacts(request)
        return answer

    def files(self, below: str = "artifacts") -> list[Path]:
        """Return every stored file."""
        return sorted(path for path in (self.folder / below).rglob("*") if path.is_file())

    def age(self, days: float = 3.0) -> None:
        """Make everything that is stored look old, rows and files."""
        then = time.time() - days * DAY_S
        for path in [*self.files(), *self.files("archive")]:
            os.utime(path, (then, then))
        registry = open_registry(self.folder)
        with registry.database.write() as connection:
            connection.execute(sa.update(t.artifacts).values(create_us=int(then * 1e6)))
        registry.database.close()

    def kinds(self) -> list[tuple[str, str]]:
        """Return the outbox: what happened to which version."""
        registry = open_registry(self.folder)
        events = [(event.kind, event.artifact.name) for event in registry.events_after(0, 100)]
        registry.database.close()
        return events


@asynccontextmanager
async def side(service: str, folder: Path, **artifacts: Any) -> AsyncIterator[Side]:
    settings = {"artifacts": {"keep_newest": 1, "archive_url": str(folder / "archive"), **artifacts}}
    if service == "cognate":
        async with running_cognate(folder, **settings) as server, AsyncCognateClient(server.address) as client:
            yield Side(folder, client, publish_model, "cognate-25m", ModelNotFoundError)
    else:
        async with running_agent(folder, **settings) as server, AsyncAgentClient(server.address) as agents:
            yield Side(folder, agents, publish_agent, "intent-router", AgentNotFoundError)


@pytest.fixture(params=["cognate", "agent"])
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def up(service: str, tmp_path: Path) -> AsyncIterator[Side]:
    async with side(service, tmp_path / "service") as found:
        yield found


def blob_of(folder: Path, digest: str, below: str = "artifacts") -> Path:
    hexadecimal = digest.removeprefix("sha256:")
    return folder / below / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal


# --- pins


async def test_a_pin_is_set_and_taken_away(up: Side) -> None:
    """A repeated request is answered as the first time, another wish under its id is refused."""
    name = up.publish(up.folder).name
    request = pb.SetPinRequest(request_id=new_id(), name=name, pinned=True)
    assert (await up.storage.SetPin(request)).storage.pinned
    assert (await up.stored(name)).pinned
    away = pb.SetPinRequest(request_id=new_id(), name=name)
    assert not (await up.storage.SetPin(away)).storage.pinned
    assert (await up.storage.SetPin(request)).storage.pinned, "the first answer"
    assert not (await up.stored(name)).pinned
    with pytest.raises(RequestIdReusedError):
        await up.storage.SetPin(pb.SetPinRequest(request_id=request.request_id, name=name))
    with pytest.raises(up.not_found):
        await up.storage.SetPin(pb.SetPinRequest(request_id=new_id(), name=f"{up.family}@9", pinned=True))


# --- collection


async def test_what_is_in_use_is_not_collected(up: Side) -> None:
    """By name it is refused, and the error says by what and what to do. Nothing is removed, not even what is free."""
    first, second, newest = (up.publish(up.folder, **more).name for more in payloads(up, 3))
    await up.storage.SetPin(pb.SetPinRequest(request_id=new_id(), name=first, pinned=True))
    with pytest.raises(ArtifactInUseError, match=f"{first} must stay: it is pinned: forge artifacts unpin") as caught:
        await up.collect(second, first)
    assert ["names"] == [one.field for one in caught.value.violations]
    with pytest.raises(ArtifactInUseError, match="the newest version of its family"):
        await up.collect(newest)
    with pytest.raises(up.not_found):
        await up.collect(second, f"{up.family}@9")
    assert [newest, second, first] == await up.names()


def payloads(up: Side, count: int) -> list[dict[str, Any]]:
    """Return what makes versions of the same family have bytes of their own, where the service's versions can."""
    return [{"payload": b"%d" % n * 3000} if up.family == "cognate-25m" else {} for n in range(count)]


async def test_a_collected_version_is_gone_and_its_name_is_not_given_again(up: Side) -> None:
    """Lists, look-ups and snapshots leave it out, its bytes go, and the next version has the next number."""
    first, second = (up.publish(up.folder, **more) for more in payloads(up, 2))
    up.age()
    dry = await up.collect(first.name, validate_only=True)
    assert [(first.name, first.digest)] == [(one.name, one.digest) for one in dry.collected]
    assert [second.name, first.name] == await up.names(), "nothing was removed"
    request = pb.CollectArtifactsRequest(request_id=new_id(), names=[first.name])
    answer = await up.storage.CollectArtifacts(request)
    assert (list(dry.collected), dry.blobs, dry.bytes) == (list(answer.collected), answer.blobs, answer.bytes)
    assert answer == await up.storage.CollectArtifacts(request), "repeated, it is answered as the first time"
    assert [second.name] == await up.names()
    with pytest.raises(up.not_found):
        await up.stored(first.name)
    with pytest.raises(up.not_found):
        await up.fetch(first.name, up.folder / "fetched")
    shared = {file.digest for file in first.files} & {file.digest for file in second.files}
    own = [file for file in first.files if file.digest not in shared]
    assert (len(own), sum(file.size_bytes for file in own)) == (answer.blobs, answer.bytes)
    assert [False] * len(own) == [blob_of(up.folder, file.digest).exists() for file in own]
    assert all(blob_of(up.folder, file.digest).exists() for file in second.files), "what others name stays"
    assert not (up.folder / "artifacts" / "manifests" / up.family / "1.json").exists()
    await up.fetch(second.name, up.folder / "fetched")
    assert f"{up.family}@3" == up.publish(up.folder, **payloads(up, 3)[2]).name
    assert ("collected", first.name) in up.kinds()


async def test_bytes_of_nobody_are_collected_when_they_are_old(up: Side) -> None:
    """What a publication under way has just stored is young and stays; so does what a version names, however old."""
    row = up.publish(up.folder)
    stored = set(up.files())
    blobs = BlobStore(up.folder / "artifacts")
    (up.folder / "old").write_bytes(b"old orphan")
    (up.folder / "young").write_bytes(b"young orphan")
    orphan = blobs.put(up.folder / "old", "x.bin")
    blobs.put_manifest(up.family, 7, b"{}")
    up.age()
    young = blobs.put(up.folder / "young", "x.bin")
    answer = await up.collect()
    assert (1, orphan.size_bytes, []) == (answer.blobs, answer.bytes, list(answer.collected))
    assert stored | {blob_of(up.folder, young.digest)} == set(up.files())
    await up.fetch(row.name, up.folder / "fetched")


async def test_retention_collects_what_is_old_and_free(service: str, tmp_path: Path) -> None:
    """Pinned ones and the newest stay, whatever their age."""
    async with side(service, tmp_path / "service", collect_after_days=2, keep_newest=2) as up:
        rows = [up.publish(up.folder) for _ in range(5)]
        await up.storage.SetPin(pb.SetPinRequest(request_id=new_id(), name=rows[1].name, pinned=True))
        assert [] == list((await up.collect()).collected), "nothing is old"
        up.age()
        answer = await up.collect()
        assert [rows[0].name, rows[2].name] == [one.name for one in answer.collected]
        assert all("older than 2 days" in one.why for one in answer.collected)
        assert [rows[4].name, rows[3].name, rows[1].name] == await up.names()


async def test_a_fetch_whose_version_is_collected_meanwhile_ends_with_an_error(up: Side) -> None:
    """What was served until then is right, and what is missed is no damage: the version is gone."""
    row = up.publish(up.folder)
    up.publish(up.folder, **payloads(up, 2)[1])
    registry = open_registry(up.folder)
    # As the servicers do. A client would have all of so few bytes in its buffers before anything else happens.
    find: Any = find_model if up.family == "cognate-25m" else find_agent
    message: Any = model_pb2.FetchModelResponse if up.family == "cognate-25m" else agent_pb2.FetchAgentResponse
    frames = fetch.guarded(registry, row, fetch.frames(registry.blobs, row, 0, message), find)
    up.age()
    await up.collect(row.name)
    for file in row.files:
        registry.blobs.delete(file.digest)
    with pytest.raises(up.not_found, match=f"{row.name} is published"):
        _ = [frame async for frame in frames]
    assert ("damaged", row.name) not in up.kinds()
    registry.database.close()


async def test_bytes_that_a_fetch_misses_raise_the_alarm(up: Side) -> None:
    """Nobody has verified it yet: the fetch finds it, and so does every later one at once."""
    row = up.publish(up.folder)
    blob_of(up.folder, row.files[0].digest).unlink()
    with pytest.raises(ArtifactCorruptError, match=row.files[0].path):
        await up.fetch(row.name, up.folder / "fetched")
    assert row.files[0].path in (await up.stored(row.name)).damage
    assert [("published", row.name), ("damaged", row.name)] == up.kinds()


# --- tiers


async def test_a_version_is_archived_and_restored(up: Side) -> None:
    """Its bytes move, and it can be fetched from either place. What a standard version shares with it stays here."""
    first, second = (up.publish(up.folder, **more) for more in payloads(up, 2))
    own = {file.digest for file in first.files} - {file.digest for file in second.files}
    archive = pb.SetTierRequest(request_id=new_id(), name=first.name, tier=pb.TIER_ARCHIVE)
    assert pb.TIER_ARCHIVE == (await up.storage.SetTier(archive)).storage.tier
    assert own == {f"sha256:{path.name}" for path in up.files("archive")}
    assert not any(blob_of(up.folder, digest).exists() for digest in own)
    await up.fetch(first.name, up.folder / "archived")
    await up.fetch(second.name, up.folder / "standard")
    restore = pb.SetTierRequest(request_id=new_id(), name=first.name, tier=pb.TIER_STANDARD)
    assert pb.TIER_STANDARD == (await up.storage.SetTier(restore)).storage.tier
    assert [] == up.files("archive")
    await up.fetch(first.name, up.folder / "restored")
    assert [("archived", first.name), ("restored", first.name)] == up.kinds()[2:]
    with pytest.raises(ArtifactInUseError, match="the newest version of its family"):
        await up.storage.SetTier(pb.SetTierRequest(request_id=new_id(), name=second.name, tier=pb.TIER_ARCHIVE))


async def test_without_an_archive_nothing_is_archived(service: str, tmp_path: Path) -> None:
    """The refusal names the setting."""
    async with side(service, tmp_path / "service", archive_url="") as up:
        first, _ = up.publish(up.folder), up.publish(up.folder)
        with pytest.raises(IllegalTransitionError, match=r"set artifacts\.archive_url"):
            await up.storage.SetTier(pb.SetTierRequest(request_id=new_id(), name=first.name, tier=pb.TIER_ARCHIVE))


# --- verification


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << (bit % 8)
    path.write_bytes(content)


def load(up: Side, row: ArtifactRow, cache_dir: Path) -> None:
    """Load an agent as a job does that goes on with it."""
    registry = open_registry(up.folder)
    plan = training_pb2.TrainingPlan(architecture="cognate", agent_version=training_pb2.AgentBase(name=row.name))
    try:
        resolve(plan, fetch=lambda: pytest.fail("no foundation is needed"), registry=registry, cache_dir=cache_dir)
    finally:
        registry.database.close()


async def test_one_flipped_bit_in_any_stored_file_is_refused_by_name_and_raises_the_alarm(
    up: Side, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every stored file, manifest and blobs alike: verification, fetch and load name it, until it is mended."""
    row = up.publish(up.folder)
    places = {MANIFEST_NAME: up.folder / "artifacts" / "manifests" / up.family / "1.json"}
    places |= {file.path: blob_of(up.folder, file.digest) for file in row.files if file.size_bytes}
    assert {path for path in up.files() if path.stat().st_size} == set(places.values()), "every stored file"
    for number, (path, place) in enumerate(sorted(places.items())):
        whole = place.read_bytes()
        flip(place, bit=number * 37 + 5)
        with pytest.raises(ArtifactCorruptError, match=path.replace(".", r"\.")):
            await up.fetch(row.name, up.folder / f"before-{number}")
        if up.family != "cognate-25m":
            with pytest.raises(ArtifactCorruptError, match=path.replace(".", r"\.")):
                load(up, row, up.folder / f"cache-{number}")
        [damage], summary = await up.verify()
        problem = pb.PROBLEM_MANIFEST if path == MANIFEST_NAME else pb.PROBLEM_DIGEST
        assert (row.name, path, problem) == (damage.name, damage.path, damage.problem)
        assert (1, 1 + len(row.files)) == (summary.versions, summary.files)
        with pytest.raises(ArtifactCorruptError, match=f"{row.name} is damaged: {path}"):
            await up.fetch(row.name, up.folder / f"after-{number}")
        assert not list((up.folder / f"after-{number}").glob("*")), "no byte was served"
        assert 1 == (await up.info()).damaged_artifacts
        assert path in (await up.stored(row.name)).damage
        assert "stored artifact is damaged" in capsys.readouterr().out
        place.write_bytes(whole)
        assert ([], 1) == ((found := await up.verify(row.name))[0], found[1].versions)
        assert 0 == (await up.info()).damaged_artifacts
        await up.fetch(row.name, up.folder / f"mended-{number}")
        stored = await up.stored(row.name)
        assert ("", True) == (stored.damage, stored.HasField("verify_time"))
    assert [("damaged", row.name), ("mended", row.name)] * len(places) == up.kinds()[1:]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.unlink(), pb.PROBLEM_MISSING),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), pb.PROBLEM_SIZE),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), pb.PROBLEM_SIZE),
    ],
    ids=["missing", "short", "long"],
)
async def test_what_is_wrong_is_told(up: Side, spoil: Callable[[Path], object], problem: int) -> None:
    """Whether a file is gone, has another size or other bytes."""
    row = up.publish(up.folder)
    file = row.files[0]
    spoil(blob_of(up.folder, file.digest))
    [damage], _ = await up.verify(up.family)
    assert (file.path, file.digest, problem) == (damage.path, damage.digest, damage.problem)


async def test_damaged_bytes_are_not_moved(up: Side) -> None:
    """A version whose bytes are damaged stays in its tier."""
    first, _ = (up.publish(up.folder, **more) for more in payloads(up, 2))
    flip(blob_of(up.folder, first.files[0].digest), 3)
    with pytest.raises(ArtifactCorruptError, match=first.files[0].path):
        await up.storage.SetTier(pb.SetTierRequest(request_id=new_id(), name=first.name, tier=pb.TIER_ARCHIVE))
    assert pb.TIER_STANDARD == (await up.stored(first.name)).tier


async def test_verifications_are_bounded_and_end_with_their_caller(up: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third one at once is refused; one whose caller has gone makes room."""
    up.publish(up.folder)
    reading, go_on = asyncio.Semaphore(0), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: object) -> Iterator[tuple[int, None]]:
        loop.call_soon_threadsafe(reading.release)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        yield 1, None

    monkeypatch.setattr("training_common.artifacts.scrub.damages", slow)
    calls = [asyncio.ensure_future(up.verify()) for _ in range(2)]
    for _ in calls:
        await reading.acquire()
    with pytest.raises(ResourceExhaustedError, match="2 verifications are under way"):
        await up.verify()
    calls[0].cancel()
    await asyncio.gather(calls[0], return_exceptions=True)
    third: Any = None
    while third is None or (third.done() and isinstance(third.exception(), ForgeError)):
        third = asyncio.ensure_future(up.verify())
        await asyncio.wait([third, asyncio.ensure_future(reading.acquire())], return_when=asyncio.FIRST_COMPLETED)
    go_on.set()
    assert ([], 1) == ((found := await third)[0], found[1].versions)
    await calls[1]


# --- forge artifacts


def printed(result: Result) -> list[str]:
    """Return what a command printed. The server runs in this process, and its log lands there too."""
    return [line for line in result.stdout.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]


async def test_forge_keeps_and_verifies(up: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command does what it says, and a damaged file decides the exit code."""
    address = up.client.addresses[0]
    nobody = "unix:/nonexistent/forge.sock"
    cognate = up.family == "cognate-25m"
    monkeypatch.setenv("FORGE_COGNATE", address if cognate else nobody)
    monkeypatch.setenv("FORGE_AGENT", nobody if cognate else address)
    service = "cognate" if cognate else "agent"

    async def forge(*args: str, expect: Exit = Exit.OK) -> Result:
        result = await asyncio.to_thread(
            lambda: CliRunner().invoke(app, ["artifacts", *args, "--service", service], catch_exceptions=False)
        )
        assert expect == result.exit_code, result.stderr
        return result

    first, second = (up.publish(up.folder, **more) for more in payloads(up, 2))
    assert f"{first.name} is in tier STANDARD, pinned" in (await forge("pin", first.name)).stderr
    assert "is pinned" in (await forge("collect", first.name, expect=Exit.PRECONDITION)).stderr
    await forge("unpin", first.name)
    assert f"{first.name} is in tier ARCHIVE" in (await forge("archive", first.name)).stderr
    [restored] = printed(await forge("restore", first.name, "--json"))
    assert (first.name, "STANDARD") == ((found := json.loads(restored))["name"], found["tier"])
    assert "2 versions" in (await forge("verify")).stderr
    file = second.files[0]
    flip(blob_of(up.folder, file.digest), 9)
    damaged = [second.name] if cognate else [first.name, second.name]  # agents of these tests share their bytes
    told = printed(await forge("verify", up.family, expect=Exit.CORRUPT))
    assert [f"{name} {file.path}: its stored bytes" for name in damaged] == [
        line.partition(" are ")[0] for line in told
    ]
    frames = [json.loads(line) for line in printed(await forge("verify", "--json", expect=Exit.CORRUPT))]
    assert [*damaged, None] == [frame.get("damage", {}).get("name") for frame in frames]
    assert len(damaged) == frames[-1]["damaged_files"]
    dry = await forge("collect", first.name, "--dry-run")
    assert "would be collected" in dry.stderr
    assert [second.name, first.name] == await up.names()
    assert printed(dry) == printed(await forge("collect", first.name))
    assert [second.name] == await up.names()
    await forge("verify", first.name, expect=Exit.NOT_FOUND)


async def test_forge_verifies_what_answers(up: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name both services are asked; one that is away is told, and hides nothing of the other."""
    up.publish(up.folder)
    nobody = "unix:/nonexistent/forge.sock"
    cognate = up.family == "cognate-25m"
    monkeypatch.setenv("FORGE_COGNATE", up.client.addresses[0] if cognate else nobody)
    monkeypatch.setenv("FORGE_AGENT", nobody if cognate else up.client.addresses[0])
    for command in ("verify", "collect"):
        arguments = ["artifacts", command, "--timeout", "1"]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert Exit.UNAVAILABLE == result.exit_code
        assert f"{'cognate' if cognate else 'agent'}: " in result.stderr
