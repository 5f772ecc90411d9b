"""Invitations: how machines hear of a run, take a place in it, and see that it goes on.

All of it is files in a folder that a server and its service's nodes share, so that nodes need no port of their own:

    RUN/invitation      what runs, where its processes meet, how many there are; touched while it goes on
    RUN/begun           every place is taken: nodes start
    RUN/place-1         by which node the place is taken; touched while that is there
    RUN/place-1.ended   exit status of the place's processes

An invitation names no program: a node runs its service's worker and nothing else, for an attempt that has to be the
store's current one. Files of other users are not read. What goes on is told by time stamps that change, whatever they
are, so that machines' clocks may differ.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training_common.compute import share_of

# How often those who take part tell that they are there, and look for the others.
BEAT_S = 0.5
_LARGEST_BYTES = 16 << 10
# Of what is gone, is a link or a socket, or belongs to others. Other errors are those of a folder that is away.
_NOTHING_THERE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES})
_INVITATION, _BEGUN, _ENDED = "invitation", "begun", ".ended"


class Invitation(BaseModel):
    """What a node has to know of a run. handle: of the process on the server's machine that is the run's worker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    handle: str = Field(max_length=255)
    host: str = Field(pattern=r"^[A-Za-z0-9_.:%-]{1,255}$")
    port: int = Field(ge=1, le=65_535)
    processes: int = Field(ge=2, le=64)
    nodes: int = Field(ge=2, le=64)
    job: str = Field(pattern=r"^jobs/[0-9a-f-]{36}$")
    attempt: int = Field(ge=1)
    token: int = Field(ge=0)
    threads: int | None = Field(default=None, ge=0, le=1024)
    create_us: int

    def share(self, place: int) -> int:
        """Return how many processes a place has."""
        return share_of(self.processes, self.nodes, place)

    def arguments(self) -> list[str]:
        """Return the worker's arguments, but for its settings."""
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return ["--job", self.job, "--attempt", str(self.attempt), "--token", str(self.token), *threads]


class Run:
    """The folder of one run. Errors of every method: OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def invitation_path(self) -> Path:
        return self._path / _INVITATION

    def place_path(self, place: int) -> Path:
        return self._path / f"place-{place}"

    def invite(self, invitation: Invitation) -> None:
        """Make the folder, all at once."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = self._path.with_name(f".{self.name}.{os.getpid()}")
        scratch.mkdir(mode=0o700)
        (scratch / _INVITATION).write_text(invitation.model_dump_json())
        scratch.rename(self._path)

    def invitation(self) -> Invitation | None:
        """Return what it is about; None where there is none, or none that can be trusted and understood."""
        text = _read(self.invitation_path)
        try:
            return None if text is None else Invitation.model_validate_json(text)
        except ValidationError:
            return None

    def begin(self) -> None:
        """Let those who took a place start."""
        (self._path / _BEGUN).touch()

    @property
    def has_begun(self) -> bool:
        return (self._path / _BEGUN).exists()

    def taken(self) -> set[int]:
        """Return the places that somebody has taken."""
        names = [path.name for path in self._path.glob("place-*") if path.suffix != _ENDED]
        return {int(number) for name in names if (number := name.removeprefix("place-")).isdecimal()}

    def take(self, place: int, node: str) -> bool:
        """Take a place for a node. Returns whether nobody else had it."""
        scratch = self._path / f".{uuid.uuid4().hex}"
        scratch.write_text(node)
        try:
            # Unlike a rename it fails where the place is taken.
            os.link(scratch, self.place_path(place))
        except FileExistsError:
            return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def holder(self, place: int) -> str:
        """Return the node that has the place."""
        return (_read(self.place_path(place)) or b"").decode(errors="replace")

    def is_held(self, place: int, node: str) -> bool:
        """Whether it is this node that has the place."""
        return self.holder(place) == node

    def leave(self, place: int) -> None:
        """Give a place back that was not begun with."""
        self.place_path(place).unlink(missing_ok=True)

    def end(self, place: int, status: int) -> None:
        """Tell how a place's processes have ended: 0, an exit status, or the signal's number below 0."""
        scratch = self._path / f".{uuid.uuid4().hex}"
        scratch.write_text(str(status))
        scratch.rename(self.place_path(place).with_suffix(_ENDED))

    def ended(self) -> dict[int, int]:
        """Return how the processes of places have ended."""
        found = {}
        for path in self._path.glob(f"place-*{_ENDED}"):
            number, text = path.stem.removeprefix("place-"), _read(path) or b""
            if number.isdecimal() and text.removeprefix(b"-").isdigit():
                found[int(number)] = int(text)
        return found

    def remove(self) -> None:
        """End it for all. What a node writes into it meanwhile stays until the next call."""
        self.invitation_path.unlink(missing_ok=True)
        shutil.rmtree(self._path, ignore_errors=True)


def runs(folder: Path, *, owner: str = "") -> list[Run]:
    """Return all runs of a folder, or those whose names begin with an owner. None where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [Run(folder / name) for name in sorted(names) if name.startswith(owner) and not name.startswith(".")]


def beat(path: Path) -> None:
    """Tell by a file's time stamp that who it stands for goes on. Errors: OSError."""
    os.utime(path)


class Beats:
    """For how long files have not changed, by the reader's own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Path, tuple[int, float]] = {}
        self._moved: set[Path] = set()

    def silent_s(self, path: Path) -> float:
        """Return for how long a file has not changed; infinity where none of ours is there. Errors: OSError."""
        try:
            # Opening lets a network file system ask its server, where a look might be answered from memory.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise
            self._seen.pop(path, None)
            self._moved.discard(path)
            return float("inf")
        try:
            stamp = os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
        now = self._clock()
        before = self._seen.get(path)
        if before is None or before[0] != stamp:
            self._seen[path] = (stamp, now)
            if before is not None:
                self._moved.add(path)
            return 0.0
        return now - before[1]

    def moves(self, path: Path) -> bool:
        """Whether a file was seen to change since it was first looked at: nothing else shows that somebody is there."""
        return path in self._moved

    def keep_only(self, paths: Sequence[Path]) -> None:
        """Forget all other files."""
        for path in self._seen.keys() - set(paths):
            self._seen.pop(path)
            self._moved.discard(path)


def _read(path: Path) -> bytes | None:
    """Return what is in a small file of this user, or None. Errors: OSError, while the folder is away."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > _LARGEST_BYTES:
            return None
        return os.read(descriptor, _LARGEST_BYTES)
    finally:
        os.close(descriptor)
