"""The application: every command, and the exit codes in its help."""

from __future__ import annotations

import typer

from cognateforge.cli import artifacts, jobs, status, train
from cognateforge.cli.exits import epilog

app = typer.Typer(
    name="forge",
    help="Pretrain Cognate-25M foundation models and train agents from them.",
    epilog=epilog(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (train, jobs, artifacts, status):
    module.register(app)
