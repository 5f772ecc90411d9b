"""A plan that is only looked at has its rows read, in a process of its own and within the caller's time."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent_server.data.check import RowChecker, answer_for
from agent_server.data.processor import AgentDataProcessor
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.cli.app import app
from cognateforge.client import AsyncAgentClient
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.agent.data_support import plan_for, write_rows
from tests.support.servers import running_agent
from training_common.settings import DataSettings

ROWS: list[Any] = [
    *({"text": f"{word} {n}", "label": word} for n in range(30) for word in ("one", "two")),
    {"text": "One 1!", "label": "one"},
    {"text": 3, "label": "one"},
    b"{",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a file that is sound enough."""
    place = tmp_path / "data"
    place.mkdir()
    write_rows(place / "rows.jsonl", ROWS)
    return place


@pytest.fixture
async def agents(folder: Path, tmp_path: Path) -> AsyncIterator[AsyncAgentClient]:
    """A server over that folder."""
    async with (
        running_agent(tmp_path / "agent", data={"folder": folder}) as server,
        AsyncAgentClient(server.address, timeout_s=60) as client,
    ):
        yield client


def _request(task: str = "classification", path: str = "rows.jsonl", **wishes: Any) -> pb.StartTrainingRequest:
    plan = plan_for(task, path, **wishes)
    plan.agent, plan.architecture, plan.total_steps = "intent-router", "cognate", 40
    plan.foundation.name = "cognate-25m"
    plan.adaptation.lora.SetInParent()
    plan.optimization.adamw.SetInParent()
    return pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan, validate_only=True)


async def test_a_dry_run_tells_what_becomes_of_the_rows(agents: AsyncAgentClient) -> None:
    """Every row is counted, the refused ones have place and remedy, and no job is made."""
    answer = await agents.training.StartTraining(_request())
    report = answer.data_report
    assert ("rows", 63, 60) == (report.dataset, report.rows_read, report.rows_kept)
    assert [("not_json", 1), ("wrong_type", 1)] == [(count.reason, count.rows) for count in report.refused]
    assert [("repeated_text", 1)] == [(count.reason, count.rows) for count in report.left_out]
    finding = report.findings[0]
    assert ("rows.jsonl", 62, "text", "wrong_type", "expected text, got int", "write it as text") == (
        finding.file, finding.line, finding.field, finding.reason, finding.detail, finding.remedy,
    )  # fmt: skip
    assert answer.HasField("estimate")
    assert [] == list((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)


async def test_a_dry_run_refuses_what_the_job_would_fail_for(agents: AsyncAgentClient) -> None:
    """With the field, the counts and the first findings; what is made without a dry run is a job."""
    request = _request(max_refused_share=0.01)
    with pytest.raises(DataUnavailableError, match=r"2 of 63 rows are refused") as refused:
        await agents.training.StartTraining(request)
    assert {"plan.classification.file"} == {v.field for v in refused.value.violations}
    assert any(v.description.startswith("rows.jsonl:62 text: expected text") for v in refused.value.violations)
    request.validate_only = False
    assert not (await agents.training.StartTraining(request)).HasField("data_report")


async def test_rows_are_not_read_beyond_the_callers_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read by then is told, with a finding that says so; a process that does not come to an end is ended."""
    plan = _request().plan
    checker = RowChecker(DataSettings(folder=folder), hub_dir=None)
    checked = await checker.check(plan, within_s=0.01)
    assert checked is not None
    assert ("rows.jsonl", 0, "not_read_to_the_end") == (
        checked.dataset, checked.report["rows_read"], checked.report["findings"][0]["reason"],
    )  # fmt: skip
    request = {
        "plan": base64.b64encode(plan.SerializeToString()).decode(),
        "folder": str(folder), "hub": False, "hub_dir": None, "until": time.monotonic() + 60,
    }  # fmt: skip
    ticks = iter(range(1000))
    monkeypatch.setattr("agent_server.data.check.time.monotonic", lambda: 1e12 if next(ticks) > 40 else 0.0)
    partial: Any = answer_for(request)["report"]
    assert (41, 41, 0) == (partial["rows_read"], partial["rows_kept"], partial["rows_refused"])
    assert "after 41 rows" in partial["findings"][0]["detail"]


async def test_a_check_that_is_killed_or_breaks_is_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory, for instance: an error that says so, and none of its text for one of ours."""
    checker, plan = RowChecker(DataSettings(folder=folder), hub_dir=None), _request().plan
    true = asyncio.create_subprocess_exec

    def instead(code: str) -> None:
        async def start(*_command: str, **pipes: Any) -> Any:
            return await true(sys.executable, "-c", code, **pipes)

        monkeypatch.setattr("agent_server.data.check.asyncio.create_subprocess_exec", start)

    instead("import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DataUnavailableError, match=f"signal {signal.SIGKILL.value}"):
        await checker.check(plan, within_s=60)
    instead("input(); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="code 3"):
        await checker.check(plan, within_s=60)


async def test_a_check_whose_caller_has_gone_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process stays behind."""
    checker, plan = RowChecker(DataSettings(folder=folder), hub_dir=None), _request().plan
    true, begun = asyncio.create_subprocess_exec, asyncio.Queue[Any]()

    async def start(*_command: str, **pipes: Any) -> Any:
        process = await true(sys.executable, "-c", "import time; input(); time.sleep(600)", **pipes)
        await begun.put(process)
        return process

    monkeypatch.setattr("agent_server.data.check.asyncio.create_subprocess_exec", start)
    checking = asyncio.create_task(checker.check(plan, within_s=600))
    process = await begun.get()
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert -signal.SIGKILL == process.returncode


async def test_a_task_without_rows_has_no_report_and_no_bounds_on_rows(folder: Path) -> None:
    """Nothing is started for it, and what it would not heed is refused."""
    plan = pb.TrainingPlan(reinforcement=pb.ReinforcementTask(environment="CartPole-v1"))
    assert await RowChecker(DataSettings(folder=folder), hub_dir=None).check(plan, within_s=1) is None
    processor = AgentDataProcessor(DataSettings(folder=folder))
    processor.require_available(plan)
    plan.rehearsal.file.path = "rows.jsonl"
    with pytest.raises(InvalidFieldError, match=r"plan\.rehearsal: the task reinforcement .* leave it out"):
        processor.require_available(plan)


async def test_forge_prints_the_report(folder: Path, tmp_path: Path) -> None:
    """A line for the set, and one for each finding: place, what is wrong, what to do."""
    async with running_agent(tmp_path / "agent", data={"folder": folder}) as server:

        def forge(*options: str) -> Any:
            command = ["train", "--agent-server", server.address, "--agent", "intent-router", "--foundation", "f@1"]
            command += ["--steps", "4", "--validate-only", "--timeout", "60", *options]
            return CliRunner().invoke(app, command)

        shown = await asyncio.to_thread(forge, "--data", "rows.jsonl")
        told = await asyncio.to_thread(forge, "--data", "rows.jsonl", "--json")
        refused = await asyncio.to_thread(forge, "--data", "rows.jsonl", "--max-refused-share", "0.01")
        missing = await asyncio.to_thread(forge, "--data", "missing.jsonl")
    assert 0 == shown.exit_code, shown.output
    assert (
        "rows: 63 rows read, 60 used, 2 refused (not_json 1, wrong_type 1), 1 left out (repeated_text 1)"
        in shown.output
    )
    assert "rows.jsonl:62 text: expected text, got int; write it as text" in shown.output
    assert 62 == json.loads(told.stdout.splitlines()[-1])["data_report"]["findings"][0]["line"]
    assert 0 != refused.exit_code
    assert "2 of 63 rows are refused" in refused.output
    assert "--data" in missing.output
