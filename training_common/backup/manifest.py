"""What a backup is: one small file that names everything in it by digest. Without it there is no backup."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cognateforge.exceptions import ArtifactCorruptError, NotFoundError
from training_common.backup.destination import MANIFESTS, Destination
from training_common.backup.rows import Shape
from training_common.backup.segments import Listing, Segment
from training_common.digests import canonical_json, sha256_bytes

SCHEMA = "cognateforge.backup/1"
_YEAR_10000_US = 253_402_300_800 * 10**6
# Of the manifest's own digest, in its id: enough to tell that it is damaged.
_ID_DIGITS = 16
_ID = re.compile(rf"(?P<service>[a-z]+)-(?P<time>\d{{8}}T\d{{6}}\.\d{{6}}Z)-(?P<digest>[0-9a-f]{{{_ID_DIGITS}}})")


@dataclass(frozen=True, kw_only=True)
class TableDump:
    """A table's rows, as `rows` writes them."""

    name: str
    shape: Shape
    rows: Listing


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Bytes that a version names and the backup lacks, because they were not whole where they were stored."""

    digest: str
    version: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class BackupManifest:
    """Everything in one backup.

    snapshot_us, end_us: the moment that the rows are of, and when the backup was complete.
    revision: of the schema. server: who made it.
    blobs: lines of digest, size, version and file, for each digest once. checkpoints: lines of path, digest and size.
    """

    service: str
    release: str
    revision: str
    server: str
    snapshot_us: int
    end_us: int
    tables: tuple[TableDump, ...]
    versions: int
    blobs: Listing
    blob_bytes: int
    missing: tuple[Missing, ...]
    checkpoints: Listing
    checkpoint_bytes: int

    @property
    def whole(self) -> bool:
        """Whether no bytes of a version are missing."""
        return not self.missing

    @property
    def rows(self) -> int:
        """Return the count of all rows."""
        return sum(table.rows.lines for table in self.tables)

    @property
    def listings(self) -> Iterator[Listing]:
        """Yield everything that has segments."""
        yield from (table.rows for table in self.tables)
        yield self.blobs
        yield self.checkpoints

    def table(self, name: str) -> TableDump:
        """Return one table."""
        return next(table for table in self.tables if table.name == name)


@dataclass(frozen=True, kw_only=True)
class Backup:
    """A backup that is kept: its id and what is in it."""

    id: str
    manifest: BackupManifest


def put_manifest(destination: Destination, manifest: BackupManifest) -> Backup:
    """Keep a manifest, which makes a backup of what it names."""
    data = canonical_json({"schema": SCHEMA, **asdict(manifest)})
    moment = datetime.datetime.fromtimestamp(manifest.snapshot_us / 1e6, datetime.UTC)
    digits = sha256_bytes(data).removeprefix("sha256:")[:_ID_DIGITS]
    name = f"{manifest.service}-{moment:%Y%m%dT%H%M%S.%fZ}-{digits}"
    destination.put_once(_key(name), data)
    return Backup(id=name, manifest=manifest)


def _key(name: str) -> str:
    return f"{MANIFESTS}/{name}.json"


def backup_ids(destination: Destination, service: str = "") -> list[str]:
    """Return the ids of all backups, or of one service's, the oldest first."""
    found = []
    for entry in destination.entries(MANIFESTS):
        match = _ID.fullmatch(entry.key.removeprefix(f"{MANIFESTS}/").removesuffix(".json"))
        if match and service in ("", match["service"]):
            found.append((match["time"], match[0]))
    return [name for _, name in sorted(found)]


def open_backup(destination: Destination, name: str) -> Backup:
    """Return a backup by its id. Errors: NotFoundError; ArtifactCorruptError, for a damaged manifest."""
    match, key = _ID.fullmatch(name), _key(name)
    try:
        data = b"".join(destination.pieces(key)) if match else None
    except FileNotFoundError:
        data = None
    if match is None or data is None:
        raise NotFoundError(f"there is no backup {name}; `forge backups list` shows those that there are")
    if sha256_bytes(data).removeprefix("sha256:")[:_ID_DIGITS] != match["digest"]:
        raise ArtifactCorruptError(f"{key} does not have the digest in its name: it is damaged; use another backup")
    try:
        return Backup(id=name, manifest=_parse(json.loads(data), key))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactCorruptError(
            f"{key} is of a form that this release does not know: use the release that wrote it, or another backup"
        ) from error


def newest_backup(destination: Destination, service: str) -> Backup:
    """Return a service's newest backup. Errors: NotFoundError; as `open_backup`."""
    found = backup_ids(destination, service)
    if not found:
        raise NotFoundError(f"there is no backup of the {service} service here")
    return open_backup(destination, found[-1])


def delete_manifest(destination: Destination, name: str) -> None:
    """Make what a manifest names no backup any more."""
    destination.delete(_key(name))


def _parse(body: dict[str, Any], key: str) -> BackupManifest:
    schema = body.pop("schema")
    if schema != SCHEMA:
        raise ArtifactCorruptError(f"{key} has the form {schema!r}, this release reads {SCHEMA!r}: use a newer release")
    if not 0 <= int(body["snapshot_us"]) < _YEAR_10000_US:
        raise ValueError("its moment is none")
    tables = tuple(
        TableDump(name=table["name"], shape=_shape(table["shape"]), rows=_listing(table["rows"]))
        for table in body.pop("tables")
    )
    missing = tuple(Missing(**one) for one in body.pop("missing"))
    blobs, checkpoints = _listing(body.pop("blobs")), _listing(body.pop("checkpoints"))
    return BackupManifest(**body, tables=tables, missing=missing, blobs=blobs, checkpoints=checkpoints)


def _shape(value: dict[str, Any]) -> Shape:
    return Shape(columns=tuple((name, kind) for name, kind in value["columns"]), key=tuple(value["key"]))


def _listing(value: dict[str, Any]) -> Listing:
    segments = tuple(Segment(**segment) for segment in value["segments"])
    return Listing(lines=value["lines"], digest=value["digest"], segments=segments)
