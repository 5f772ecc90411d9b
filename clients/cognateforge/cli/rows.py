"""Options of `forge train` that say which rows an agent learns from, and what a dry run tells of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cognateforge.agent.v1 import training_pb2

_HUB = re.compile(r"hub:(?P<dataset>[^:@]+)(:(?P<config>[^@]+))?@(?P<revision>.+)")

Data = Annotated[
    str,
    typer.Option(
        help="File or folder under the server's data folder, 'generated', or hub:OWNER/NAME@COMMIT (with a "
        "configuration: hub:OWNER/NAME:CONFIG@COMMIT)."
    ),
]
MaxRefusedShare = Annotated[
    float | None, typer.Option(help="Largest share of rows that may be refused, 0 to 1. Default: 0.1.")
]
WeightByReward = Annotated[
    bool, typer.Option("--weight-by-reward", help="For behavioural: weigh each trajectory by its reward.")
]
Beta = Annotated[float, typer.Option(help="For preference: how strongly the agent is held to its base. 0: 0.1.")]
Rehearse = Annotated[
    str, typer.Option(help="File or folder of an earlier set, on which forgetting is measured and which is mixed in.")
]
RehearsalShare = Annotated[float, typer.Option(help="With --rehearse: its share of each step's rows. 0: none.")]


def set_rows(
    plan: training_pb2.TrainingPlan,
    task: str,
    data: str,
    *,
    data_seed: int,
    max_refused_share: float | None,
    rehearse: str,
    rehearsal_share: float,
) -> None:
    """Name the rows of a task, by its field in TrainingPlan. Errors: typer.BadParameter."""
    wish = getattr(plan, task)
    hub = _HUB.fullmatch(data)
    if data == "generated":
        if task != "classification":
            raise typer.BadParameter(
                f"only classification has generated rows; {task} needs a file", param_hint="--data"
            )
        wish.generated.seed = data_seed
        wish.generated.SetInParent()
    elif hub:
        wish.hub.dataset, wish.hub.revision = hub["dataset"], hub["revision"]
        wish.hub.config = hub["config"] or ""
    elif data.startswith("hub:"):
        raise typer.BadParameter(
            f"{data!r} is not hub:OWNER/NAME@COMMIT: only a commit is the same set tomorrow", param_hint="--data"
        )
    else:
        wish.file.path = data
    if max_refused_share is not None:
        plan.data_limits.max_refused_share = max_refused_share
    if rehearse:
        plan.rehearsal.file.path = rehearse
        plan.rehearsal.share = rehearsal_share
    elif rehearsal_share:
        raise typer.BadParameter("needs --rehearse", param_hint="--rehearsal-share")


def report_lines(report: training_pb2.DataReport) -> Iterator[str]:
    """Yield what became of the rows: a line for the set, and one for each finding."""
    refused, left_out = _counts(report.refused), _counts(report.left_out)
    yield (
        f"{report.dataset}: {report.rows_read} rows read, {report.rows_kept} used, {refused} refused"
        f"{_reasons(report.refused)}, {left_out} left out{_reasons(report.left_out)}"
    )
    for finding in report.findings:
        place = f"{finding.file}:{finding.line}" + (f" {finding.field}" if finding.field else "")
        yield f"  {place}: {finding.detail}; {finding.remedy}"
    told = sum(finding.line > 0 for finding in report.findings)
    if refused > told:
        yield f"  and {refused - told} more"


def _counts(counts: Iterable[training_pb2.RowCount]) -> int:
    return sum(count.rows for count in counts)


def _reasons(counts: Iterable[training_pb2.RowCount]) -> str:
    told = ", ".join(f"{count.reason} {count.rows}" for count in counts)
    return f" ({told})" if told else ""
