"""One database for a service and its workers: engine, transactions, schema revision.

The store is synchronous: workers use it as it is, servers call it in threads (`Database.run`). A write transaction on
SQLite takes the write lock at its start, because a lock that is upgraded later fails at once instead of waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog

from training_common.settings import SettingsError
from training_common.store import revisions

# Writers queue on SQLite's one lock: training writes are short, so a minute means that something is stuck.
_BUSY_TIMEOUT_S = 60
# A writer that waits for the lock holds its thread, also when its client has gone: readers have threads of their own,
# and so has the ping that health rests on.
_READERS, _WRITERS = 8, 4
# Waits between tries of a patient writer: 0.5, 1, 2 s and so on.
_WAIT_S, _WAIT_MAX_S = 0.5, 30.0
# A transaction that does nothing for so long belongs to a process that was stopped or cut off. PostgreSQL ends it: it
# holds rows that others wait for. On SQLite such a writer holds everything, and only its own end helps.
_IDLE_TRANSACTION_S = 30
_ENDED_WHILE_IDLE = "25P03"  # PostgreSQL's code of that
log = structlog.get_logger(__name__)
T = TypeVar("T")
# Told of each write transaction: how many seconds it took, and whether the store took it.
OnWrite = Callable[[float, bool], None]


class Turn(enum.IntEnum):
    """What is done by one transaction at a time. The numbers are those of PostgreSQL's advisory locks."""

    UPGRADE = 7101001
    PUBLISH = 7101002
    ALIASES = 7101003
    CAPACITY = 7101004
    # Held for long, outside of transactions: see `Database.alone`.
    SCRUB = 7101005
    TIERS = 7101006


def now_us() -> int:
    """Return the wall clock in microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class Database:
    """Connections to one service's database.

    patience_s: how long `write` goes on asking a store that cannot be written, beyond its own busy timeout.
    Errors: SettingsError, for a URL that names no database.
    """

    def __init__(self, url: str, *, patience_s: float = 0.0) -> None:
        self.url = url
        self._patience_s = patience_s
        self._sqlite = url.startswith("sqlite")
        try:
            parsed = sa.make_url(url)
            self.shown = parsed.render_as_string(hide_password=True)
            if self._sqlite:
                Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
            self.engine = sa.create_engine(url, pool_size=_READERS + _WRITERS, **self._options())
        except (sa.exc.ArgumentError, ImportError, TypeError) as error:
            # The text is not repeated: it may hold a password.
            raise SettingsError(
                f"store_url is no database that this installation can use ({type(error).__name__}); write "
                "sqlite:///PATH, or postgresql+DRIVER://... with its driver installed"
            ) from error
        except OSError as error:
            raise SettingsError(f"store_url: {error.filename}: {error.strerror}") from error
        # SQLite goes on with an open file that was removed or replaced: only a new connection tells.
        self._probe = sa.create_engine(url, poolclass=sa.NullPool) if self._sqlite else self.engine
        # One state for all statements of a read: SQLite's snapshots are so, PostgreSQL's are when it is asked.
        self._reading: dict[str, Any] = {} if self._sqlite else {"isolation_level": "REPEATABLE READ"}
        self._brief = threading.local()
        self._kept_connection: sa.Connection | None = None
        self.on_write: OnWrite | None = None
        self._alone = {turn: threading.Lock() for turn in Turn}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="store-write")
        self._pinger = ThreadPoolExecutor(1, thread_name_prefix="store-ping")
        if self._sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        else:
            sa.event.listen(self.engine, "connect", _prepare_postgresql)
            sa.event.listen(self.engine, "handle_error", _tell_as_away)

    def _options(self) -> dict[str, Any]:
        if self._sqlite:
            return {"connect_args": {"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False}}
        return {"pool_pre_ping": True}

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one state of the database and changes nothing."""
        kept: sa.Connection | None = getattr(self._brief, "connection", None)
        if kept is not None:
            yield kept
            return
        with self.engine.connect().execution_options(**self._reading) as connection, connection.begin():
            yield connection

    def in_turn(self, connection: sa.Connection, turn: Turn) -> None:
        """Wait until no other transaction of this kind is under way, until the caller's ends.

        On SQLite there is one writer at a time anyway.
        """
        if not self._sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(turn.value)))

    def may_idle(self, connection: sa.Connection) -> None:
        """Let the caller's transaction do nothing for as long as it takes: PostgreSQL would end it otherwise."""
        if not self._sqlite:
            connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))

    @contextmanager
    def alone(self, turn: Turn) -> Iterator[bool]:
        """Yield whether nobody else, in this server or in another one of the same store, is at work of this kind.

        Then nobody else begins it until the body's end, or this process's. For work that takes longer than a
        transaction may: no transaction is open meanwhile. A SQLite store has one server.
        """
        lock = self._alone[turn]
        if not lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._sqlite:
                yield True
                return
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                won = bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(turn.value))).scalar_one())
                try:
                    yield won
                finally:
                    if won:
                        connection.execute(sa.select(sa.func.pg_advisory_unlock(turn.value)))
        finally:
            lock.release()

    def progress(self, connection: sa.Connection, newest: int) -> int:
        """Return a number that differs from the last one whenever there may be something new.

        newest: the newest key that is visible. On PostgreSQL transactions end in another order than their keys were
        given, so the oldest one that is still under way counts as well: when it has ended, its rows may be new.
        """
        if self._sqlite:
            return newest
        text = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
        return (newest << 64) + int(connection.execute(sa.text(text)).scalar_one())

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that is committed at the end, or rolled back by an exception.

        Errors: sqlalchemy.exc.OperationalError, when the store is away, or busy for longer than is waited.
        """
        if self.on_write is None:
            with contextlib.ExitStack() as stack:
                yield self._begin_patiently(stack)
            return
        started = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                yield self._begin_patiently(stack)
        except sa.exc.OperationalError:
            self.on_write(time.monotonic() - started, False)
            raise
        # What the body raised of its own was rolled back by a store that works.
        except BaseException:
            self.on_write(time.monotonic() - started, True)
            raise
        self.on_write(time.monotonic() - started, True)

    def _begin_patiently(self, stack: contextlib.ExitStack) -> sa.Connection:
        """Open a write transaction on `stack`. Nothing has been written when that fails, so it can be tried again."""
        give_up, wait_s = time.monotonic() + self._patience_s, _WAIT_S
        while True:
            try:
                connection = stack.enter_context(self.engine.connect().execution_options(forge_write=True))
                stack.enter_context(connection.begin())
                return connection
            except sa.exc.OperationalError as error:
                stack.close()
                if time.monotonic() + wait_s > give_up:
                    raise
                log.warning("store cannot be written, trying again", detail=str(error.orig), wait_s=wait_s)
            # Not all workers at the same moment.
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            wait_s = min(2 * wait_s, _WAIT_MAX_S)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Read in a thread, so that the event loop goes on. The caller's context variables hold there."""
        return await _in_context(self._readers, work, *args)

    async def run_write(self, work: Callable[..., T], *args: Any) -> T:
        """Write in a thread, where waiting for the write lock keeps no reader from its work. As `run` otherwise."""
        return await _in_context(self._writers, work, *args)

    async def check(self) -> None:
        """Do `ping` in a thread that nothing else uses."""
        await asyncio.get_running_loop().run_in_executor(self._pinger, self.ping)

    async def run_brief(self, work: Callable[..., T], *args: Any) -> T:
        """Do store work that only reads a row or two by their keys.

        On SQLite it is done at once: readers of a write-ahead log wait for no writer, and one row takes less time than
        the way to a thread and back. Each statement is a transaction of its own, over a connection that is kept: to get
        one from the pool, begin and end costs more than the row. Any other database may be far away, so there it is
        `run`.
        """
        if not self._sqlite:
            return await self.run(work, *args)
        try:
            self._brief.connection = self._kept()
            return work(*args)
        except sa.exc.OperationalError:
            self._let_go_of_kept()
            raise
        finally:
            self._brief.connection = None

    def _kept(self) -> sa.Connection:
        if self._kept_connection is None:
            self._kept_connection = self.engine.connect().execution_options(forge_autocommit=True)
        return self._kept_connection

    def _let_go_of_kept(self) -> None:
        if self._kept_connection is not None:
            self._kept_connection.close()
            self._kept_connection = None

    def upgrade(self, migrations: Path) -> None:
        """Bring the schema to the newest revision of the service's migrations. Servers that start at once take turns.

        A schema that a later release has brought further is left as it is, if this release's code can work on it.

        Errors: SettingsError, when the store cannot be opened, is no store of this service, is half restored, or has a
        schema on which this release cannot work.
        """
        try:
            # The write lock comes first: who waits for it finds the schema that the one before has made.
            with self.engine.connect().execution_options(forge_write=True) as connection:
                self.in_turn(connection, Turn.UPGRADE)
                revisions.require_whole(connection)
                found = revisions.current(connection)
                if found is None or revisions.is_known(migrations, found):
                    revisions.upgrade_to(connection, migrations, "head")
                elif revisions.fits(connection, migrations):
                    log.info("store has the schema of a later release, which fits this one too", revision=found)
                else:
                    raise SettingsError(
                        f"store {self.shown} has schema revision {found}, that this release does not know and cannot "
                        f"work on (its newest is {revisions.head(migrations)}); start the release that wrote it, or a "
                        "newer one"
                    )
                connection.commit()
        except sa.exc.DBAPIError as error:
            raise SettingsError(
                f"store {self.shown} cannot be used: {error.orig}; check store_url and data_dir, or restore the file "
                "from a backup"
            ) from error

    def ping(self) -> None:
        """Raise when the database does not answer, or is not the one that `upgrade` prepared."""
        with self._probe.connect() as connection:
            connection.execute(sa.text("SELECT version_num FROM alembic_version")).one()

    def close(self) -> None:
        """Close threads and connections."""
        for threads in (self._readers, self._writers, self._pinger):
            threads.shutdown(wait=True)
        self._let_go_of_kept()
        self.engine.dispose()


async def _in_context(threads: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    """Run in a thread what logs, and may call others, as a part of the caller's request."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, functools.partial(context.run, work, *args))


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver's own transaction handling begins late and commits before DDL; ours is explicit (see _begin_sqlite).
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    # FULL: an answered request is on the disk, also when the power goes.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _prepare_postgresql(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_S}s'")
    cursor.close()
    connection.commit()  # a rollback would take it back


def _tell_as_away(context: sa.engine.ExceptionContext) -> None:
    """Raise OperationalError for a transaction that was ended while idle: the caller can begin anew, as after a cut."""
    original = context.original_exception
    if getattr(original, "sqlstate", None) == _ENDED_WHILE_IDLE:
        context.is_disconnect = True
        raise sa.exc.OperationalError(context.statement, context.parameters, original) from original


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("forge_autocommit", False):
        return
    write = options.get("forge_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
