"""A debug bundle: what is known of a job, without secrets, of bounded size, in one file that only its owner reads."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cognateforge.exceptions import ForgeError, LocalStorageError
from cognateforge.masking import Redactor

_README = """This archive was made by `forge debug-bundle` to find out why a job failed.

Secrets were replaced by asterisks: those of the environment and the settings, what is named like one, and what has the
form of one. Look through it before you pass it on: texts that a program wrote may tell more than anybody can know.

contents.json lists what is here, what was shortened, and what could not be had.
"""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file of the bundle. note: what was left out of it, "" for nothing."""

    name: str
    data: bytes
    note: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Return what the list of contents tells of it."""
        digest = f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return {"name": self.name, "size_bytes": len(self.data), "digest": digest, "note": self.note}


@dataclass
class Bundle:
    """What is gathered. Every text passes the redactor on its way in.

    most_bytes: of all members together, before they are compressed. Small ones come first, for they tell most.
    """

    redactor: Redactor
    most_bytes: int
    members: list[Member] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def left_bytes(self) -> int:
        """Room that is left."""
        return self.most_bytes - sum(len(member.data) for member in self.members)

    @contextlib.contextmanager
    def gathering(self, name: str) -> Iterator[None]:
        """Let the rest be gathered where one part cannot be had, and tell so in its place."""
        try:
            yield
        except (ForgeError, OSError) as error:
            told = error.message if isinstance(error, ForgeError) else error.strerror or type(error).__name__
            self.missing[name] = self.redactor.text(told)

    def add_json(self, name: str, value: Any) -> None:
        """Add one JSON value."""
        text = json.dumps(self.redactor.plain(value), indent=1, ensure_ascii=False) + "\n"
        self._add(name, text.encode("utf-8", "replace"))

    def add_lines(self, name: str, values: Iterable[Mapping[str, Any]], *, share: float = 1.0) -> None:
        """Add a JSON object a line; of more than a share of the room the newest are kept."""
        kept, total = _Tail(int(self.left_bytes * share)), 0
        for value in values:
            line = json.dumps(self.redactor.plain(value), ensure_ascii=False) + "\n"
            kept.add(line.encode("utf-8", "replace"))
            total += 1
        note = f"the newest {len(kept.parts)} of {total}" if len(kept.parts) < total else ""
        self._add(name, b"".join(kept.parts), note)

    def add_text(self, name: str, lines: Iterable[str], *, most_bytes: int) -> None:
        """Add a text; of a longer one the end is kept. Lines are looked at together: a secret may take several."""
        # More than fits is read on, so that no secret is cut in two before it was looked for.
        kept, size = _Tail(2 * most_bytes), 0
        for line in lines:
            part = line.encode("utf-8", "replace")
            size += len(part)
            kept.add(part)
        data = self.redactor.text(b"".join(kept.parts).decode("utf-8", "replace")).encode()
        note = ""
        if len(data) > most_bytes or kept.dropped:
            data = data[-most_bytes:] if most_bytes else b""
            data = data[data.find(b"\n") + 1 :]
            note = f"the last {len(data)} of {size} bytes"
        self._add(name, data, note)

    def _add(self, name: str, data: bytes, note: str = "") -> None:
        if len(data) > self.left_bytes:
            self.missing[name] = f"{len(data)} bytes, and {self.left_bytes} are left: ask for a larger bundle"
            return
        self.members.append(Member(name=name, data=data, note=note))

    def contents(self) -> dict[str, Any]:
        """Return the list of what is there and what is not."""
        return {"members": [member.to_plain() for member in self.members], "missing": self.missing}

    def write(self, path: Path) -> None:
        """Write the archive: whole or not at all, for its owner alone. Errors: LocalStorageError, also if it exists."""
        own = [
            Member(name="README.txt", data=_README.encode()),
            Member(name="contents.json", data=(json.dumps(self.contents(), indent=1) + "\n").encode()),
        ]
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    _archive([*own, *self.members], file, path.name.partition(".")[0])
                    file.flush()
                    os.fsync(file.fileno())
                os.link(scratch, path)  # which, unlike a rename, replaces nothing
            finally:
                scratch.unlink()
        except FileExistsError as error:
            raise LocalStorageError(f"{path} exists: name another file") from error
        except OSError as error:
            raise LocalStorageError(f"{path} cannot be written: {error.strerror}") from error


class _Tail:
    """The newest parts that fit."""

    def __init__(self, most_bytes: int) -> None:
        self.parts: deque[bytes] = deque()
        self.dropped = False
        self._most_bytes, self._bytes = most_bytes, 0

    def add(self, part: bytes) -> None:
        self.parts.append(part)
        self._bytes += len(part)
        while self._bytes > self._most_bytes and self.parts:
            self._bytes -= len(self.parts.popleft())
            self.dropped = True


def _archive(members: Iterable[Member], file: Any, folder: str) -> None:
    # Neither the time nor the name of a user is written into the packed file.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in members:
            entry = tarfile.TarInfo(f"{folder}/{member.name}")
            entry.size, entry.mode, entry.mtime = len(member.data), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(member.data))


def tail_of(path: Path, most_bytes: int) -> Callable[[], Iterator[str]]:
    """Return what reads the end of a file by lines. Holes, which a bounded log has in its middle, are passed over."""

    def read() -> Iterator[str]:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            for line in file:
                if text := line.strip(b"\0").decode("utf-8", "replace"):
                    yield text

    return read
