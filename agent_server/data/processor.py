"""The agents' data: `AgentDataProcessor` takes a training plan to checked, divided and labelled examples of its task.

Each row that is not used is in the report. docs/data.md has the forms of rows by task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from agent_server.data.behavioural import BehaviouralForm
from agent_server.data.classification import ClassificationForm
from agent_server.data.dialogue import DialogueForm
from agent_server.data.domain import DomainForm
from agent_server.data.examples import PreparedData
from agent_server.data.extraction import ExtractionForm
from agent_server.data.hub import HubSet
from agent_server.data.pipeline import Form, Limits, counted, prepare_rows
from agent_server.data.preference import PreferenceForm
from agent_server.data.question_answering import QuestionAnsweringForm
from agent_server.data.source import DataPlace, Source, from_file, from_hub, generated
from agent_server.data.tool_calling import ToolCallingForm
from agent_server.tasks import WITH_ROWS
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError, FieldViolation, ForgeError, InvalidFieldError
from training_common.attempt import Json
from training_common.findings import ProcessingReport
from training_common.settings import DataSettings


def _nothing() -> None:
    pass


class AgentDataProcessor:
    """Rows of a plan in, examples out.

    settings: where rows may come from. hub_dir: where rows of the hub are kept once they were read; None keeps none.
    """

    def __init__(self, settings: DataSettings, *, hub_dir: Path | None = None) -> None:
        self._place = DataPlace(folder=settings.folder, hub=settings.hub, hub_dir=hub_dir)

    def require_available(self, plan: pb.TrainingPlan) -> None:
        """Fail early, before a job is queued, where a source is not there. No row is read, and the hub is not asked.

        Errors: DataUnavailableError, InvalidFieldError, with the field's place in a request with a plan.
        """
        task = plan.WhichOneof("task") or ""
        if task not in WITH_ROWS:
            for name in ("rehearsal", "data_limits"):
                if plan.HasField(name):
                    description = f"the task {task} learns in an environment and has no rows: leave it out"
                    violation = FieldViolation(field=f"plan.{name}", description=description)
                    raise InvalidFieldError(f"plan.{name}: {description}", violations=[violation])
            return
        _source(self._place, getattr(plan, task), form_of(task, getattr(plan, task)), f"plan.{task}.")
        if plan.HasField("rehearsal"):
            _source(self._place, plan.rehearsal, form_of(task, getattr(plan, task)), "plan.rehearsal.")

    def prepare(
        self,
        plan: pb.TrainingPlan,
        *,
        each_row: Callable[[], None] = _nothing,
        report: ProcessingReport | None = None,
    ) -> PreparedData[Any]:
        """Read, check, divide and make the examples of a plan's task.

        each_row: called at every row; it may raise to end it. report: filled on the way; a new one by default.
        Errors: DataUnavailableError, when the rows are not there or do not make the task; InvalidFieldError.
        """
        task = plan.WhichOneof("task") or ""
        limits = _limits(plan.data_limits)
        return self.prepare_set(
            task, getattr(plan, task), limits=limits, each_row=each_row, report=report, place=f"plan.{task}."
        )

    def prepare_rehearsal(
        self, plan: pb.TrainingPlan, labels: Sequence[str], *, each_row: Callable[[], None] = _nothing
    ) -> PreparedData[Any] | None:
        """Prepare the earlier set of a plan, whose labels have to be among the plan's own; None where it has none.

        Which labels and domains are kept of the plan's rows says nothing of the earlier set's. Errors: as `prepare`.
        """
        if not plan.HasField("rehearsal"):
            return None
        task = plan.WhichOneof("task") or ""
        wish = type(getattr(plan, task))()
        wish.CopyFrom(getattr(plan, task))
        for name in ("generated", "hub", "domains", "max_rows_per_label"):
            if name in wish.DESCRIPTOR.fields_by_name:
                wish.ClearField(name)
        wish.file.CopyFrom(plan.rehearsal.file)
        limits = _limits(plan.data_limits)
        return self.prepare_set(task, wish, limits=limits, labels=labels, each_row=each_row, place="plan.rehearsal.")

    def prepare_set(
        self,
        task: str,
        wish: Any,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        labels: Sequence[str] | None = None,
        to_measure: bool = False,
        each_row: Callable[[], None] = _nothing,
        report: ProcessingReport | None = None,
        place: str = "",
    ) -> PreparedData[Any]:
        """Prepare the rows that a task's message names.

        wish: the message, for instance a ClassificationTask. labels: those of another set that this one has to keep to.
        to_measure: nothing is trained on it, so that test rows are enough.
        place: of the message in its request, for the fields that errors name. Errors: as `prepare`.
        """
        form = form_of(task, wish, labels=labels, to_measure=to_measure)
        source = _source(self._place, wish, form, place)
        try:
            return prepare_rows(
                source,
                form,
                wish=MessageToDict(wish, preserving_proto_field_name=True),
                limits=limits,
                each_row=each_row,
                report=report or ProcessingReport(),
                needed=("test",) if to_measure else ("train", "test"),
            )
        except (DataUnavailableError, InvalidFieldError) as error:
            raise _at(place, error, field=_field(wish)) from error


def ready_event(data: PreparedData[Any]) -> dict[str, Json]:
    """Return what a job tells of its data before it trains: counts, and the first row that was refused."""
    report, labels = data.report, f", {len(data.labels)} labels" if data.labels else ""
    message = f"{data.name} ({data.manifest.kind}): {len(data.train)} to train on, {len(data.test)} to test on{labels}"
    if report.findings:
        message += f"; {report.rows_refused} of {report.rows_read} rows refused, the first: {report.findings[0]}"
    return {
        "message": message,
        "dataset": data.name,
        "kind": data.manifest.kind,
        "rows_read": report.rows_read,
        "rows_kept": report.rows_kept,
        "rows_refused": report.rows_refused,
        "rows_left_out": report.rows_left_out,
        "refused": counted(report.refused),
        "left_out": counted(report.left_out),
        "digest": data.manifest.digest,
    }


def form_of(task: str, wish: Any, *, labels: Sequence[str] | None = None, to_measure: bool = False) -> Form[Any, Any]:
    """Return how the rows of a task become examples. labels, to_measure: as in `AgentDataProcessor.prepare_set`."""
    given = None if labels is None else tuple(labels)
    match task:
        case "classification":
            return ClassificationForm(
                include_out_of_scope=wish.include_out_of_scope,
                max_rows_per_label=wish.max_rows_per_label,
                domains=frozenset(wish.domains),
                labels=given,
                to_measure=to_measure,
            )
        case "extraction":
            return ExtractionForm(labels=given)
        case "behavioural":
            return BehaviouralForm(successes_only=wish.successes_only, weight_by_reward=wish.weight_by_reward)
        case "dialogue":
            return DialogueForm()
        case "domain":
            return DomainForm()
        case "question_answering":
            return QuestionAnsweringForm()
        case "tool_calling":
            return ToolCallingForm()
        case "preference":
            return PreferenceForm()
    raise ValueError(f"the task {task!r} has no rows")


def _source(place: DataPlace, wish: Any, form: Form[Any, Any], at: str) -> Source:
    """Resolve where a message's rows come from. Errors: DataUnavailableError, InvalidFieldError, below the message."""
    try:
        match _field(wish):
            case "hub":
                hub = HubSet(dataset=wish.hub.dataset, config=wish.hub.config, revision=wish.hub.revision)
                return from_hub(place, hub)
            case "generated":
                return generated(wish.generated.seed)
            case _:
                return from_file(place, wish.file.path, companions=form.companions)
    except (DataUnavailableError, InvalidFieldError) as error:
        raise _at(at, error, field="file.path") from error


def _field(wish: Any) -> str:
    """Return which source a message names."""
    fields = wish.DESCRIPTOR.fields_by_name
    return next((name for name in ("hub", "generated") if name in fields and wish.HasField(name)), "file")


def _at(place: str, error: ForgeError, *, field: str) -> ForgeError:
    """Return the error with its fields named by their place in the request, which the pipeline does not know."""
    violations = [
        FieldViolation(field=f"{place}{v.field or field}", description=v.description) for v in error.violations
    ]
    moved: ForgeError = type(error)(error.message, violations=violations)
    return moved


def _limits(limits: pb.DataLimits) -> Limits:
    if limits.HasField("max_refused_share"):
        return Limits(max_refused_share=limits.max_refused_share)
    return Limits()
