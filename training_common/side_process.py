"""Work that a call waits for, done by a short-lived process of its own.

A server never loads torch. What a call asks it to compute is done beside the workers of jobs, by a process that writes
nothing to the store: the server keeps the result and the answer in one transaction. The order and the result pass
through files of a folder that only this user can open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

from cognateforge.exceptions import (
    BY_REASON,
    FieldViolation,
    ForgeError,
    InternalError,
    NotImplementedByServerError,
    ResourceExhaustedError,
    UnavailableError,
)
from training_common import faults
from training_common.engines.processes import WORKER_ENVIRONMENT
from training_common.jobs.store import answer_to, reused
from training_common.rpc.identity import current_caller
from training_common.rpc.mutations import payload_of
from training_common.store.database import Database

log = structlog.get_logger(__name__)

ORDER_FILE, RESULT_FILE, LOG_FILE = "order.json", "result.json", "log.txt"
# Of a process that ended without a word, so much of what it printed goes into the log.
_TOLD_CHARS = 2000


@dataclass
class _Run:
    """Work under way, and how many callers wait for it."""

    payload: bytes
    task: asyncio.Task[bytes]
    waiting: int = 0


class SideProcesses:
    """The processes of one method.

    method: of the contract. module: what a process runs, with its folder as argument; it calls `answer_order`.
    scratch: a folder of this server's own; what it holds is removed. what: they in words, for messages.
    at_once: how many; setting: which setting says so.
    """

    def __init__(
        self, database: Database, *, method: str, module: str, scratch: Path, what: str, at_once: int, setting: str
    ) -> None:
        self._database = database
        self._method, self._module, self._what = method, module, what
        self._scratch = scratch
        self._at_once, self._setting = at_once, setting
        self._runs: dict[tuple[str, str], _Run] = {}
        shutil.rmtree(scratch, ignore_errors=True)  # an earlier server's, cut off in the middle of one

    @property
    def callers(self) -> int:
        """How many callers wait."""
        return sum(run.waiting for run in self._runs.values())

    async def answer(
        self, request: Any, work: Callable[[], Coroutine[Any, Any, bytes]], *, require: Callable[[], None] | None = None
    ) -> bytes:
        """Return the answer's bytes: the stored one, that of work under way for the same request id, or of new work.

        work: asks `result` and stores the answer with `mutate`. When the last of its callers has gone, it is cancelled.
        require: raises what speaks against new work.
        Errors: RequestIdReusedError, NotImplementedByServerError, ResourceExhaustedError, and those of the work.
        """
        payload = payload_of(request)
        key = (current_caller().name, request.request_id.lower())
        if key not in self._runs:
            stored = await self._database.run(self._stored, key, payload)
            if stored is not None:
                return stored
        # No other call comes between here and the entry.
        run = self._runs.get(key)
        if run is None:
            if require is not None:
                require()
            self._require_place()
            run = _Run(payload, asyncio.create_task(work()))
            run.task.add_done_callback(lambda _: self._runs.pop(key))
            self._runs[key] = run
        elif run.payload != payload:
            raise reused(request.request_id, self._method)
        run.waiting += 1
        try:
            return await asyncio.shield(run.task)
        finally:
            run.waiting -= 1
            if not run.waiting:
                run.task.cancel()

    def _stored(self, key: tuple[str, str], payload: bytes) -> bytes | None:
        """Return the answer that was given to this id. Errors: RequestIdReusedError."""
        caller, request_id = key
        with self._database.read() as connection:
            return answer_to(connection, caller=caller, request_id=request_id, method=self._method, payload=payload)

    def _require_place(self) -> None:
        if find_spec("torch") is None:
            raise NotImplementedByServerError(
                f"this server runs without PyTorch, which {self._what} need: ask one that has it"
            )
        if len(self._runs) >= self._at_once:
            raise ResourceExhaustedError(
                f"{len(self._runs)} {self._what} are under way, and this server runs {self._at_once} at once (the "
                f"setting {self._setting}): call again when one of them has ended"
            )

    async def result(self, order: Mapping[str, Any]) -> Any:
        """Run a process on an order, and return its result. It ends with this server, and when this is cancelled.

        Errors: those that it tells; ResourceExhaustedError, where its files cannot be written; UnavailableError,
        InternalError, when it ended without a word.
        """
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._scratch))
        except OSError as error:
            raise self._without_room(error) from error
        try:
            return await self._run(order, folder)
        except OSError as error:
            raise self._without_room(error) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _run(self, order: Mapping[str, Any], folder: Path) -> Any:
        # With credentials, if there are any: nobody else can open a folder that mkdtemp made.
        (folder / ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")
        with (folder / LOG_FILE).open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "training_common.engines.child", str(os.getpid()), self._module, str(folder)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Devices belong to jobs.
                env={**WORKER_ENVIRONMENT, **os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return self._told(folder, status)

    def _told(self, folder: Path, status: int) -> Any:
        """Return what a process that has ended left. Errors: as `result`."""
        try:
            told = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none, or one that was cut off
            with (folder / LOG_FILE).open(encoding="utf-8", errors="replace") as output:
                printed = output.read()[-_TOLD_CHARS:]
            log.error("process ended without a result", method=self._method, status=status, output=printed)
            if status == os.EX_IOERR:
                raise self._without_room() from None
            if status == -signal.SIGKILL:
                raise UnavailableError(
                    "the process that does this was ended by SIGKILL, which a machine short of memory sends too: call "
                    "again"
                ) from None
            raise InternalError from None
        error = told.get("error")
        if error is not None:
            violations = [
                FieldViolation(field=field, description=description) for field, description in error["fields"]
            ]
            raise BY_REASON[error["reason"]](error["message"], violations=violations)
        return told["result"]

    def _without_room(self, error: OSError | None = None) -> ResourceExhaustedError:
        if error is not None:
            log.error("folder cannot be written", method=self._method, detail=str(error))
        return ResourceExhaustedError(
            f"the files of {self._what} cannot be written, or the machine gave them no memory: make room on the disk "
            "of this server's data_dir, then call again"
        )


def answer_order(folder: Path, work: Callable[[dict[str, Any]], Any]) -> int:
    """Do an order, in the process that was started for it, and write down its result, or the ForgeError it raised.

    Returns the process's exit status, EX_IOERR where the machine lacks room.
    work: from the order to a result that JSON can carry.
    """
    told: dict[str, Any]
    try:
        order = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
        try:
            told = {"result": work(order)}
        except ForgeError as error:
            fields = [(violation.field, violation.description) for violation in error.violations]
            told = {"error": {"reason": error.reason_name(), "message": error.message, "fields": fields}}
        (folder / RESULT_FILE).write_text(json.dumps(told), encoding="utf-8")
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and not faults.of_machine(error):
            raise
        traceback.print_exc()
        return os.EX_IOERR
    return 0
