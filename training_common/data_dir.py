"""The folder of a service's state, which one server at a time may use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from training_common.settings import SettingsError


class DataDirLock:
    """Holds a data folder until it is released or the process ends, however that comes about.

    Two servers on one folder would each launch workers for the same jobs.

    Errors: SettingsError, when another server holds it or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (folder / "server.lock").open("a+", encoding="ascii")
        except OSError as error:
            raise SettingsError(
                f"data_dir {folder}: {error.strerror}; name a folder that this user may write"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read(20).strip() or "unknown"
            self._file.close()
            raise SettingsError(
                f"data_dir {folder} is in use by a server with the process id {holder}; stop it, or give this one a "
                "data_dir of its own"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let another server have the folder."""
        self._file.close()
