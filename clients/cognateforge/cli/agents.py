"""Commands about published agents: `forge agents`."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli import diff
from cognateforge.cli.artifacts import Limit, pages
from cognateforge.cli.jobs import RequestId
from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.search import Search, searching
from cognateforge.cli.session import Session, command, group, new_request_id, say
from cognateforge.cli.train import Task

if TYPE_CHECKING:
    from cognateforge.agent.v1.agent_pb2 import Agent, ListMovesResponse, Move
    from cognateforge.agent.v1.training_pb2 import EvaluateAgentRequest
    from cognateforge.cli.session import Row

Foundation = Annotated[
    str,
    typer.Option(help="Only what was made of this model, for instance cognate-25m@7.", callback=check_artifact_name),
]


def _known_task(text: str) -> str:
    """Return a task as the contract spells it; "tool-calling" and "tool_calling" are both known."""
    tasks = {task.field for task in Task}
    if text and text.replace("-", "_") not in tasks:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(Task)}")
    return text.replace("-", "_")


TaskName = Annotated[
    str, typer.Option("--task", help="Only this task, for instance classification.", callback=_known_task)
]
Version = Annotated[str, typer.Argument(help="Version, for instance intent-router@3.", callback=check_artifact_name)]


class State(enum.StrEnum):
    """How far a version has come."""

    DRAFT = "draft"
    CANDIDATE = "candidate"
    PRODUCTION = "production"
    RETIRED = "retired"


States = Annotated[list[State] | None, typer.Option("--lifecycle", help="Only this state; may be repeated.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @searching
    def agents(
        session: Session,
        search: Search,
        task: TaskName = "",
        lifecycle: States = None,
        foundation: Foundation = "",
        limit: Limit = 50,
    ) -> None:
        """List published agents, newest first, or as --order says."""
        _list(session, search, task, lifecycle or [], foundation, limit)

    below = group(app, agents)
    command(below, "list")(agents)
    diff.register_agents(below)
    _lifecycle(below)
    _evaluate(below)


def _list(session: Session, search: Search, task: str, states: list[State], foundation: str, limit: int) -> None:
    from cognateforge.agent.v1 import agent_pb2
    from cognateforge.cli.plain import enum_word

    stub = session.agent_client.agents
    request = agent_pb2.ListAgentsRequest(
        family=search.family,
        task=task,
        lifecycles=[agent_pb2.Lifecycle.Value(f"LIFECYCLE_{state.name}") for state in states],
        foundation=foundation,
        filter=search.filter,
        order=search.ordering,
    )

    def page(size: int, token: str) -> agent_pb2.ListAgentsResponse:
        request.page_size, request.page_token = size, token
        return stub.ListAgents(request)

    def cells(item: Agent) -> tuple[object, ...]:
        state = enum_word(agent_pb2.Lifecycle.DESCRIPTOR, item.lifecycle)
        plain = item.name, state, " ".join(item.aliases), item.task, item.foundation, item.size_bytes, item.digest
        return *plain, *search.measured(item.evaluations)

    rows: list[Row] = [(item, {}, cells(item)) for item in pages(page, "agents", limit)]
    session.table(("name", "lifecycle", "aliases", "task", "foundation", "bytes", "digest", *search.columns), rows)


def _lifecycle(below: typer.Typer) -> None:
    @command(below)
    def lifecycle(
        session: Session,
        name: Version,
        state: Annotated[State, typer.Argument(help="Where it goes.")],
        request_id: RequestId = None,
    ) -> None:
        """Move a version along: draft, candidate, production; retired from everywhere, and back to draft."""
        from cognateforge.agent.v1 import agent_pb2

        to = agent_pb2.Lifecycle.Value(f"LIFECYCLE_{state.name}")
        request = agent_pb2.SetLifecycleRequest(request_id=new_request_id(request_id), name=name, lifecycle=to)
        moved = session.agent_client.agents.SetLifecycle(request).agent
        if session.as_json:
            session.show(moved)
        else:
            say(f"{moved.name} is {state.name}")

    @command(below)
    def moves(
        session: Session,
        family: Annotated[str, typer.Argument(help="For instance intent-router.", callback=check_artifact_name)],
        limit: Limit = 50,
    ) -> None:
        """List the moves of a family's aliases and lifecycles, newest first."""
        from cognateforge.agent.v1 import agent_pb2

        stub = session.agent_client.agents

        def page(size: int, token: str) -> ListMovesResponse:
            return stub.ListMoves(agent_pb2.ListMovesRequest(family=family, page_size=size, page_token=token))

        rows: list[Row] = [
            (item, {}, (item.time.ToJsonString(), item.version, _words(item), item.caller))
            for item in pages(page, "moves", limit)
        ]
        session.table(("time", "version", "move", "caller"), rows)


def _words(move: Move) -> str:
    from cognateforge.agent.v1 import agent_pb2
    from cognateforge.cli.plain import enum_word

    if move.WhichOneof("kind") == "alias":
        before = f", before at {move.alias.from_version}" if move.alias.from_version else ""
        return f"{move.alias.alias} points at it{before}"
    states = agent_pb2.Lifecycle.DESCRIPTOR
    moved = move.lifecycle
    return f"{enum_word(states, moved.from_lifecycle)} to {enum_word(states, moved.to_lifecycle)}"


def _evaluate(below: typer.Typer) -> None:
    @command(below)
    def evaluate(
        session: Session,
        name: Version,
        data: Annotated[
            str,
            typer.Option(
                help="File or folder under the server's data folder, or 'generated'; for an agent that acts, its "
                "environment."
            ),
        ],
        data_seed: Annotated[int, typer.Option(help="Seed of generated data.")] = 0,
        include_out_of_scope: Annotated[
            bool, typer.Option("--include-out-of-scope", help="Keep rows of no label, as a label of their own.")
        ] = False,
        acting: Annotated[int, typer.Option("--agents", min=0, help="How many act, where several do.")] = 0,
        within: Annotated[float, typer.Option(min=1, help="Seconds for the measurement.")] = 600.0,
        request_id: RequestId = None,
    ) -> None:
        """Measure a version on a set of its task, and keep what was measured."""
        from cognateforge.agent.v1 import agent_pb2, training_pb2

        agent = session.agent_client.agents.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent
        request = training_pb2.EvaluateAgentRequest(request_id=new_request_id(request_id), name=name)
        _set_data(request, agent.task, data, data_seed)
        if include_out_of_scope:
            request.classification.include_out_of_scope = True
        if acting:
            request.multi_agent.agents = acting
        found = session.agent_client.training.EvaluateAgent(request, timeout=within).evaluations
        rows: list[Row] = [(item, {}, (item.metric, f"{item.value:.4f}", item.rows, item.dataset)) for item in found]
        session.table(("metric", "value", "rows", "set"), rows)


def _set_data(request: EvaluateAgentRequest, name: str, data: str, seed: int) -> None:
    """Name the set in the field of the agent's task. Errors: BadParameter."""
    if name not in request.DESCRIPTOR.fields_by_name:
        raise typer.BadParameter(f"the agent's task is {name}, which this release of forge does not know")
    task = getattr(request, name)
    if "environment" in task.DESCRIPTOR.fields_by_name:
        task.environment = data
    elif data != "generated":
        task.file.path = data
    elif name == "classification":
        task.generated.seed = seed
        task.generated.SetInParent()
    else:
        raise typer.BadParameter(f"only classification has generated rows; {name} needs a file", param_hint="--data")
