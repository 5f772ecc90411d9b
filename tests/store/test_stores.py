"""What every store of bytes promises: a folder and a real S3 server, each with an archive of the other kind."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cognateforge.exceptions import ArtifactCorruptError, IntegrityCheckFailedError
from tests.support.proxy import FaultyProxy
from tests.support.s3 import S3Server
from tests.support.stored import Stored, a_bucket, a_folder
from training_common.artifacts import bucket, folder
from training_common.artifacts.blobs import BlobStore, ManifestExistsError, StoreAwayError, StoredFile
from training_common.artifacts.open import open_blobs, require_store
from training_common.digests import sha256_bytes
from training_common.settings import ServiceSettings, SettingsError

CONTENT = bytes(range(256)) * 37
MAKERS: dict[str, Callable[[Path, S3Server], Stored]] = {"folder": a_folder, "bucket": a_bucket}


@pytest.fixture(params=["folder", "bucket"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Stored:
    """Return an empty store, of each kind in turn."""
    return MAKERS[request.param](tmp_path, s3)


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of some thousand bytes be read in many parts."""
    monkeypatch.setattr(bucket, "_RANGE_BYTES", 1000)
    monkeypatch.setattr(bucket, "CHUNK_BYTES", 300)
    monkeypatch.setattr(folder, "CHUNK_BYTES", 300)


def put(blobs: BlobStore, tmp_path: Path, content: bytes, name: str = "weights.bin") -> StoredFile:
    source = tmp_path / "source"
    source.write_bytes(content)
    return blobs.put(source, name)


def payload(blobs: BlobStore, files: tuple[StoredFile, ...], offset_bytes: int = 0) -> bytes:
    """Return the bytes from an offset on, and hold every piece's offset against where it belongs."""
    found, position = [], offset_bytes
    for offset, piece in blobs.open_payload(files, offset_bytes):
        assert offset == position
        position += len(piece)
        found.append(piece)
    return b"".join(found)


def test_bytes_come_back_and_are_stored_once(stored: Stored, tmp_path: Path) -> None:
    """Put twice, under two names and at once by several, they are one object, whole, and nothing else stays."""
    blobs = stored.open()
    first = put(blobs, tmp_path, CONTENT)
    assert StoredFile(path="weights.bin", size_bytes=len(CONTENT), digest=sha256_bytes(CONTENT)) == first
    with ThreadPoolExecutor(8) as pool:
        others = set(pool.map(lambda n: blobs.put(tmp_path / "source", f"other-{n % 2}.bin"), range(8)))
    assert {first.digest} == {file.digest for file in others}
    assert first.digest == blobs.put_bytes(CONTENT)
    hexadecimal = first.digest.removeprefix("sha256:")
    assert [f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"] == stored.keys()
    assert CONTENT == payload(blobs, (first,)) == blobs.read(first.digest, len(CONTENT))
    assert (True, False) == (blobs.has(first.digest), blobs.has(sha256_bytes(b"")))
    blobs.check(first)
    empty = put(blobs, tmp_path, b"", "empty")
    blobs.check(empty)
    assert b"" == payload(blobs, (empty,)) == blobs.read(empty.digest, 0)


def test_a_payload_is_read_from_any_offset(stored: Stored, tmp_path: Path, small_ranges: None) -> None:
    """Over the borders of files, ranges and pieces, from every kind of place in them, to the end and behind it."""
    blobs = stored.open()
    contents = [CONTENT[:2500], b"", CONTENT[2500:3500], CONTENT[3500:3501], CONTENT[3501:5000]]
    files = tuple(put(blobs, tmp_path, content, f"{n}.bin") for n, content in enumerate(contents))
    whole = b"".join(contents)
    for offset in (0, 1, 299, 300, 301, 999, 1000, 1001, 2499, 2500, 2501, 3499, 3500, 3501, 4999, 5000):
        assert whole[offset:] == payload(blobs, files, offset), offset
    assert max(len(piece) for _, piece in blobs.open_payload(files, 0)) == 300


def test_a_manifest_is_put_once(stored: Stored) -> None:
    """What is there stays, whatever comes; another version and another family are other manifests."""
    blobs = stored.open()
    blobs.put_manifest("cognate-25m", 1, b"first")
    with pytest.raises(ManifestExistsError, match="cognate-25m@1 has a manifest already"):
        blobs.put_manifest("cognate-25m", 1, b"second")
    blobs.put_manifest("cognate-25m", 12, b"twelfth")
    blobs.put_manifest("router", 1, b"other")
    assert b"first" == blobs.read_manifest("cognate-25m", 1)
    assert {("cognate-25m", 1), ("cognate-25m", 12), ("router", 1)} == {
        (m.family, m.version) for m in blobs.manifests()
    }
    assert all(abs(m.modified_us / 1e6 - time.time()) < 60 for m in blobs.manifests())
    blobs.delete_manifest("cognate-25m", 1)
    blobs.delete_manifest("cognate-25m", 1)
    with pytest.raises(FileNotFoundError):
        blobs.read_manifest("cognate-25m", 1)


@pytest.mark.parametrize(
    ("damage", "problem", "told"),
    [
        (None, "MISSING", "its stored bytes .* are missing"),
        (CONTENT[:-1], "SIZE", f"{len(CONTENT) - 1} bytes are stored, not {len(CONTENT)}"),
        (CONTENT + b"x", "SIZE", f"{len(CONTENT) + 1} bytes are stored, not {len(CONTENT)}"),
        (CONTENT[:-1] + b"\xfe", "DIGEST", "its stored bytes are sha256:.*, not sha256:"),
    ],
    ids=["missing", "short", "long", "one-bit"],
)
def test_damage_is_told_by_file_and_kind(
    stored: Stored, tmp_path: Path, damage: bytes | None, problem: str, told: str
) -> None:
    """A check reads everything; bytes that have changed are not published again as if they were whole."""
    blobs = stored.open()
    file = put(blobs, tmp_path, CONTENT, "parts/weights.bin")
    if damage is None:
        stored.remove(file.digest)
    else:
        stored.replace(file.digest, damage)
    with pytest.raises(ArtifactCorruptError, match=rf"parts/weights\.bin: {told}") as caught:
        blobs.check(file)
    assert {"path": "parts/weights.bin", "digest": file.digest, "problem": problem} == caught.value.metadata
    with pytest.raises(ArtifactCorruptError):
        blobs.read(file.digest, len(CONTENT))
    if damage is not None:
        with pytest.raises(ArtifactCorruptError, match="have changed"):
            put(blobs, tmp_path, CONTENT)


def test_a_payload_ends_early_with_an_error_alone(stored: Stored, tmp_path: Path, small_ranges: None) -> None:
    """Bytes that are short or gone are told of where they end, at the border of a range too."""
    blobs = stored.open()
    file = put(blobs, tmp_path, CONTENT)
    for left in (2500, 2000):
        stored.replace(file.digest, CONTENT[:left])
        with pytest.raises(ArtifactCorruptError, match=rf"weights\.bin: stored bytes end at {left} of {len(CONTENT)}"):
            payload(blobs, (file,))
        with pytest.raises(ArtifactCorruptError, match=f"stored bytes end at {left + 5} of"):
            payload(blobs, (file,), left + 5)
    stored.remove(file.digest)
    with pytest.raises(ArtifactCorruptError, match=r"weights\.bin: its stored bytes .* are missing"):
        payload(blobs, (file,))


def test_no_more_is_read_than_asked_for(stored: Stored, tmp_path: Path) -> None:
    """Something large under a small file's digest is not taken into memory."""
    blobs = stored.open()
    file = put(blobs, tmp_path, CONTENT)
    with pytest.raises(ArtifactCorruptError, match=f"{len(CONTENT)} bytes are stored, and at most 100 are read"):
        blobs.read(file.digest, 100)


def test_bytes_move_to_the_archive_and_back(stored: Stored, tmp_path: Path, small_ranges: None) -> None:
    """They are read wherever they are, also while they move; a second call finds nothing to do."""
    blobs = stored.open()
    file, other = put(blobs, tmp_path, CONTENT), put(blobs, tmp_path, b"other", "other")
    reading = blobs.open_payload((file,), 0)
    begun = next(reading)[1]
    for _ in range(2):
        blobs.move(file.digest, to_archive=True)
        assert (1, 1) == (len(stored.keys()), len(stored.keys(archive=True)))
        blobs.check(file)
    assert CONTENT == begun + b"".join(piece for _, piece in reading)
    assert CONTENT == payload(blobs, (file,)) == blobs.read(file.digest, len(CONTENT))
    listed = {blob.digest: blob for blob in blobs.blobs()}
    assert {file.digest: True, other.digest: False} == {digest: blob.archived for digest, blob in listed.items()}
    assert (len(CONTENT), 5) == (listed[file.digest].size_bytes, listed[other.digest].size_bytes)
    assert all(abs(blob.modified_us / 1e6 - time.time()) < 60 for blob in listed.values())
    for _ in range(2):
        blobs.move(file.digest, to_archive=False)
        assert (2, 0) == (len(stored.keys()), len(stored.keys(archive=True)))
        blobs.check(file)


def test_a_move_that_was_cut_off_is_finished(stored: Stored, tmp_path: Path) -> None:
    """A copy that is whole is kept, one that is damaged is made again; the source goes only after it."""
    blobs = stored.open()
    for copy in (CONTENT, b"torn"):
        file = put(blobs, tmp_path, CONTENT)
        stored.replace(file.digest, copy, archive=True)
        blobs.move(file.digest, to_archive=True)
        assert [] == stored.keys()
        blobs.check(file)
        blobs.delete(file.digest)
        blobs.delete(file.digest)
        assert [] == stored.keys(archive=True)


def test_damaged_bytes_do_not_move(stored: Stored, tmp_path: Path) -> None:
    """The move is refused, and what there is stays where it is."""
    blobs = stored.open()
    file = put(blobs, tmp_path, CONTENT)
    stored.replace(file.digest, CONTENT[::-1])
    with pytest.raises(ArtifactCorruptError, match="have changed; they were not moved"):
        blobs.move(file.digest, to_archive=True)
    assert (1, 0) == (len(stored.keys()), len(stored.keys(archive=True)))


@pytest.mark.slow
def test_one_of_sixteen_processes_gets_a_name(stored: Stored) -> None:
    """20 rounds: exactly one wins, the others are told so, its bytes are there, and nothing else is."""
    rounds, publishers = 20, 16
    given = {"files_dir": str(stored.files_dir), "url": stored.url, "options": dict(stored.options)}
    order = json.dumps({"stored": given, "rounds": rounds, "publishers": publishers})
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.race", order], capture_output=True, check=False, timeout=120
    )
    assert 0 == run.returncode, run.stderr.decode()[-3000:]
    results = json.loads(run.stdout)
    blobs = stored.open()
    for number in range(1, rounds + 1):
        told = [result[number - 1] for result in results]
        [winner] = [publisher for publisher, text in enumerate(told) if text == "won"]
        assert [f"cognate-25m@{number} has a manifest already"] * (publishers - 1) == [t for t in told if t != "won"]
        assert b"%d" % winner * 10_000 == blobs.read_manifest("cognate-25m", number)
    assert sorted(f"manifests/cognate-25m/{number}.json" for number in range(1, rounds + 1)) == stored.keys()


@pytest.mark.parametrize("name", ["../weights", "/weights", "a//b", "a b", "x" * 256])
def test_a_name_that_no_client_takes_is_not_stored(stored: Stored, tmp_path: Path, name: str) -> None:
    """It would be published and could never be fetched."""
    with pytest.raises(IntegrityCheckFailedError, match="no path of a file that can be published"):
        put(stored.open(), tmp_path, CONTENT, name)
    assert [] == stored.keys()


def test_large_files_go_into_a_bucket_in_parts(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or not at all there too: bytes that change while they are sent, or a sender that dies, leave nothing."""
    monkeypatch.setattr(bucket, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(bucket, "_PART_BYTES", 5 << 20)  # S3's least
    stored = Stored(files_dir=tmp_path, url=s3.new_url(), options=s3.options)
    blobs = stored.open()
    content = CONTENT * 1200
    file = put(blobs, tmp_path, content)
    blobs.check(file)
    assert file == put(blobs, tmp_path, content)
    (tmp_path / "source").write_bytes(content + b"1")
    monkeypatch.setattr(bucket, "sha256_file", lambda _path: sha256_bytes(content + b"2"))
    with pytest.raises(IntegrityCheckFailedError, match="written to while it was published"):
        blobs.put(tmp_path / "source", "changing.bin")
    assert 1 == len(stored.keys())


def test_what_a_killed_process_staged_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that were never given their name are nobody's: the next file that is put after a day clears them."""
    blobs = BlobStore(tmp_path / "artifacts")
    put(blobs, tmp_path, b"first")
    left = tmp_path / "artifacts" / "staged" / "left"
    left.write_bytes(b"wei")
    put(blobs, tmp_path, b"second")
    assert left.exists()
    monkeypatch.setattr(time, "time", lambda: left.stat().st_mtime + 86_401)
    assert 2 == len(list(blobs.blobs()))
    put(blobs, tmp_path, b"third")
    assert not left.exists()


def test_a_folder_among_what_was_staged_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here made it, so it stays, however old it is."""
    blobs = BlobStore(tmp_path / "artifacts")
    left = tmp_path / "artifacts" / "staged" / "left"
    left.mkdir(parents=True)
    monkeypatch.setattr(time, "time", lambda: left.stat().st_mtime + 86_401)
    put(blobs, tmp_path, b"first")
    assert left.is_dir()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "socket"])
def test_what_is_no_file_is_damage_and_holds_nobody_up(tmp_path: Path, kind: str) -> None:
    """A pipe would be waited for, by the event loop too, and a link hand out what its maker cannot read."""
    blobs = BlobStore(tmp_path / "artifacts")
    file = put(blobs, tmp_path, CONTENT)
    hexadecimal = file.digest.removeprefix("sha256:")
    path = tmp_path / "artifacts" / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(tmp_path / "source")
        case "folder":
            path.mkdir()
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
    for read in (lambda: blobs.check(file), lambda: payload(blobs, (file,)), lambda: blobs.read(file.digest, 1 << 20)):
        with pytest.raises(ArtifactCorruptError) as caught:
            read()
        assert "UNREADABLE" == caught.value.metadata["problem"]
    assert [] == list(blobs.blobs())
    with pytest.raises(ArtifactCorruptError, match="have changed"):
        put(blobs, tmp_path, CONTENT)


def test_a_store_that_is_away_says_nothing_of_its_bytes(tmp_path: Path, s3: S3Server) -> None:
    """Neither missing nor damaged: a scrub would raise a false alarm, and a publication would put everything again."""
    options = {**s3.options, "endpoint": "http://127.0.0.1:1"}
    blobs = Stored(files_dir=tmp_path, url="s3://models/x", options=options).open()
    file = StoredFile(path="weights.bin", size_bytes=1, digest=sha256_bytes(b"1"))
    asked: list[Callable[[], object]] = [
        lambda: blobs.check(file),
        lambda: blobs.has(file.digest),
        lambda: list(blobs.open_payload((file,), 0)),
        lambda: list(blobs.blobs()),
        lambda: blobs.put_manifest("cognate-25m", 1, b""),
    ]
    for ask in asked:
        with pytest.raises(StoreAwayError, match=r"store of artifacts \(artifacts.url\) cannot be used now"):
            ask()


def service(tmp_path: Path, **artifacts: object) -> ServiceSettings:
    return ServiceSettings.model_validate(
        {"address": "127.0.0.1:0", "data_dir": tmp_path / "data", "artifacts": artifacts}
    )


def test_a_service_that_never_answers_is_not_waited_for_with_a_manifest(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is put in a transaction that all other writers wait for, so the longest request of bytes is not its bound."""
    monkeypatch.setattr(bucket, "_SHORT_S", 1)
    proxy = FaultyProxy(int(s3.options["endpoint"].rpartition(":")[2]))
    try:
        options = {**s3.options, "endpoint": f"http://{proxy.address}"}
        blobs = Stored(files_dir=tmp_path, url=s3.new_url(), options=options).open()
        proxy.partition()
        begin_s = time.monotonic()
        with pytest.raises(StoreAwayError):
            blobs.put_manifest("cognate-25m", 1, b"{}" * 1000)
        assert time.monotonic() - begin_s < 20
    finally:
        proxy.close()


def test_settings_that_lead_nowhere_are_refused_with_the_remedy(tmp_path: Path, s3: S3Server) -> None:
    """At the start of a server: which setting it is, what is wrong, and what to do; no secret is shown."""
    good, url = dict(s3.options), s3.new_url()
    require_store(service(tmp_path, url=url, archive_url=str(tmp_path / "archive"), options=good))
    (tmp_path / "file").write_bytes(b"")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"url": "gs://models"}, r"artifacts\.url: it is neither a folder nor s3://BUCKET/PREFIX"),
        ({"url": "s3://user:word@models"}, r"artifacts\.url: it is neither a folder nor s3://"),
        ({"url": "s3://"}, r"artifacts\.url: s3:// cannot be opened: .*"),
        (
            {"url": str(tmp_path / "file" / "x")},
            r"artifacts\.url: .* cannot be written: Not a directory; give a folder",
        ),
        ({"url": "s3://no-such-bucket", "options": good}, r"no such bucket: create it, or correct the name"),
        ({"archive_url": "s3://no-such-bucket", "options": good}, r"artifacts\.archive_url: .* no such bucket"),
        ({"url": url, "options": {**good, "secret_access_key": "wrong-secret"}}, "refuses these credentials"),
        ({"url": url, "options": {**good, "access_key_id": "unknown"}}, "check access_key_id and secret_access_key"),
        ({"url": url, "options": {**good, "endpoint": "http://127.0.0.1:1"}}, "that its service is up"),
        ({"url": url, "options": {**good, "allow_http": "false"}}, "set artifacts.options.allow_http to true"),
        ({"url": url, "options": {**good, "colour": "red"}}, "'colour' is not valid"),
        ({"url": url, "options": {**good, "default_headers": "red"}}, "cannot be opened"),
    ]
    for artifacts, told in wrong:
        with pytest.raises(SettingsError, match=told) as caught:
            require_store(service(tmp_path, **artifacts))
        assert "secret-" not in str(caught.value)
        assert "wrong-secret" not in str(caught.value)


def test_a_service_without_a_url_keeps_its_folder(tmp_path: Path) -> None:
    """Stores of before are where they were, and nothing is made before something is published."""
    blobs = open_blobs(service(tmp_path))
    assert not (tmp_path / "data" / "artifacts").exists()
    file = put(blobs, tmp_path, b"weights")
    hexadecimal = file.digest.removeprefix("sha256:")
    assert b"weights" == (tmp_path / "data/artifacts/blobs/sha256" / hexadecimal[:2] / hexadecimal).read_bytes()
