"""Where things come from: `forge verify`, `forge lineage`, and the keys that sign."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cognateforge.cli.artifacts import Kind, KindOption
from cognateforge.cli.exits import Exit
from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.session import Session, command, first_found, print_line
from cognateforge.cli.terminal import console, printable

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from cognateforge.client.lineage import Step
    from cognateforge.client.provenance import VerifiedProvenance

T = TypeVar("T")
# Hex digits of a digest that a person is shown; --json has all of them.
_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Add the commands."""
    _keys(app)
    _verify(app)
    _lineage(app)


def _keys(app: typer.Typer) -> None:
    keys = typer.Typer(help="Make keys that sign what is published.", no_args_is_help=True)
    app.add_typer(keys, name="keys")

    @command(keys)
    def make(
        session: Session,
        out: Annotated[Path, typer.Option("--out", help="Folder that will hold both files.")],
    ) -> None:
        """Make a P-256 key pair: signing.key for the service that publishes, signing.pub.pem for all that verify."""
        from cognateforge.signatures import make_keys

        pair = make_keys(out)
        if session.as_json:
            session.emit({"private": str(pair.private), "public": str(pair.public), "fingerprint": pair.fingerprint})
        else:
            print_line(f"{pair.fingerprint}  {pair.private}  {pair.public}")


def _verify(app: typer.Typer) -> None:
    @command(app)
    def verify(
        session: Session,
        what: Annotated[
            str, typer.Argument(metavar="NAME_OR_FOLDER", help="A model, an agent, or a folder that was fetched.")
        ],
        public_key: Annotated[list[Path], typer.Option("--public-key", help="PEM of a trusted key. May be repeated.")],
        kind: KindOption = None,
    ) -> None:
        """Hold a version's manifest, statement and signature against trusted keys; of a folder, every byte too."""
        from cognateforge.client.provenance import verify_folder

        folder = Path(what)
        if "/" in what or what.startswith(".") or folder.is_dir():
            found, of = verify_folder(folder, public_keys=public_key), "every byte"
        else:
            found, of = _verify_remote(session, check_artifact_name(what), public_key, kind), "manifest and statement"
        sources = [f"{one['name']} ({one['kind']}, {one['rows']} rows)" for one in found.told["data"]["sources"]]
        if session.as_json:
            session.emit(
                {"name": found.name, "digest": found.digest, "key": found.key, "statement": found.statement_digest}
            )
            return
        print_line(f"{found.name} {found.digest}")
        print_line(f"signed with {found.key}; {of} verified")
        print_line(f"made of {', '.join(sources) or 'no data'} by code {found.told['code'].get('version', '')}")


def _verify_remote(session: Session, name: str, keys: list[Path], kind: Kind | None) -> VerifiedProvenance:
    from cognateforge.agent.v1 import agent_pb2
    from cognateforge.client.provenance import verify_provenance
    from cognateforge.exchange.v1 import model_pb2

    def of_model() -> VerifiedProvenance:
        stub = session.cognate_client.models
        model = stub.GetModel(model_pb2.GetModelRequest(name=name)).model
        told = stub.GetModelProvenance(model_pb2.GetModelProvenanceRequest(name=model.name)).provenance
        return verify_provenance(told, name=model.name, digest=model.digest, public_keys=keys)

    def of_agent() -> VerifiedProvenance:
        stub = session.agent_client.agents
        agent = stub.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent
        told = stub.GetAgentProvenance(agent_pb2.GetAgentProvenanceRequest(name=agent.name)).provenance
        return verify_provenance(told, name=agent.name, digest=agent.digest, public_keys=keys)

    return _ask(name, kind, {Kind.MODEL: of_model, Kind.AGENT: of_agent})


def _ask(name: str, kind: Kind | None, tries: dict[Kind, Callable[[], T]]) -> T:
    """Return what the service that has a name says of it."""
    if kind is None and re.search(r"@[a-z]", name):
        kind = Kind.AGENT  # only agents have aliases
    return first_found([tries[kind]] if kind else list(tries.values()))


def _lineage(app: typer.Typer) -> None:
    @command(app)
    def lineage(
        session: Session,
        name: Annotated[str, typer.Argument(help="A model or an agent.", callback=check_artifact_name)],
        public_key: Annotated[
            list[Path] | None, typer.Option("--public-key", help="PEM of a trusted key, to verify each step with.")
        ] = None,
        kind: KindOption = None,
    ) -> Exit:
        """Draw the chain from data to agent; of a foundation model, also everything that was made of it."""
        from cognateforge.client.lineage import Lineage, Trust

        asked = Lineage(session.cognate_client, session.agent_client, public_key or ())
        found: Step = _ask(
            name, kind, {Kind.MODEL: lambda: asked.of_model(name), Kind.AGENT: lambda: asked.of_agent(name)}
        )
        if session.as_json:
            session.emit(_plain(found))
        else:
            _draw(found)
        unproved = [step for step in found.steps() if step.kind in ("model", "agent") and step.trust != Trust.VERIFIED]
        return Exit.PRECONDITION if public_key and unproved else Exit.OK


def _plain(step: Step) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "name": step.name,
        "digest": step.digest,
        "trust": step.trust.value,
        "trust_detail": step.trust_detail,
        "job": step.job,
        "code": step.code,
        "data": step.data,
        "made_of": [_plain(below) for below in step.made_of],
        "made": [_plain(above) for above in step.made],
    }


def _draw(step: Step) -> None:
    from rich.tree import Tree

    tree = Tree(_text(_line(step)))
    _grow(tree, step)
    # A pipe has no width: nothing is cut there.
    console(pipe_width=400).print(tree)


def _grow(tree: Tree, step: Step) -> None:
    if step.code:
        tree.add(_text(f"code {step.code.get('version', '')} {_short(str(step.code.get('digest', '')))}"))
    for one in step.data:
        tree.add(_text(f"data {one['name']}: {one['kind']}, {one['rows']} rows, {_short(one['digest'])}"))
    for below in step.made_of:
        _grow(tree.add(_text(f"made of {_line(below)}")), below)
    for above in step.made:
        _grow(tree.add(_text(f"made into {_line(above)}")), above)


def _text(words: str) -> Text:
    from rich.text import Text

    return Text(printable(words))


def _line(step: Step) -> str:
    detail = f" ({_short(step.trust_detail) if step.trust == 'verified' else step.trust_detail})"
    words = f"{step.kind} {step.name} {_short(step.digest)} {step.trust.value}"
    return words + (detail if step.trust_detail else "")


def _short(digest: str) -> str:
    return digest[: len("sha256:") + _SHOWN]
