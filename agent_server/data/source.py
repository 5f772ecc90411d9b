"""Where the rows of a plan come from: files below the data folder, a set of the hub, or this project's own generator.

Rows come out with their place and, where a file's name or the hub tells it, the split that they belong to. Nothing here
knows what a row means.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_server.data import intents
from agent_server.data.hub import HubSet
from cognateforge.exceptions import DataUnavailableError, FieldViolation, InvalidFieldError
from training_common.attempt import Json
from training_common.digests import canonical_json, sha256_bytes, sha256_file
from training_common.findings import quote
from training_common.rows import Row, read_rows

FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# What people have instead, and whose every line would be refused as no JSON.
_TABLES = (".csv", ".tsv")
_MAX_NAME_CHARS = 64
# A file of a folder, and a split of the hub, is of the split that its name begins with: "dev_sample.jsonl",
# "test-00000-of-00001.parquet", "train_sft".
_SPLIT_OF_NAME = re.compile(r"(train|training|valid|validation|val|dev|test)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row and the split that its file belongs to, "" where nothing says."""

    row: Row
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class DataPlace:
    """Where this server's rows are.

    folder: the data folder. hub: whether the hub may be asked. hub_dir: where rows of the hub are kept once they were
    read; None reads them again each time.
    """

    folder: Path | None = None
    hub: bool = False
    hub_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One resolved source. kind: "folder", "hub" or "generated". companions: files beside the rows, by name."""

    name: str
    kind: str
    files: tuple[Path, ...] = ()
    companions: dict[str, Path]
    open_rows: Callable[[Callable[[], None]], Iterator[SourceRow]]

    def rows(self, each_row: Callable[[], None], digest: hashlib._Hash) -> Iterator[SourceRow]:
        """Yield every row; `each_row` is called at each one and may raise. Rows without a file go into the digest."""
        for found in self.open_rows(each_row):
            each_row()
            if not self.files:
                digest.update(_canonical(found))
            yield found

    def entries(self, *, companions: bool) -> tuple[dict[str, Json], ...]:
        """Return name, digest and size of every file that was read."""
        files = {path.name: path for path in self.files} | (self.companions if companions else {})
        return tuple(_entry(path) for _, path in sorted(files.items()))


def digest_of(entries: Sequence[Mapping[str, Json]], rows: hashlib._Hash) -> str:
    """Return one digest over all files, or over the rows where there is none."""
    if len(entries) == 1:
        return str(entries[0]["sha256"])
    if entries:
        return sha256_bytes(canonical_json([[entry["name"], entry["sha256"]] for entry in entries]))
    return f"sha256:{rows.hexdigest()}"


def from_file(place: DataPlace, path: str, *, companions: Sequence[str]) -> Source:
    """Return the rows of a file or a folder.

    companions: patterns of files that stand beside rows and are none. Errors: DataUnavailableError, InvalidFieldError,
    for the field "file.path".
    """
    files, beside = _files(place.folder, path, companions)
    in_folder = len(files) > 1

    def rows(_each_row: Callable[[], None]) -> Iterator[SourceRow]:
        for file in files:
            split = _split_of(file.name) if in_folder else ""
            for row in read_rows(file):
                yield SourceRow(row, split)

    return Source(name=_set_name(path), kind="folder", files=tuple(files), companions=beside, open_rows=rows)


def from_hub(place: DataPlace, wish: HubSet) -> Source:
    """Return the rows of a set of the hub. Errors: DataUnavailableError, InvalidFieldError, for fields below "hub"."""
    wish.require_allowed(place.hub)

    def rows(each_row: Callable[[], None]) -> Iterator[SourceRow]:
        for row, split in wish.rows(place.hub_dir, each_row):
            yield SourceRow(row, _split_of(split))

    return Source(name=wish.name[:_MAX_NAME_CHARS], kind="hub", companions={}, open_rows=rows)


def generated(seed: int) -> Source:
    """Return this project's own utterances."""

    def rows(_each_row: Callable[[], None]) -> Iterator[SourceRow]:
        for line, content in enumerate(intents.generate_intents(seed=seed), start=1):
            yield SourceRow(Row(intents.NAME, line, content))

    return Source(name=intents.NAME, kind="generated", companions={}, open_rows=rows)


def _unavailable(description: str) -> DataUnavailableError:
    return DataUnavailableError(description, violations=[FieldViolation(field="file.path", description=description)])


def _files(folder: Path | None, path: str, companions: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """Return the files that a request's path names, and those beside them, none of them outside the data folder."""
    if folder is None:
        raise _unavailable("no data folder is set on this server, so it has no files; use generated rows or the hub")
    root = folder.resolve()
    try:
        found = (root / path).resolve()
        inside = found.is_relative_to(root)
    except (OSError, ValueError):  # a loop of links, or a zero byte
        inside = False
    if not inside:
        raise _leads_out(path)
    if found.is_dir():
        listed = sorted(file for file in found.iterdir() if file.is_file() and file.name.endswith(FILE_ENDINGS))
        files = [file for file in listed if not _matches(file, companions)]
        for file in files:
            if not file.resolve().is_relative_to(root):
                raise _leads_out(f"{path}/{file.name}")
        if files:
            return files, _beside(found, companions, root)
    elif found.is_file():
        if found.suffix.lower() in _TABLES:
            raise _unavailable(
                f"{quote(path)} is a table of text, which is not read; write its rows as JSONL, one object a line with "
                "the task's fields, or as Parquet"
            )
        return [found], _beside(found.parent, companions, root)
    raise _unavailable(f"the data folder has no {quote(path)} with rows; add the file or use generated rows")


def _beside(folder: Path, companions: Sequence[str], root: Path) -> dict[str, Path]:
    inside = (file for file in folder.iterdir() if file.is_file() and file.resolve().is_relative_to(root))
    return {file.name: file for file in sorted(inside) if _matches(file, companions)}


def _matches(file: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)


def _leads_out(path: str) -> InvalidFieldError:
    description = f"{quote(path)} leads out of the data folder"
    return InvalidFieldError(description, violations=[FieldViolation(field="file.path", description=description)])


def _split_of(name: str) -> str:
    found = _SPLIT_OF_NAME.match(name)
    return found[1].lower() if found else ""


def _set_name(path: str) -> str:
    """Return a set's name out of its path: "agent/clinc150/data_full.jsonl" -> "clinc150/data_full"."""
    parts = [part for part in path.split("/") if part]
    parts[-1] = re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$", "", parts[-1]) or parts[-1]
    return "/".join(parts[-2:])[:_MAX_NAME_CHARS]


def _entry(path: Path) -> dict[str, Json]:
    return {"name": path.name, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}


def _canonical(found: SourceRow) -> bytes:
    """Return a row as it is hashed: with its split, and as it was seen where JSON has no form for it."""
    content = found.row.content
    try:
        return canonical_json([found.split, content])
    except (TypeError, ValueError):
        return ascii([found.split, content]).encode("ascii")
