"""What `forge train` makes of its options about rows, and how it prints what became of them."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.cli.errors import option_for
from cognateforge.cli.rows import report_lines, set_rows
from cognateforge.cli.train import Task

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _plan(task: str, data: str, **wishes: Any) -> pb.TrainingPlan:
    plan = pb.TrainingPlan()
    given = {"data_seed": 0, "max_refused_share": None, "rehearse": "", "rehearsal_share": 0.0, **wishes}
    set_rows(plan, task, data, **given)
    return plan


def test_data_names_a_file_a_set_of_the_hub_or_generated_rows() -> None:
    """Each in its own field, for every task that has rows."""
    for task in (task.field for task in Task if not task.acts):
        assert pb.FileSource(path="agent/sgd") == getattr(_plan(task, "agent/sgd"), task).file
    hub = _plan("tool_calling", f"hub:owner/set:small@{COMMIT}").tool_calling.hub
    assert pb.HubSource(dataset="owner/set", config="small", revision=COMMIT) == hub
    assert "" == _plan("domain", f"hub:owner/set@{COMMIT}").domain.hub.config
    assert 7 == _plan("classification", "generated", data_seed=7).classification.generated.seed
    plan = _plan("domain", "x.jsonl", max_refused_share=0.0, rehearse="old.jsonl", rehearsal_share=0.25)
    assert plan.data_limits.HasField("max_refused_share")
    assert ("old.jsonl", 0.25) == (plan.rehearsal.file.path, plan.rehearsal.share)
    assert not _plan("domain", "x.jsonl").HasField("rehearsal")


@pytest.mark.parametrize(
    ("task", "data", "wishes"),
    [
        ("domain", "generated", {}),
        ("domain", "hub:owner/set", {}),
        ("domain", "x.jsonl", {"rehearsal_share": 0.5}),
    ],
)
def test_data_that_cannot_be_meant_is_refused(task: str, data: str, wishes: dict[str, Any]) -> None:
    """Before anything is sent."""
    with pytest.raises(typer.BadParameter):
        _plan(task, data, **wishes)


def test_fields_of_every_task_lead_to_their_option() -> None:
    """So that an error names what was typed."""
    for task in (task.field for task in Task if not task.acts):
        assert "--data" == option_for(f"plan.{task}.file.path") == option_for(f"plan.{task}.hub.revision")
    assert "--rehearse" == option_for("plan.rehearsal.file")


def test_a_report_is_printed_row_by_row() -> None:
    """A finding of a whole file is no refused row; those that are not told are counted."""
    report = pb.DataReport(
        dataset="set",
        rows_read=9,
        rows_kept=4,
        refused=[pb.RowCount(reason="blank", rows=3)],
        left_out=[pb.RowCount(reason="repeated_text", rows=2)],
        findings=[
            pb.DataFinding(file="set", line=0, detail="not read to the end", remedy="ask again"),
            pb.DataFinding(file="a.jsonl", line=7, field="text", detail="the text is blank", remedy="fill it in"),
        ],
    )
    assert [
        "set: 9 rows read, 4 used, 3 refused (blank 3), 2 left out (repeated_text 2)",
        "  set:0: not read to the end; ask again",
        "  a.jsonl:7 text: the text is blank; fill it in",
        "  and 2 more",
    ] == list(report_lines(report))
