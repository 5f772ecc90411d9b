"""`forge smoke`: whether a service that was just started may take the traffic of the one before it."""

from __future__ import annotations

from typing import Annotated

import typer

from cognateforge.cli.doctor import told
from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import JobService, Service
from cognateforge.cli.session import Session, command, print_line

ExpectVersion = Annotated[str, typer.Option("--expect-version", help="Fail unless the server is this release.")]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def smoke(
        session: Session,
        service: Annotated[Service, typer.Argument(help="Which service.")],
        expect_version: ExpectVersion = "",
    ) -> Exit:
        """Try what users need of a service, and leave nothing behind. Exit code 5 unless all of it works.

        Health of each gRPC service, release, lists, a fetch of the newest published version, and a dry run of a job.
        The caller needs the role of an operator.
        """
        from cognateforge.diagnostics.checks import Level
        from cognateforge.diagnostics.smoke import smoke_test

        failed = False
        for check in smoke_test(JobService(service, session), expect_version=expect_version):
            failed |= check.level is Level.FAIL
            if session.as_json:
                session.emit(check.to_plain())
                continue
            for line in told(check):
                print_line(line)
        return Exit.PRECONDITION if failed else Exit.OK
