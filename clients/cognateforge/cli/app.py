"""The application: every command, and the exit codes in its help."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from cognateforge.cli import (
    agents,
    artifacts,
    cards,
    certs,
    dashboard,
    debug_bundle,
    doctor,
    export,
    export_metrics,
    jobs,
    notify,
    provenance,
    reservations,
    smoke,
    status,
    storage,
    top,
    train,
)
from cognateforge.cli.exits import epilog
from cognateforge.cli.plugins import ExtensibleGroup

app = typer.Typer(
    name="forge",
    cls=ExtensibleGroup,
    help="Pretrain Cognate-25M foundation models and train agents from them.",
    epilog=epilog(),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"forge {version('cognateforge')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for module in (
    *(train, jobs, top, artifacts, agents, cards, export, storage, provenance, reservations),
    *(status, dashboard, export_metrics, notify, doctor, smoke, debug_bundle, certs),
):
    module.register(app)
