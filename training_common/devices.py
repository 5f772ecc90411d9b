"""Devices of a host, or even parts of them, for one worker each: locks of both services that end with their process.

A device has a file in a folder that all services of the host share, and stands for the interval from 0 to 1. A worker
locks the whole of it, or one of n parts of the same length, so that the parts of all workers never add up to more than
the device, whatever number each service divides by. The kernel lets go when the process ends, however that ends. The
locks keep services that use them apart; they guard against accidents, not against programs that do not ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
import tempfile
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import structlog

from training_common.attempt import AttemptWaits
from training_common.settings import MOST_SHARES, SettingsError, WorkerSettings

log = structlog.get_logger(__name__)

# What a job waits for that finds no free device.
DEVICE = "device"
_PROC = Path("/proc/driver/nvidia/gpus")
# Anybody on the host may lock: the services may run as different users. Only owners may remove a file.
_FOLDER_MODE, _FILE_MODE = 0o1777, 0o666
# Where parts begin and end, in bytes that are locked and never written: thirds and sixths meet where they should.
_WHOLE = 1 << 62
# struct flock of 64-bit Linux: type, whence, start, length, process.
_FLOCK = "hhqqi"
# What the file holds: a cell for the name of each holder. Parts are no smaller than 1/MOST_SHARES, so that no two which
# are held at once begin in the same cell.
_HOLDER_BYTES = 200


class DeviceLocks:
    """The locks of a host's devices. What was taken is held until `release` or the process's end.

    Errors: SettingsError, for a folder in which others could exchange the files.
    """

    def __init__(self, folder: Path | None = None, *, proc: Path = _PROC) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / "cognateforge-devices"
        self._proc = proc
        self._held: list[int] = []
        try:
            with contextlib.suppress(FileExistsError):
                self._folder.mkdir(parents=True)
                self._folder.chmod(_FOLDER_MODE)
            found = self._folder.lstat()
        except OSError as error:
            raise SettingsError(f"workers.device_folder: {self._folder} cannot be used: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise SettingsError(f"workers.device_folder: {self._folder} is no folder; remove it or name another one")
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise SettingsError(
                f"workers.device_folder: anybody may remove files of {self._folder}; give it a sticky bit (chmod 1777)"
            )

    def take(self, devices: Sequence[str], count: int, *, holder: str, shares: int = 1) -> list[str]:
        """Lock `count` of the devices, the first that are free, and return them; all or none.

        shares: into how many parts a device is divided, of which one is locked: the first ones of all devices, then the
        second ones, which spreads workers over the devices.
        Errors: AttemptWaits, which names who has those that are not free.
        """
        taken: dict[str, int] = {}
        others: dict[str, str] = {}
        for part in range(shares):
            for device in devices:
                if device in taken or len(taken) == count:
                    continue
                file, other = self._lock(device, holder, part, shares)
                if file is None:
                    others.setdefault(device, other)
                else:
                    taken[device] = file
        if len(taken) < count:
            for file in taken.values():
                os.close(file)
            who = ", ".join(f"{device} is in use by {other}" for device, other in others.items() if device not in taken)
            free = (
                f"{len(taken)} of {count} devices are free"
                if shares == 1
                else f"{len(taken)} of {count} devices have 1/{shares} free"
            )
            raise AttemptWaits(DEVICE, message=f"{free}: {who}")
        self._held += taken.values()
        return list(taken)

    @property
    def held(self) -> bool:
        """Whether this process has its devices."""
        return bool(self._held)

    def release(self) -> None:
        """Let go of everything."""
        while self._held:
            os.close(self._held.pop())

    def _lock(self, device: str, holder: str, part: int, shares: int) -> tuple[int | None, str]:
        """Return an open file with a part locked, or None and who has something of it."""
        path = self._folder / f"{self._name(device)}.lock"
        start, end = _WHOLE * part // shares, _WHOLE * (part + 1) // shares
        while True:
            file = _open(path)
            other = _lock_range(file, start, end)
            if other is not None:
                with os.fdopen(file, "rb") as names:
                    name = os.pread(names.fileno(), _HOLDER_BYTES, _cell_of(other)).rstrip(b"\0")
                    return None, name.decode("utf-8", "replace") or "another process"
            # A cleaner of old files may have removed it between the two: then nobody else would meet this lock.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file).st_ino:
                    os.pwrite(file, holder.encode()[:_HOLDER_BYTES].ljust(_HOLDER_BYTES, b"\0"), _cell_of(start))
                    return file, ""
            os.close(file)

    def _name(self, device: str) -> str:
        """Return one name for one device: a UUID's index, where the driver tells it. MIG instances are their own."""
        uuids = self._uuids()
        return str(uuids.index(device)) if device in uuids else device

    def _uuids(self) -> list[str]:
        """Return the UUIDs of the host's graphics processors in the order of their bus, as nvidia-smi counts them."""
        found = []
        for one in sorted(self._proc.glob("*/information")):
            match = re.search(r"GPU UUID:\s*(\S+)", one.read_text(encoding="utf-8", errors="replace"))
            found.append(match.group(1) if match else "")
        return found


def _lock_range(file: int, start: int, end: int) -> int | None:
    """Lock a range of a file for as long as it is open, or return where a lock begins that is in the way."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    while True:
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            kind, _, other, _, _ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted))
            if kind != fcntl.F_UNLCK:
                return int(other)
        else:
            return None


def _cell_of(start: int) -> int:
    """Return where in a device's file the name of who holds the part that starts there is written."""
    return start * MOST_SHARES // _WHOLE * _HOLDER_BYTES


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        # First without O_CREAT: in a sticky folder the kernel refuses it for another user's file.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL, _FILE_MODE)
            os.fchmod(file, _FILE_MODE)  # whatever the umask
            return file


_locks: DeviceLocks | None = None


def take_devices(settings: WorkerSettings, *, job: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Take this process's devices, and show it no others. Call it before anything looks for devices.

    Where workers share devices, torch gives this process its part of their memory and no more.
    Without `workers.devices` nothing changes. Errors: AttemptWaits; SettingsError.
    """
    global _locks
    if not settings.devices:
        return
    # Kept for as long as the process lives: what it has put on a device stays there until its end.
    _locks = _locks or DeviceLocks(settings.device_folder)
    if _locks.held:
        return
    shares = settings.workers_per_device
    taken = _locks.take(
        settings.devices, settings.devices_per_worker, holder=f"process {os.getpid()} for {job}", shares=shares
    )
    # Indices as nvidia-smi counts them, whatever is fastest.
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    if shares > 1:
        _bound_memory(1 / shares)
    log.info("devices taken", devices=taken, shares=shares)


def _bound_memory(part: float) -> None:
    """Let torch take no more than a part of the memory of each device that this process sees."""
    import torch  # only workers come here

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_per_process_memory_fraction(part, index)
