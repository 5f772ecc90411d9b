"""Read the rows of a plan that is only to be looked at, in a process of its own.

A server that answers others at the same time neither parses rows nor loads what Parquet and the hub need, and what a
file does to memory ends with the process. Plan and settings come on standard input as JSON; the answer goes to standard
output.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent_server.data.processor import AgentDataProcessor
from agent_server.tasks import WITH_ROWS
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError, FieldViolation, ForgeError, InvalidFieldError
from training_common.attempt import Json
from training_common.findings import MAX_FINDINGS, Finding, ProcessingReport
from training_common.settings import DataSettings

# Of what is left of the caller's time: when reading ends by itself, and when the process is ended.
_READ_SHARE, _WAIT_SHARE = 0.75, 0.9
# Reading takes a core: more checks at the same time wait for each other.
CHECKS_AT_ONCE = 2
_ERRORS = {error.__name__: error for error in (DataUnavailableError, InvalidFieldError)}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What became of the rows, as `ProcessingReport.to_json` tells it. dataset: the set's name."""

    dataset: str
    report: dict[str, Any]


class RowChecker:
    """Checks the rows of plans, a few at a time."""

    def __init__(self, settings: DataSettings, *, hub_dir: Path | None) -> None:
        self._settings = settings
        self._hub_dir = hub_dir
        self._places = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def check(self, plan: pb.TrainingPlan, *, within_s: float) -> Checked | None:
        """Return what becomes of a plan's rows; None for a task without rows.

        A report of what was read in time begins with a finding of reason "not_read_to_the_end".
        Errors: DataUnavailableError, for rows that do not make the task; InvalidFieldError.
        """
        if plan.WhichOneof("task") not in WITH_ROWS:
            return None
        began = time.monotonic()
        request = json.dumps(
            {
                "plan": base64.b64encode(plan.SerializeToString()).decode(),
                "folder": None if self._settings.folder is None else str(self._settings.folder),
                "hub": self._settings.hub,
                "hub_dir": None if self._hub_dir is None else str(self._hub_dir),
                "until": began + _READ_SHARE * within_s,
            }
        )
        try:
            async with asyncio.timeout(_WAIT_SHARE * within_s), self._places:
                answer = await _run(request.encode())
        except TimeoutError:
            report = ProcessingReport()
            return Checked(dataset=_name(plan), report=_unfinished(report, plan))
        if "error" in answer:
            violations = [FieldViolation(field=field, description=text) for field, text in answer["violations"]]
            raise _ERRORS[answer["error"]](answer["message"], violations=violations)
        return Checked(**answer)


async def _run(request: bytes) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate(request)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    code = process.returncode or 0
    if code < 0:
        raise DataUnavailableError(
            f"reading the rows was ended by signal {-code}: use a smaller set, if memory was short"
        )
    if code:
        raise RuntimeError(f"the check of rows ended with code {code}")
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])  # a library may have printed before
    return answer


class _OutOfTime(Exception):  # noqa: N818 - no error: what was read is told
    pass


def answer_for(request: dict[str, Any]) -> dict[str, Json]:
    """Return the answer to one request, an error of the tree among them."""
    plan = pb.TrainingPlan.FromString(base64.b64decode(request["plan"]))
    hub_dir = request["hub_dir"]
    processor = AgentDataProcessor(
        DataSettings(folder=request["folder"], hub=request["hub"]), hub_dir=hub_dir and Path(hub_dir)
    )
    report = ProcessingReport()

    def each_row() -> None:
        if time.monotonic() > request["until"]:
            raise _OutOfTime

    try:
        data = processor.prepare(plan, each_row=each_row, report=report)
        processor.prepare_rehearsal(plan, data.labels, each_row=each_row)
    except _OutOfTime:
        return {"dataset": _name(plan), "report": _unfinished(report, plan)}
    except ForgeError as error:
        fields: list[Json] = [[v.field, v.description] for v in error.violations]
        return {"error": type(error).__name__, "message": error.message, "violations": fields}
    return {"dataset": data.name, "report": data.report.to_json()}


def _unfinished(report: ProcessingReport, plan: pb.TrainingPlan) -> dict[str, Json]:
    """Return a report of what was read in time, whose first finding says so. What is sound so far counts as kept."""
    if not report.balanced:
        report.keep(report.rows_read - report.rows_refused - report.rows_left_out)
    finding = Finding(
        file=_name(plan),
        line=0,
        field="",
        reason="not_read_to_the_end",
        detail=f"the caller's time was over after {report.rows_read} rows; repeats were not looked for",
        remedy="ask with a longer deadline",
    )
    told = report.to_json()
    findings: Json = [*map(asdict, (finding, *report.findings[: MAX_FINDINGS - 1]))]
    return told | {"findings": findings}


def _name(plan: pb.TrainingPlan) -> str:
    wish = getattr(plan, plan.WhichOneof("task") or "")
    return str(wish.hub.dataset or wish.file.path)


if __name__ == "__main__":
    print(json.dumps(answer_for(json.load(sys.stdin))))  # noqa: T201 - the answer
