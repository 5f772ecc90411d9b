"""Model cards in a terminal: `forge card`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.artifacts import Kind, KindOption, found_as
from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.session import Session, command, print_line, say
from cognateforge.cli.terminal import console, printable

if TYPE_CHECKING:
    from cognateforge.agent.v1.agent_pb2 import GetAgentCardResponse
    from cognateforge.exchange.v1.model_pb2 import GetModelCardResponse

# Lines of a card that goes into a file or a pipe.
_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def card(
        session: Session,
        name: Annotated[str, typer.Argument(help="Model or agent.", callback=check_artifact_name)],
        kind: KindOption = None,
        raw: Annotated[bool, typer.Option("--raw", help="Print the Markdown as it is.")] = False,
    ) -> None:
        """Show the card of a model or agent: what it is, what it was made of, what was measured, its limits."""

        def of_model() -> GetModelCardResponse | GetAgentCardResponse:
            from cognateforge.exchange.v1 import model_pb2

            return session.cognate_client.models.GetModelCard(model_pb2.GetModelCardRequest(name=name))

        def of_agent() -> GetModelCardResponse | GetAgentCardResponse:
            from cognateforge.agent.v1 import agent_pb2

            return session.agent_client.agents.GetAgentCard(agent_pb2.GetAgentCardRequest(name=name))

        found = found_as(name, kind, {Kind.MODEL: of_model, Kind.AGENT: of_agent})
        if session.as_json:
            session.emit(found)
        elif not found.markdown:
            say(f"{found.name} was published without a card")
        elif raw and sys.stdout.isatty():
            print_line(found.markdown, newline=False)
        elif raw:  # into a file, where its digest is that of the version's README.md
            sys.stdout.buffer.write(found.markdown.encode())
        else:
            _render(found.markdown)


def _render(markdown: str) -> None:
    from rich.markdown import Markdown

    console(pipe_width=_WIDTH).print(Markdown(printable(markdown), hyperlinks=False))
