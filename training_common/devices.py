"""One worker for one device of a host: locks that both services take, and that end with their process.

A lock is a file of a folder that all services of the host share. The kernel lets go of it when the process ends,
however that ends. The locks keep services that use them apart; they guard against accidents, not against programs that
do not ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import structlog

from training_common.attempt import AttemptWaits
from training_common.settings import SettingsError, WorkerSettings

log = structlog.get_logger(__name__)

# What a job waits for that finds no free device.
DEVICE = "device"
_PROC = Path("/proc/driver/nvidia/gpus")
# Anybody on the host may lock: the services may run as different users. Only owners may remove a file.
_FOLDER_MODE, _FILE_MODE = 0o1777, 0o666
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

    def take(self, devices: Sequence[str], count: int, *, holder: str) -> list[str]:
        """Lock `count` of the devices, the first that are free, and return them; all or none.

        Errors: AttemptWaits, which names who has those that are not free.
        """
        taken: dict[str, int] = {}
        others: list[str] = []
        for device in devices:
            if len(taken) == count:
                break
            file, other = self._lock(device, holder)
            if file is None:
                others.append(f"{device} is in use by {other}")
            else:
                taken[device] = file
        if len(taken) < count:
            for file in taken.values():
                os.close(file)
            raise AttemptWaits(DEVICE, message=f"{len(taken)} of {count} devices are free: {', '.join(others)}")
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

    def _lock(self, device: str, holder: str) -> tuple[int | None, str]:
        """Return an open, locked file, or None and who has it."""
        path = self._folder / f"{self._name(device)}.lock"
        while True:
            file = _open(path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with os.fdopen(file, "rb") as other:
                    return None, other.read(_HOLDER_BYTES).decode("utf-8", "replace") or "another process"
            # A cleaner of old files may have removed it between the two: then nobody else would meet this lock.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file).st_ino:
                    os.ftruncate(file, 0)
                    os.pwrite(file, holder.encode()[:_HOLDER_BYTES], 0)
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

    Without `workers.devices` nothing changes. Errors: AttemptWaits; SettingsError.
    """
    global _locks
    if not settings.devices:
        return
    # Kept for as long as the process lives: what it has put on a device stays there until its end.
    _locks = _locks or DeviceLocks(settings.device_folder)
    if _locks.held:
        return
    taken = _locks.take(settings.devices, settings.devices_per_worker, holder=f"process {os.getpid()} for {job}")
    # Indices as nvidia-smi counts them, whatever is fastest.
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    log.info("devices taken", devices=taken)
