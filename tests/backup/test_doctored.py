"""Backups whose every digest holds and that still are none: somebody else wrote them, or a release that is unknown."""

import base64
import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cognateforge.exceptions import ArtifactCorruptError, PreconditionError
from tests.backup.stores import opened, publish, service_of, settings_of
from training_common.backup.create import back_up
from training_common.backup.destination import FolderDestination, object_key
from training_common.backup.manifest import open_backup
from training_common.backup.prune import prune
from training_common.backup.restore import restore
from training_common.backup.verify import verify
from training_common.digests import canonical_json, sha256_bytes

COGNATE = service_of("cognate")
Body = dict[str, Any]
Doctor = Callable[[FolderDestination, Body], object]


@pytest.fixture
def place(tmp_path: Path) -> FolderDestination:
    """A place with a backup of a service with one version."""
    settings = settings_of("cognate", tmp_path / "service")
    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"first")
    place = FolderDestination(tmp_path / "backups")
    back_up(COGNATE, settings, place)
    return place


def doctored(place: FolderDestination, doctor: Doctor) -> str:
    """Put another manifest in the place of the only one, and return its id."""
    [entry] = place.entries("backups")
    body = json.loads(b"".join(place.pieces(entry.key)))
    changed = doctor(place, body)
    data = changed if isinstance(changed, bytes) else canonical_json(body)
    place.delete(entry.key)
    name = f"cognate-20261128T000000.000000Z-{sha256_bytes(data).removeprefix('sha256:')[:16]}"
    place.put(f"backups/{name}.json", iter([data]), len(data))
    return name


def lines(place: FolderDestination, listing: Body) -> list[Any]:
    data = (gzip.decompress(b"".join(place.pieces(object_key(one["digest"])))) for one in listing["segments"])
    return [json.loads(line) for text in data for line in text.splitlines()]


def listing(place: FolderDestination, lines: list[Any], data: bytes | None = None) -> Body:
    """Return a listing of other lines, all of whose digests hold. data: what its segment is instead."""
    text = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    data = gzip.compress(text, mtime=0) if data is None else data
    digest = sha256_bytes(data)
    place.put(object_key(digest), iter([data]), len(data))
    segment = {"digest": digest, "size_bytes": len(data), "lines": len(lines)}
    return {"lines": len(lines), "digest": sha256_bytes(text), "segments": [segment]}


def setting(name: str, value: Any) -> Doctor:
    return lambda _place, body: body.__setitem__(name, value)


def without(name: str) -> Doctor:
    return lambda _place, body: body.__delitem__(name)


def files(*changed: Any, data: bytes | None = None) -> Doctor:
    """Let the list of files be another one."""
    return lambda place, body: body.__setitem__("blobs", listing(place, list(changed), data))


def checkpoint(path: Any) -> Doctor:
    def doctor(place: FolderDestination, body: Body) -> None:
        digest, size_bytes, *_ = lines(place, body["blobs"])[0]
        body["checkpoints"] = listing(place, [[path, digest, size_bytes]])

    return doctor


def row(**changed: Any) -> Doctor:
    """Change columns of the version's row."""

    def doctor(place: FolderDestination, body: Body) -> None:
        table = next(table for table in body["tables"] if table["name"] == "artifacts")
        columns = [name for name, _ in table["shape"]["columns"]]
        [values] = lines(place, table["rows"])
        for name, value in changed.items():
            values[columns.index(name)] = value
        table["rows"] = listing(place, [values])

    return doctor


def row_of(manifest: bytes) -> Doctor:
    return row(manifest=base64.b64encode(manifest).decode(), digest=sha256_bytes(manifest))


def short_row(place: FolderDestination, body: Body) -> None:
    table = next(table for table in body["tables"] if table["name"] == "artifacts")
    table["rows"] = listing(place, [lines(place, table["rows"])[0][:-1]])


FORMS: dict[str, Doctor] = {
    "no JSON": lambda _place, _body: b"{",
    "no fields": lambda _place, _body: b"[]",
    "too deep": lambda _place, _body: b"[" * 100_000,
    "a field that is unknown": setting("more", 1),
    "a field that is missing": without("release"),
    "no list of files": without("blobs"),
    "no tables": setting("tables", [1]),
    "no moment": setting("snapshot_us", 10**30),
}
CONTENTS: dict[str, Doctor] = {
    "a digest that leads elsewhere": files(["sha256:../../../evil", 4, "x@1", "evil"]),
    "a size that is none": files([f"sha256:{'a' * 64}", "4", "x@1", "evil"]),
    "a line that is too short": files([f"sha256:{'a' * 64}"]),
    "no lines": files(data=b"no gzip at all"),
    "lines that are no JSON": files(data=gzip.compress(b"{{\n")),
    "files that are not told of": files(),
    "a checkpoint elsewhere": checkpoint("../../../evil"),
    "a checkpoint at the root": checkpoint("/evil"),
    "a checkpoint without a name": checkpoint(7),
    "a row that is too short": short_row,
    "a family that leads elsewhere": row(family="../../../evil"),
    "a number that no database holds": row(version=10**30),
    "a value of another kind": row(damage={"a": 1}),
    "a manifest of no bytes": row(manifest="!"),
    "a manifest that is no JSON": row_of(b"{"),
    "a manifest of other files": row_of(b'{"files":[{"path":"../evil","size_bytes":1,"digest":"x"}]}'),
}


@pytest.mark.parametrize("doctor", FORMS.values(), ids=FORMS.keys())
def test_a_manifest_of_another_form_is_refused(place: FolderDestination, doctor: Doctor) -> None:
    """It is named with the remedy, and a prune that cannot know what it names removes nothing."""
    name = doctored(place, doctor)
    with pytest.raises(ArtifactCorruptError, match=f"{name}.json is of a form that this release does not know"):
        open_backup(place, name)
    before = [entry.key for entry in place.entries("objects")]
    with pytest.raises(PreconditionError, match="is damaged"):
        prune(place, "cognate", keep=1)
    assert before == [entry.key for entry in place.entries("objects")]


@pytest.mark.parametrize("doctor", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_backup_that_does_not_agree_with_itself_is_refused(
    place: FolderDestination, tmp_path: Path, doctor: Doctor
) -> None:
    """In words, with nothing written outside of the place; it is read and pruned without a fault as well."""
    backup = open_backup(place, doctored(place, doctor))
    with pytest.raises((ArtifactCorruptError, PreconditionError)):
        restore(COGNATE, settings_of("cognate", tmp_path / "a" / "b" / "c"), place, backup)
    assert [] == list(tmp_path.rglob("*evil*"))
    verify(place, backup)
    with contextlib.suppress(PreconditionError):
        prune(place, "cognate", keep=1)
