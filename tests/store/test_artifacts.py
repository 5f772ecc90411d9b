"""Published versions: whole or not there, each number once, whoever races and wherever a process dies."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cognate_server.migrations
from cognateforge.exceptions import ArtifactCorruptError, IntegrityCheckFailedError
from training_common.artifacts.blobs import BlobStore, ManifestExistsError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import sha256_bytes
from training_common.store.database import Database

FAMILY = "cognate-25m"


def open_registry(folder: Path, store_url: str = "") -> ArtifactRegistry:
    url = store_url or f"sqlite:///{folder / 'store.db'}"
    return ArtifactRegistry(Database(url), BlobStore(folder / "artifacts"))


@pytest.fixture
def registry(tmp_path: Path, store_url: str) -> Iterator[ArtifactRegistry]:
    registry = open_registry(tmp_path, store_url)
    registry.database.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield registry
    registry.database.close()


def publish(
    registry: ArtifactRegistry, source: Path, *, family: str = FAMILY, name: str = "weights.bin"
) -> ArtifactRow:
    file = registry.blobs.put(source, name)
    with registry.database.write() as connection:
        return registry.publish(connection, family=family, state="READY", job="jobs/x", files=[file], body={})


def payload(registry: ArtifactRegistry, row: ArtifactRow) -> bytes:
    return b"".join(piece for _, piece in registry.blobs.open_payload(row.files, 0))


def stored(folder: Path) -> list[Path]:
    """Return every file of the blob store: bytes, manifests, and whatever was left half-written."""
    return sorted(path for path in (folder / "artifacts").rglob("*") if path.is_file())


def race(count: int, work: Callable[[int], object]) -> list[object]:
    """Run `work(n)` in so many threads at the same moment, and return their results or exceptions."""
    results: list[object] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_version_is_the_digest_of_its_manifest(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """What is in the database, in the folder and in the file agree."""
    (tmp_path / "weights").write_bytes(b"weights")
    row = publish(registry, tmp_path / "weights")
    assert (row.digest, row.size_bytes) == (sha256_bytes(row.manifest), 7)
    assert row.manifest == (tmp_path / "artifacts" / "manifests" / FAMILY / "1.json").read_bytes()
    assert row == registry.find(FAMILY, 1) == registry.find(FAMILY, None)
    assert [{"path": "weights.bin", "size_bytes": 7, "digest": sha256_bytes(b"weights")}] == row.body["files"]
    assert (None, None) == (registry.find(FAMILY, 2), registry.find("other", None))


def test_a_manifest_is_put_once(tmp_path: Path) -> None:
    """Of eight that race for one version exactly one wins, and its bytes stay."""
    blobs = BlobStore(tmp_path / "artifacts")
    for version in range(1, 11):
        results = race(8, lambda n, v=version: blobs.put_manifest(FAMILY, v, b"%d" % n * 100_000))  # type: ignore[misc]
        [winner] = [number for number, result in enumerate(results) if result is None]
        assert [ManifestExistsError] * 7 == [type(result) for n, result in enumerate(results) if n != winner]
        manifest = tmp_path / "artifacts" / "manifests" / FAMILY / f"{version}.json"
        assert b"%d" % winner * 100_000 == manifest.read_bytes()
    assert 10 == len(stored(tmp_path))


def test_racing_publications_get_numbers_of_their_own(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Each has its own connection, as workers have: none is lost or overwritten, and the outbox tells each once."""
    for number in range(8):
        (tmp_path / f"weights-{number}").write_bytes(b"%d" % number * 1000)

    def work(number: int) -> ArtifactRow:
        own = open_registry(tmp_path, registry.database.url)
        try:
            return publish(own, tmp_path / f"weights-{number}")
        finally:
            own.database.close()

    rows = race(8, work)
    assert [ArtifactRow] * 8 == [type(row) for row in rows]
    listed = registry.page(limit=20)
    assert list(range(8, 0, -1)) == [row.version for row in listed]
    for number, row in enumerate(rows):
        assert isinstance(row, ArtifactRow)
        assert b"%d" % number * 1000 == payload(registry, row)
        assert row.manifest == (tmp_path / "artifacts" / "manifests" / FAMILY / f"{row.version}.json").read_bytes()
    events = registry.events_after(0, 20)
    assert list(range(1, 9)) == [event.sequence for event in events] == [event.artifact.version for event in events]


def test_bytes_are_visible_whole_or_not_at_all(tmp_path: Path) -> None:
    """While several write the same large file, a reader never sees a part of it under its digest."""
    content = bytes(range(256)) * 80_000
    (tmp_path / "weights").write_bytes(content)
    blobs = BlobStore(tmp_path / "artifacts")
    digest = sha256_bytes(content).removeprefix("sha256:")
    blob = tmp_path / "artifacts" / "blobs" / "sha256" / digest[:2] / digest
    sizes: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            if blob.exists():
                sizes.add(blob.stat().st_size)

    reader = threading.Thread(target=look)
    reader.start()
    files = race(4, lambda _: blobs.put(tmp_path / "weights", "weights.bin"))
    ended.set()
    reader.join()
    assert 1 == len(set(files)), files
    assert {len(content)} == sizes | {blob.stat().st_size}
    assert [blob] == stored(tmp_path)
    assert content == blob.read_bytes()


def test_a_rolled_back_publication_is_not_told(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Version and outbox entry go with whatever else the transaction holds."""
    (tmp_path / "weights").write_bytes(b"weights")
    file = registry.blobs.put(tmp_path / "weights", "weights.bin")
    with pytest.raises(KeyError), registry.database.write() as connection:
        registry.publish(connection, family=FAMILY, state="READY", job="jobs/x", files=[file], body={})
        raise KeyError
    assert ([], 0) == (registry.page(limit=9), registry.newest_sequence())


@pytest.mark.parametrize("damage", [b"weight", b"weightS", b""], ids=["short", "flipped", "empty"])
def test_bytes_that_changed_are_not_published_again(registry: ArtifactRegistry, tmp_path: Path, damage: bytes) -> None:
    """Bytes that are there already are trusted only if they still have the digest they are stored under."""
    (tmp_path / "weights").write_bytes(b"weights")
    publish(registry, tmp_path / "weights")
    [blob] = [path for path in stored(tmp_path) if "blobs" in path.parts]
    blob.write_bytes(damage)
    with pytest.raises(ArtifactCorruptError, match=r"stored bytes of other\.bin .* have changed"):
        publish(registry, tmp_path / "weights", name="other.bin")
    assert [1] == [row.version for row in registry.page(limit=9)]


def test_missing_bytes_are_told_when_they_are_read(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """A lost or cut file ends the payload with an error, never early."""
    (tmp_path / "weights").write_bytes(b"weights")
    row = publish(registry, tmp_path / "weights")
    [blob] = [path for path in stored(tmp_path) if "blobs" in path.parts]
    blob.write_bytes(b"wei")
    with pytest.raises(ArtifactCorruptError, match=r"weights\.bin: stored bytes end at 3 of 7"):
        payload(registry, row)
    blob.unlink()
    with pytest.raises(ArtifactCorruptError, match=r"weights\.bin: its stored bytes .* are missing"):
        payload(registry, row)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../weights", "/weights", "a//b", "a/../b", "a/", ".hidden", "a b", "a\\b", "ä", "x" * 256]
)
def test_a_file_name_that_no_client_takes_is_not_stored(tmp_path: Path, name: str) -> None:
    """It would be published and could never be fetched."""
    (tmp_path / "weights").write_bytes(b"weights")
    blobs = BlobStore(tmp_path / "artifacts")
    with pytest.raises(IntegrityCheckFailedError, match="no path of a file that can be published"):
        blobs.put(tmp_path / "weights", name)
    assert [] == stored(tmp_path)
    assert "parts/weights-1.bin" == blobs.put(tmp_path / "weights", "parts/weights-1.bin").path


@pytest.mark.parametrize("family", ["", ".", "..", "../../outside", "/outside", "a/../../b"])
def test_a_family_never_leads_out_of_the_folder(registry: ArtifactRegistry, tmp_path: Path, family: str) -> None:
    """The contract refuses such names long before; the store has its own lock."""
    (tmp_path / "weights").write_bytes(b"weights")
    before = sorted(tmp_path.rglob("*.json"))
    with pytest.raises(ValueError, match="leads out of its folder"):
        publish(registry, tmp_path / "weights", family=family)
    assert before == sorted(tmp_path.rglob("*.json")) == []
    assert [] == registry.page(limit=9)


def test_canonical_manifests_hold_no_number_that_json_lacks(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """A NaN among the results is refused before anything is numbered."""
    (tmp_path / "weights").write_bytes(b"weights")
    file = registry.blobs.put(tmp_path / "weights", "weights.bin")
    with pytest.raises(ValueError, match="not JSON compliant"), registry.database.write() as connection:
        registry.publish(
            connection, family=FAMILY, state="READY", job="jobs/x", files=[file], body={"loss": float("nan")}
        )
    assert 1 == publish(registry, tmp_path / "weights").version


def test_a_manifest_that_no_message_holds_is_refused(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Published, it could never be fetched: the error tells the sizes and the remedy, and no version is taken."""
    source = tmp_path / "weights"
    source.write_bytes(b"x")
    file = registry.blobs.put(source, "weights.bin")
    body = {"labels": ["x" * 128] * 8192}
    with (
        pytest.raises(IntegrityCheckFailedError, match="at most 1048576 can be fetched: use fewer"),
        registry.database.write() as connection,
    ):
        registry.publish(connection, family=FAMILY, state="READY", job="jobs/x", files=[file], body=body)
    assert registry.find(FAMILY, None) is None
    assert f"{FAMILY}@1" == publish(registry, source).name
