"""Commands about models and agents: list, show, fetch, and the aliases of agents."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cognateforge.cli import diff
from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import Progress, RequestId
from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.search import Search, searching
from cognateforge.cli.session import Session, command, first_found, group, new_request_id, print_line, say
from cognateforge.cli.terminal import can_draw, console

if TYPE_CHECKING:
    from cognateforge.cli.session import Row
    from cognateforge.client import FetchedArtifact
    from cognateforge.exchange.v1.model_pb2 import FoundationModel


T = TypeVar("T")


class Kind(enum.StrEnum):
    """What a name stands for."""

    MODEL = "model"
    AGENT = "agent"


class State(enum.StrEnum):
    """What a model is good for."""

    READY = "ready"
    EXPERIMENTAL = "experimental"


Limit = Annotated[int, typer.Option(min=1, help="Most rows.")]
KindOption = Annotated[Kind | None, typer.Option("--kind", help="What the name stands for. Default: both are asked.")]
States = Annotated[list[State] | None, typer.Option("--state", help="Only this state; may be repeated.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for add in (_models, _agents, _fetch):
        add(app)


def pages(call: Callable[[int, str], Any], rows: str, limit: int) -> Iterator[Any]:
    """Yield up to `limit` rows of a paged list. call: returns the page of a size at a token."""
    token = ""
    while limit > 0:
        page = call(min(limit, 500), token)
        found = getattr(page, rows)[:limit]
        yield from found
        limit, token = limit - len(found), page.next_page_token
        if not token:
            return


def _list_models(session: Session, search: Search, states: list[State], limit: int) -> None:
    from cognateforge.cli.plain import enum_word
    from cognateforge.exchange.v1 import model_pb2

    stub = session.cognate_client.models
    request = model_pb2.ListModelsRequest(
        family=search.family,
        states=[model_pb2.ModelState.Value(f"MODEL_STATE_{state.name}") for state in states],
        filter=search.filter,
        order=search.ordering,
    )

    def page(size: int, token: str) -> model_pb2.ListModelsResponse:
        request.page_size, request.page_token = size, token
        return stub.ListModels(request)

    def cells(item: FoundationModel) -> tuple[object, ...]:
        state = enum_word(model_pb2.ModelState.DESCRIPTOR, item.state)
        plain = item.name, state, item.steps, item.tokens, item.size_bytes, item.digest
        return *plain, *search.measured(item.results)

    rows: list[Row] = [(item, {}, cells(item)) for item in pages(page, "models", limit)]
    session.table(("name", "state", "steps", "tokens", "bytes", "digest", *search.columns), rows)


def _models(app: typer.Typer) -> None:
    @searching
    def models(session: Session, search: Search, state: States = None, limit: Limit = 50) -> None:
        """List published foundation models, newest first, or as --order says."""
        _list_models(session, search, state or [], limit)

    below = group(app, models)
    command(below, "list")(models)
    diff.register_models(below)

    @command(below, "validate")
    def validate_model(
        session: Session,
        name: Annotated[str, typer.Argument(help="Version, for instance cognate-25m@7.", callback=check_artifact_name)],
        within: Annotated[float, typer.Option(min=1, help="Seconds for the measurement.")] = 1200.0,
        request_id: RequestId = None,
    ) -> None:
        """Run the gate on a published model's stored files again. The version stays as it is."""
        from cognateforge.cognate.v1 import pretraining_pb2

        request = pretraining_pb2.ValidateModelRequest(request_id=new_request_id(request_id), name=name)
        checks = session.cognate_client.pretraining.ValidateModel(request, timeout=within).checks
        rows: list[Row] = [
            (
                check,
                {},
                (
                    check.name,
                    "integrity" if check.integrity else "quality",
                    f"{check.value:.6g}",
                    f"{check.threshold:.6g}",
                    "yes" if check.passed else "no",
                    check.detail,
                ),
            )
            for check in checks
        ]
        session.table(("check", "kind", "value", "threshold", "holds", "rule"), rows)

    @command(below, "watch")
    def watch_models(
        session: Session,
        after_sequence: Annotated[
            int, typer.Option(min=0, help="Only events after this one. 0: all, or a snapshot where some are gone.")
        ] = 0,
    ) -> None:
        """Follow what happens to foundation models until Ctrl-C."""
        from cognateforge.cli.follow import show_models

        show_models(session, session.cognate_client.watch_models(after_sequence))

    @command(below, "bridge")
    def bridge_models(
        session: Session,
        nats: Annotated[str, typer.Option(help="Server: nats://host:port on this machine, tls://host:port elsewhere.")],
        stream: Annotated[str, typer.Option(help="JetStream stream. It is made where it is not there.")],
        subject: Annotated[str, typer.Option(help="The stream's one subject.")],
        source: Annotated[
            str, typer.Option(help="CloudEvents source: give each Cognate its own.")
        ] = "/cognateforge/exchange/v1/models",
        nats_credentials: Annotated[Path | None, typer.Option(help="A .creds file for the server.")] = None,
    ) -> None:
        """Publish what happens to foundation models to NATS JetStream, as CloudEvents, until Ctrl-C."""
        from cognateforge.cli.bridge import publish

        publish(session, url=nats, stream=stream, subject=subject, source=source, credentials=nats_credentials)

    @command(app)
    def model(
        session: Session,
        name: Annotated[str, typer.Argument(help="cognate-25m or cognate-25m@7.", callback=check_artifact_name)],
    ) -> None:
        """Show one foundation model with its data and checks."""
        from cognateforge.exchange.v1 import model_pb2

        session.show(session.cognate_client.models.GetModel(model_pb2.GetModelRequest(name=name)).model)


def _agents(app: typer.Typer) -> None:
    @command(app)
    def agent(
        session: Session,
        name: Annotated[
            str, typer.Argument(help="intent-router, with @3 or @production.", callback=check_artifact_name)
        ],
    ) -> None:
        """Show one agent with its evaluations."""
        from cognateforge.agent.v1 import agent_pb2

        session.show(session.agent_client.agents.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent)

    @command(app)
    def alias(
        session: Session,
        name: Annotated[
            str, typer.Argument(help="Version, for instance intent-router@3.", callback=check_artifact_name)
        ],
        alias_name: Annotated[str, typer.Argument(help="Alias, for instance production.", metavar="ALIAS")],
        request_id: RequestId = None,
    ) -> None:
        """Point an alias at a version of an agent."""
        from cognateforge.agent.v1 import agent_pb2

        request = agent_pb2.SetAliasRequest(request_id=new_request_id(request_id), name=name, alias=alias_name)
        moved = session.agent_client.agents.SetAlias(request).agent
        if session.as_json:
            session.show(moved)
        else:
            say(f"{alias_name} is {moved.name}")

    @command(app)
    def architectures(session: Session) -> None:
        """List the agent architectures that the agent service can build."""
        from cognateforge.agent.v1 import training_pb2

        answer = session.agent_client.training.ListArchitectures(training_pb2.ListArchitecturesRequest())
        rows: list[Row] = [
            (
                item,
                {},
                (item.name, " ".join(item.tasks), " ".join(s.name for s in item.settings), item.description),
            )
            for item in answer.architectures
        ]
        session.table(("name", "tasks", "settings", "description"), rows)
        for problem in answer.problems:
            say(f"not loaded: {problem.name} ({problem.value}): {problem.reason}")


def _fetch(app: typer.Typer) -> None:
    @command(app)
    def fetch(
        session: Session,
        name: Annotated[str, typer.Argument(help="Model or agent.", callback=check_artifact_name)],
        out: Annotated[Path, typer.Option("--out", help="Folder that will hold its files.")],
        kind: KindOption = None,
        progress: Progress = None,
    ) -> Exit:
        """Fetch a model or agent, resuming where an earlier fetch stopped, and check every digest."""
        got = fetch_any(session, name, out, kind, progress)
        if session.as_json:
            session.emit(
                {
                    "name": got.name,
                    "path": str(got.path),
                    "digest": got.digest,
                    "size_bytes": got.size_bytes,
                    "bytes_received": got.bytes_received,
                }
            )
        else:
            say(f"{got.name} {got.digest}: {got.bytes_received} of {got.size_bytes} bytes transferred")
            print_line(str(got.path))
        return Exit.OK


def fetch_any(session: Session, name: str, out: Path, kind: Kind | None, progress: bool | None) -> FetchedArtifact:
    """Fetch a model or an agent to a folder. progress: whether it is shown; None: on a terminal."""
    with _transfer(progress) as show:
        tries: dict[Kind, Callable[[], FetchedArtifact]] = {
            Kind.MODEL: lambda: session.cognate_client.fetch_model(name, out, show),
            Kind.AGENT: lambda: session.agent_client.fetch_agent(name, out, show),
        }
        return found_as(name, kind, tries)


def found_as(name: str, kind: Kind | None, tries: Mapping[Kind, Callable[[], T]]) -> T:
    """Return what a name stands for, asked of the service of its kind, or of both in turn."""
    if kind is None and not name.rpartition("@")[2].isdecimal() and "@" in name:
        kind = Kind.AGENT  # only agents have aliases
    return first_found([tries[kind]] if kind else list(tries.values()))


@contextmanager
def _transfer(progress: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    if progress is False or (progress is None and not can_draw(sys.stderr)):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
