"""Evaluations on request: a short-lived worker process for each, and its result kept for the request's id.

A server never loads torch, so `agent_server.evaluate` measures in a process of its own. It writes nothing to the store:
the server keeps the result and the answer in one transaction.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sa
import structlog

from agent_server.agents import Measured, find_agent, keep_evaluations
from agent_server.settings import EvaluationSettings
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    BY_REASON,
    FieldViolation,
    IncompatibleError,
    InternalError,
    NotImplementedByServerError,
    ResourceExhaustedError,
    UnavailableError,
)
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import require_whole
from training_common.engines.processes import WORKER_ENVIRONMENT
from training_common.jobs.store import answer_to, reused
from training_common.rpc.identity import current_caller
from training_common.rpc.mutations import mutate, payload_of
from training_common.settings import ArtifactSettings, DataSettings

log = structlog.get_logger(__name__)

METHOD = "EvaluateAgent"
MODULE = "agent_server.evaluate"
ORDER_FILE, RESULT_FILE, LOG_FILE = "order.json", "result.json", "log.txt"
# Of a worker that ended without a word, so much of what it printed goes into the log.
_TOLD_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a worker finds things.

    files_dir, artifacts: the registry's blobs. data, hub_dir: sets. modules: environments.
    """

    files_dir: Path
    hub_dir: Path
    artifacts: ArtifactSettings
    data: DataSettings
    modules: tuple[str, ...] = ()


@dataclass
class _Run:
    """An evaluation under way, and how many callers wait for it."""

    payload: bytes
    task: asyncio.Task[bytes]
    waiting: int = 0


class Evaluator:
    """Evaluates agents of one registry.

    scratch: a folder of this server's own; what it holds is removed. places: where the worker finds things beside the
    agent. module: what the worker runs.
    """

    def __init__(
        self,
        registry: ArtifactRegistry,
        settings: EvaluationSettings,
        *,
        scratch: Path,
        places: Places,
        module: str = MODULE,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._scratch = scratch
        self._places = places
        self._module = module
        self._runs: dict[tuple[str, str], _Run] = {}
        shutil.rmtree(scratch, ignore_errors=True)  # an earlier server's, cut off in the middle of one

    @property
    def callers(self) -> int:
        """How many callers wait for an evaluation."""
        return sum(run.waiting for run in self._runs.values())

    async def evaluate(self, request: pb.EvaluateAgentRequest) -> bytes:
        """Return the answer's bytes: the stored one, that of an evaluation under way, or of a new one.

        When the last of its callers has gone, the evaluation is ended.
        Errors: AgentNotFoundError, IncompatibleError, RequestIdReusedError, ResourceExhaustedError, UnavailableError,
        and what the worker refuses.
        """
        database, caller, payload = self._registry.database, current_caller().name, payload_of(request)
        row = await database.run(find_agent, self._registry, request.name)
        key = (caller, request.request_id.lower())
        if key not in self._runs:
            stored = await database.run(self._stored, key, payload)
            if stored is not None:
                return stored
        # No other call comes between here and the entry.
        run = self._runs.get(key)
        if run is None:
            _require_task(request, row)
            self._require_place()
            run = _Run(payload, asyncio.create_task(self._run(request, row)))
            run.task.add_done_callback(lambda _: self._runs.pop(key))
            self._runs[key] = run
        elif run.payload != payload:
            raise reused(request.request_id, METHOD)
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
        with self._registry.database.read() as connection:
            return answer_to(connection, caller=caller, request_id=request_id, method=METHOD, payload=payload)

    def _require_place(self) -> None:
        if find_spec("torch") is None:
            raise NotImplementedByServerError("this server runs without PyTorch: ask one that has it to evaluate")
        if len(self._runs) >= self._settings.at_once:
            raise ResourceExhaustedError(
                f"{len(self._runs)} evaluations are under way, and this server runs {self._settings.at_once} at once "
                "(the setting evaluation.at_once): call again when one of them has ended"
            )

    async def _run(self, request: pb.EvaluateAgentRequest, row: ArtifactRow) -> bytes:
        await asyncio.to_thread(require_whole, self._registry, row)
        self._scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            found = await self._measure(request, row, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        made = {"caller": current_caller().name, "request_id": request.request_id}

        def keep(connection: sa.Connection) -> pb.EvaluateAgentResponse:
            keep_evaluations(connection, row, found, **made)
            return pb.EvaluateAgentResponse(evaluations=map(_message, found))

        return await mutate(self._registry.database, METHOD, request, keep)

    async def _measure(self, request: pb.EvaluateAgentRequest, row: ArtifactRow, folder: Path) -> list[Measured]:
        """Run a worker in a folder, and return what it has measured. It ends with this server, and when cancelled."""
        order = {
            "files_dir": str(self._places.files_dir.resolve()),
            # With credentials, if there are any: nobody else can open a folder that mkdtemp made.
            "artifacts": self._places.artifacts.model_dump(mode="json"),
            "hub_dir": str(self._places.hub_dir.resolve()),
            "data": self._places.data.model_dump(mode="json"),
            "modules": list(self._places.modules),
            "manifest": row.manifest.decode(),
            "threads": self._settings.threads,
            "request": base64.b64encode(request.SerializeToString()).decode(),
        }
        (folder / ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")
        with (folder / LOG_FILE).open("wb") as output:
            worker = await asyncio.create_subprocess_exec(
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
            status = await worker.wait()
        finally:
            if worker.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                await worker.wait()
        return _result(folder, status)


def _require_task(request: pb.EvaluateAgentRequest, row: ArtifactRow) -> None:
    """Refuse a set of another task than the agent's."""
    task = next(field.name for field, _ in request.ListFields() if field.message_type is not None)
    if task != row.body["task"]:
        description = (
            f"{row.name} was trained for {row.body['task']}: give a set of that task, in the field of its name"
        )
        raise IncompatibleError(
            f"{task}: {description}", violations=[FieldViolation(field=task, description=description)]
        )


def _result(folder: Path, status: int) -> list[Measured]:
    """Return what a worker that has ended left. Errors: those that it tells; UnavailableError, InternalError."""
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        with (folder / LOG_FILE).open(encoding="utf-8", errors="replace") as output:
            printed = output.read()[-_TOLD_CHARS:]
        log.error("evaluation ended without a result", status=status, output=printed)
        if status == -signal.SIGKILL:
            raise UnavailableError(
                "the evaluation's process was ended by SIGKILL, which a machine short of memory sends too: call again"
            ) from None
        raise InternalError from None
    error = result.get("error")
    if error is not None:
        violations = [FieldViolation(field=field, description=description) for field, description in error["fields"]]
        raise BY_REASON[error["reason"]](error["message"], violations=violations)
    return [Measured(**measured) for measured in result["evaluations"]]


def _message(measured: Measured) -> agent_pb2.Evaluation:
    return agent_pb2.Evaluation(
        metric=measured.metric, dataset=measured.dataset, value=measured.value, rows=measured.rows
    )
