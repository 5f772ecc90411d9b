"""Places for backups: one suite over a folder, memory, and a real S3."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from cognateforge.exceptions import ArtifactCorruptError, InvalidRequestError, LocalStorageError
from tests.backup.stores import opened, publish, service_of, settings_of
from training_common.backup.create import back_up
from training_common.backup.destination import (
    Destination,
    FolderDestination,
    ObjectDestination,
    checked,
    object_key,
    open_destination,
    read_object,
)
from training_common.backup.manifest import backup_ids, newest_backup
from training_common.backup.prune import prune
from training_common.backup.restore import restore
from training_common.backup.verify import verify
from training_common.digests import sha256_bytes

LARGE = bytes(range(256)) * 100_000  # more than one put of an object store takes


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Destination]:
    """Yield an empty place of each kind in turn."""
    if request.param == "folder":
        yield FolderDestination(tmp_path / "backups")
    elif request.param == "memory":
        yield ObjectDestination(MemoryStore())
    else:
        with open_destination(request.getfixturevalue("s3_backups")) as opened_place:
            yield opened_place


def pieces(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), 1 << 20):
        yield data[at : at + (1 << 20)]


@pytest.mark.parametrize("data", [b"", b"small", LARGE], ids=["empty", "small", "large"])
def test_what_is_put_is_read_again(place: Destination, data: bytes) -> None:
    """With its size in the list; put again it is replaced, deleted it is gone, and gone it can be deleted."""
    key = object_key(sha256_bytes(data))
    for _ in range(2):
        place.put(key, pieces(data), len(data))
    assert [(key, len(data))] == [(entry.key, entry.size_bytes) for entry in place.entries("objects")]
    assert data == b"".join(read_object(place, sha256_bytes(data), len(data), what="it"))
    assert [] == list(place.entries("backups"))
    for _ in range(2):
        place.delete(key)
    assert [] == list(place.entries("objects"))
    with pytest.raises(ArtifactCorruptError, match=f"it: {key} is missing"):
        list(read_object(place, sha256_bytes(data), len(data), what="it"))


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_bytes_that_are_not_those_of_the_digest_are_not_kept(place: Destination, data: bytes) -> None:
    """The digest is compared before anything is there under its name."""
    digest = sha256_bytes(b"other")
    with pytest.raises(ArtifactCorruptError, match=r"weights: its .* bytes have digest"):
        place.put(
            object_key(digest),
            checked(pieces(data), digest=digest, size_bytes=len(data), what="weights"),
            len(data),
        )
    assert [] == list(place.entries("objects"))


def test_of_those_that_race_for_a_key_one_wins(place: Destination) -> None:
    """A manifest is put once."""
    results: list[str] = []

    def put(number: int) -> None:
        try:
            place.put_once("backups/one", b"%d" % number)
            results.append("won")
        except FileExistsError:
            results.append("lost")

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["lost"] * 7 + ["won"] == sorted(results)


def test_a_service_is_backed_up_and_restored_from_any_place(place: Destination, tmp_path: Path) -> None:
    """Backup, second backup, verification, prune and restore, with files in several parts."""
    settings = settings_of("cognate", tmp_path / "a")
    with opened(settings) as registry:
        row = publish(registry, tmp_path / "made", LARGE)
    cognate = service_of("cognate")
    back_up(cognate, settings, place)
    made = back_up(cognate, settings, place)
    assert 0 == made.copied.objects
    assert 1 == prune(place, "cognate", keep=1).backups
    assert (0, [made.backup.id]) == (verify(place, made.backup).damaged, backup_ids(place))
    other = settings_of("cognate", tmp_path / "b")
    restore(cognate, other, place, newest_backup(place, "cognate"))
    with opened(other) as registry:
        assert row == registry.find(row.family, row.version)


def test_a_place_that_is_none_is_told(tmp_path: Path) -> None:
    """What is no folder, what is not there, and what no object store has as its scheme."""
    (tmp_path / "file").touch()
    for name, told in (
        (str(tmp_path / "file"), "is no folder"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
        ("foo://bucket/prefix", "is no place for backups"),
    ):
        with pytest.raises(InvalidRequestError, match=told), open_destination(name):
            pass


def test_an_object_store_that_is_away_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the insides of the library that asked it."""
    for name, value in (
        ("AWS_ENDPOINT", "http://127.0.0.1:9"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "very-secret"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    from_url: Any = importlib.import_module("obstore.store").from_url
    monkeypatch.setattr("obstore.store.from_url", lambda url: from_url(url, retry_config={"max_retries": 0}))
    with pytest.raises(LocalStorageError) as caught, open_destination("s3://bucket/prefix") as place:
        list(place.entries("backups"))
    assert caught.value.message.startswith("s3://bucket/prefix: ")
    assert "\n" not in caught.value.message
    assert "very-secret" not in caught.value.message
