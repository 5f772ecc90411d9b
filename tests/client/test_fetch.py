"""A fetch brings an artifact whole and checked, or leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import random
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from cognateforge import exceptions
from cognateforge.client import CognateClient, FetchedArtifact
from cognateforge.client.fetch import Landing, Wanted
from tests.client.fakes import Artifact, Driver, Fake, driver, progress_events
from tests.support.proxy import FaultyProxy
from tests.support.waiting import until


def names(folder: Path) -> list[str]:
    """Return what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def partial_of(folder: Path) -> Path:
    """Return the only partial folder."""
    [partial] = folder.glob(".partial-*")
    return partial


def assert_landed(got: FetchedArtifact, artifact: Artifact) -> None:
    """The destination holds files, manifest, the signature if there is one, and nothing else; no partial is left."""
    found = {str(path.relative_to(got.path)): path.read_bytes() for path in got.path.rglob("*") if path.is_file()}
    signature = {"model.sig": artifact.signature} if artifact.signature else {}
    assert {**artifact.files, "manifest.json": artifact.manifest, **signature} == found
    assert list(got.path.parent.glob(".partial-*")) == []
    assert (artifact.name, artifact.digest, len(artifact.payload)) == (got.name, got.digest, got.size_bytes)
    assert json.loads(artifact.manifest) == got.manifest


async def test_a_model_lands_whole(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """Files in folders, empty files and the manifest; the newest version's exact name; progress to the last byte."""
    seen: list[tuple[int, int]] = []
    got = await client.fetch(tmp_path / "deep" / "model", on_progress=lambda done, total: seen.append((done, total)))
    assert_landed(got, fake.model)
    assert len(fake.model.payload) == got.bytes_received
    assert (got.size_bytes, got.size_bytes) == seen[-1]
    assert sorted(seen) == seen


async def test_an_agent_lands_whole(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """The same for agents, by an alias."""
    assert_landed(await client.fetch_agent(tmp_path / "agent", "intent-router@production"), fake.agent)


@pytest.mark.parametrize("seed", range(3))
async def test_a_fetch_resumes_at_its_offset(client: Driver, fake: Fake, tmp_path: Path, seed: int) -> None:
    """Streams cut at random offsets: every byte is sent once, and the digests hold."""
    pick = random.Random(seed)  # noqa: S311
    fake.model.cuts = deque(pick.randint(1, 2500) for _ in range(6))
    got = await client.fetch(tmp_path / "model")
    assert_landed(got, fake.model)
    assert len(fake.model.payload) == got.bytes_received == fake.model.sent_bytes
    offsets = [call.request.offset_bytes for call in fake.script.calls if call.method == "FetchModel"]
    assert len(offsets) > 3
    assert sorted(offsets) == offsets


async def test_a_new_process_resumes_what_another_left(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """A fetch that gave up leaves its bytes; the next one hashes them again and asks only for the rest."""
    fake.model.cuts = deque([8500, *[0] * 50])
    with pytest.raises(exceptions.UnavailableError):
        await client.fetch(tmp_path / "model", give_up_after_s=0.1)
    assert not (tmp_path / "model").exists()
    fake.model.cuts.clear()
    got = await client.fetch(tmp_path / "model")
    assert_landed(got, fake.model)
    assert len(fake.model.payload) - 8500 == got.bytes_received


@pytest.mark.parametrize("cut", [None, 8500])
async def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    client: Driver, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int | None
) -> None:
    """Also those that an earlier process has brought, which may have ended before it flushed them."""
    if cut is not None:
        fake.model.cuts = deque([cut, *[0] * 50])
        with pytest.raises(exceptions.UnavailableError):
            await client.fetch(tmp_path / "model", give_up_after_s=0.1)
        fake.model.cuts.clear()
    flushed, named = set[int](), list[set[int]]()
    fsync, rename = os.fsync, os.rename

    def told(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def renamed(source: Path, target: Path) -> None:
        named.append(set(flushed))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "rename", renamed)
    got = await client.fetch(tmp_path / "model")
    assert_landed(got, fake.model)
    assert len(named) == 1
    assert {(got.path / path).stat().st_ino for path in fake.model.files} <= named[0]


async def test_a_signature_lands_beside_the_files(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """Of models and of agents; a second fetch finds it there, and nothing is transferred."""
    fake.model.signature = fake.agent.signature = b'{"a": "signature"}'
    assert_landed(await client.fetch(tmp_path / "model"), fake.model)
    assert_landed(await client.fetch_agent(tmp_path / "agent", "intent-router@production"), fake.agent)
    again = await client.fetch(tmp_path / "model")
    assert_landed(again, fake.model)
    assert 0 == again.bytes_received


@pytest.mark.parametrize("left", [b"", b'{"ano', b'{"another": "one"}'], ids=["missing", "torn", "other"])
async def test_a_signature_survives_a_fetch_that_was_cut(
    client: Driver, fake: Fake, tmp_path: Path, left: bytes
) -> None:
    """Whatever an earlier process left in its place, the destination has the one that the service tells."""
    fake.model.signature = b'{"a": "signature"}'
    fake.model.cuts = deque([8500, *[0] * 50])
    with pytest.raises(exceptions.UnavailableError):
        await client.fetch(tmp_path / "model", give_up_after_s=0.1)
    signature = partial_of(tmp_path) / "model.sig"
    assert fake.model.signature == signature.read_bytes()
    signature.write_bytes(left) if left else signature.unlink()
    fake.model.cuts.clear()
    got = await client.fetch(tmp_path / "model")
    assert_landed(got, fake.model)
    assert len(fake.model.payload) - 8500 == got.bytes_received


async def test_a_signature_that_is_told_no_more_does_not_stay(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """What lies beside the files is this version's or nothing."""
    fake.model.signature = b'{"a": "signature"}'
    fake.model.cuts = deque([8500, *[0] * 50])
    with pytest.raises(exceptions.UnavailableError):
        await client.fetch(tmp_path / "model", give_up_after_s=0.1)
    fake.model.cuts.clear()
    fake.model.signature = b""
    assert_landed(await client.fetch(tmp_path / "model"), fake.model)


async def test_bytes_that_went_bad_on_disk_are_fetched_again(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """Bytes of an earlier process that no longer hash right cost a second transfer, never a wrong artifact."""
    fake.model.cuts = deque([5000, *[0] * 50])
    with pytest.raises(exceptions.UnavailableError):
        await client.fetch(tmp_path / "model", give_up_after_s=0.1)
    fake.model.cuts.clear()
    partial = partial_of(tmp_path)
    weights = partial / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert_landed(await client.fetch(tmp_path / "model"), fake.model)


async def test_a_wrong_byte_leaves_nothing(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """ArtifactCorruptError that names the file; neither destination nor partial folder stays."""
    fake.model.tamper = lambda payload: payload[:4000] + bytes([payload[4000] ^ 1]) + payload[4001:]
    with pytest.raises(exceptions.ArtifactCorruptError, match=r"model\.safetensors"):
        await client.fetch(tmp_path / "model")
    assert names(tmp_path) == []


@pytest.mark.parametrize("tamper", [lambda p: p + b"more", lambda p: p[:100] + p[200:] + bytes(100)])
async def test_a_payload_of_another_shape_is_refused(
    client: Driver, fake: Fake, tmp_path: Path, tamper: object
) -> None:
    """Too many bytes, or bytes in the wrong place."""
    fake.model.tamper = tamper  # type: ignore[assignment]
    with pytest.raises(exceptions.ArtifactCorruptError):
        await client.fetch(tmp_path / "model")
    assert names(tmp_path) == []


async def test_a_manifest_with_another_digest_is_refused(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """The registry's digest decides, before a byte is written."""
    fake.model.digest_override = f"sha256:{hashlib.sha256(b'other').hexdigest()}"
    with pytest.raises(exceptions.ArtifactCorruptError, match="the registry says"):
        await client.fetch(tmp_path / "model")
    assert names(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "sha256:../../evil", "sha256:" + "0" * 63 + "\n", "md5:0"])
async def test_a_digest_that_is_none_is_refused(client: Driver, fake: Fake, tmp_path: Path, digest: str) -> None:
    """It would name a folder."""
    fake.model.digest_override = digest
    fake.model.cuts = deque([0] * 50)
    with pytest.raises(exceptions.ArtifactCorruptError, match="sha256"):
        await client.fetch(tmp_path / "out" / "model")
    assert names(tmp_path) == []


DIGEST = f"sha256:{hashlib.sha256(b'x').hexdigest()}"


@pytest.mark.parametrize(
    "paths",
    [
        ["../evil"],
        ["a/../../evil"],
        ["/etc/evil"],
        ["a//b"],
        ["./a"],
        [".hidden"],
        ["a\\..\\b", "c"],
        ["a\n"],
        [""],
        ["manifest.json"],
        ["Manifest.JSON"],
        ["Model.sig"],
        ["a", "A"],
        ["a", "a/b"],
        ["x" * 256],
        ["é"],
    ],
)
async def test_a_path_that_leads_out_is_refused(fake: Fake, tmp_path: Path, paths: list[str]) -> None:
    """Every path stays inside the folder, and none names what another does."""
    files = [{"path": path, "size_bytes": 1, "digest": DIGEST} for path in paths]
    fake.model.manifest_override = json.dumps({"files": files}).encode()
    with CognateClient(fake.address) as client, pytest.raises(exceptions.ArtifactCorruptError):
        client.fetch_model("cognate-25m", tmp_path / "out" / "model")
    assert names(tmp_path / "out") == []
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "manifest",
    [
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({"files": [{"path": "a"}]}).encode(),
        json.dumps({"files": [{"path": "a", "size_bytes": -1, "digest": DIGEST}]}).encode(),
        json.dumps({"files": [{"path": "a", "size_bytes": True, "digest": DIGEST}]}).encode(),
        json.dumps({"files": [{"path": "a", "size_bytes": 1, "digest": "md5:1"}]}).encode(),
        json.dumps({"files": [{"path": f"f{i}", "size_bytes": 0, "digest": DIGEST} for i in range(65)]}).encode(),
    ],
)
def test_a_manifest_that_is_none_is_refused(fake: Fake, tmp_path: Path, manifest: bytes) -> None:
    """Whatever the registry vouches for, the form must hold."""
    fake.model.manifest_override = manifest
    with CognateClient(fake.address) as client, pytest.raises(exceptions.ArtifactCorruptError):
        client.fetch_model("cognate-25m", tmp_path / "model")
    assert names(tmp_path) == []


async def test_a_symlink_in_the_partial_folder_leads_nowhere(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """A planted link is not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    fake.model.cuts = deque([7800, *[0] * 50])
    with pytest.raises(exceptions.UnavailableError):
        await client.fetch(tmp_path / "model", give_up_after_s=0.1)
    fake.model.cuts.clear()
    partial = partial_of(tmp_path)
    for child in (partial / "tokenizer").iterdir():
        child.unlink()
    (partial / "tokenizer").rmdir()
    (partial / "tokenizer").symlink_to(outside)
    with pytest.raises(exceptions.LocalStorageError, match="leads outside"):
        await client.fetch(tmp_path / "model")
    assert names(outside) == []


async def test_what_is_there_is_not_transferred(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """The same digest at the destination: checked, returned, nothing sent."""
    await client.fetch(tmp_path / "model")
    got = await client.fetch(tmp_path / "model")
    assert_landed(got, fake.model)
    assert got.bytes_received == 0
    assert fake.script.count("FetchModel") == 1


async def test_a_destination_with_something_else_is_left_alone(client: Driver, tmp_path: Path) -> None:
    """Other files, or a damaged copy: the error says what to remove, nothing is overwritten."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(exceptions.LocalStorageError, match="remove it, or choose another"):
        await client.fetch(tmp_path / "mine")
    await client.fetch(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(exceptions.LocalStorageError, match="fetch again"):
        await client.fetch(tmp_path / "model")
    assert names(tmp_path) == ["mine", "model"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


async def test_an_empty_destination_is_taken(client: Driver, fake: Fake, tmp_path: Path) -> None:
    """A folder that was made for the purpose is no obstacle."""
    (tmp_path / "model").mkdir()
    assert_landed(await client.fetch(tmp_path / "model"), fake.model)


def test_two_fetches_of_one_artifact_transfer_it_once(fake: Fake, tmp_path: Path) -> None:
    """The second waits for the first, and finds its work done."""
    fake.script.gate = threading.Event()
    got: list[FetchedArtifact] = []

    def fetch() -> None:
        with CognateClient(fake.address) as client:
            got.append(client.fetch_model("cognate-25m", tmp_path / "model"))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert fake.script.arrived.acquire(timeout=10)
    fake.script.gate.set()
    for thread in threads:
        thread.join(20)
    assert [0, 0, 0, len(fake.model.payload)] == sorted(one.bytes_received for one in got)
    assert_landed(got[0], fake.model)


def test_a_partial_folder_that_goes_away_while_it_is_made_is_made_anew(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when it is to be made, and gone when one looks what is there."""
    landing = Landing(Wanted(name=fake.model.name, digest=fake.model.digest), tmp_path / "model")
    landing.partial.mkdir(parents=True)
    is_dir = Path.is_dir

    def gone(path: Path, **options: bool) -> bool:
        if path == landing.partial:
            os.rmdir(path)
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", gone)
    assert landing.open() is None
    landing.close()


def test_a_partial_folder_that_goes_away_before_it_is_opened_is_made_anew(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another fetch may end between the two, which renames or removes the folder."""
    folders = []
    open_ = os.open

    def opened(path: Path, flags: int) -> int:
        folders.append(path)
        if len(folders) == 1:
            os.rmdir(path)
        return open_(path, flags)

    monkeypatch.setattr("cognateforge.client.fetch.os.open", opened)
    landing = Landing(Wanted(name=fake.model.name, digest=fake.model.digest), tmp_path / "model")
    assert landing.open() is None
    landing.close()
    assert folders == [landing.partial] * 2


async def test_a_cancelled_fetch_lets_go_of_its_folder(fake: Fake, tmp_path: Path) -> None:
    """While it waits for another fetch, or in the middle of its own: the next fetch is not held up."""
    holder = Landing(Wanted(name=fake.model.name, digest=fake.model.digest), tmp_path / "model")
    holder.open()
    async with driver("aio", fake.address) as client:
        waiting = asyncio.create_task(client.fetch(tmp_path / "model"))
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        holder.close()
        fake.model.cuts = deque([8500, *[0] * 1000])
        halfway = asyncio.create_task(client.fetch(tmp_path / "model"))
        await until(lambda: fake.model.sent_bytes >= 8500)
        halfway.cancel()
        with pytest.raises(asyncio.CancelledError):
            await halfway
        fake.model.cuts.clear()
        assert_landed(await client.fetch(tmp_path / "model"), fake.model)


async def test_cut_connections_are_resumed(kind: str, fake: Fake, tmp_path: Path) -> None:
    """Real TCP connections that are reset in the middle, for a fetch and for a watch."""
    fake.model.files["model.safetensors"] = random.Random(3).randbytes(300_000)  # noqa: S311
    fake.history.events = progress_events(400)
    proxy = FaultyProxy(fake.port, after_bytes=[100_000, 3_000, 150_000, 2_000, 9_000, 12_000])
    try:
        async with driver(kind, proxy.address) as client:
            assert_landed(await client.fetch(tmp_path / "model"), fake.model)
            assert len(fake.model.payload) <= fake.model.sent_bytes
            frames = await client.watch()
            assert [frame.event.sequence for frame in frames[:-1]] == list(range(1, 401))
        assert proxy.cut >= 3
    finally:
        proxy.close()


async def test_a_full_disk_is_a_clear_error(
    client: Driver, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the transfer where it can be foreseen, and during it otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(exceptions.LocalStorageError, match=r"needs 10988 bytes.* has 10"):
            await client.fetch(tmp_path / "model")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Landing, "_close_finished_files", full)
    with pytest.raises(exceptions.LocalStorageError, match=r"No space left.*free some space"):
        await client.fetch(tmp_path / "model")


async def test_a_folder_that_refuses_is_a_clear_error(client: Driver, tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(exceptions.LocalStorageError, match="choose another folder"):
        await client.fetch(tmp_path / "file" / "model")
