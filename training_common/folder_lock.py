"""One server for one folder: a lock that ends with its process, however that ends.

Servers that share a store have folders of their own: the name by which each knows its workers comes from it, and the
audit log in it has one writer. Workers do not hold the lock: they outlive their server, and the next one finds them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from training_common.settings import SettingsError

_NAME = "server.lock"


class FolderLock:
    """A server's hold on its `data_dir`. Errors: SettingsError, naming the process that has it."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / _NAME).open("a+")
        except OSError as error:
            raise SettingsError(f"data_dir: {folder} cannot be used: {error.strerror}") from error
        if not _taken(self._file):
            with self._file as file:
                raise SettingsError(
                    f"data_dir: {folder} is in use by process {_pid(file)}; stop it, or give this server another folder"
                )
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let another server have the folder."""
        self._file.close()


def holder(folder: Path) -> str:
    """Return the process id of the server that holds a folder, "" where none does."""
    try:
        with (folder / _NAME).open() as file:
            return "" if _taken(file) else _pid(file)
    except FileNotFoundError:
        return ""


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "unknown"  # for a moment, while it takes the lock
