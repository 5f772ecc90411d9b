"""`forge doctor`: what works, what will not for long, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import JobService, Service
from cognateforge.cli.session import Session, command, print_line

if TYPE_CHECKING:
    from cognateforge.diagnostics.checks import Check

CognateSettings = Annotated[
    Path | None, typer.Option("--cognate-settings", help="Settings file of a Cognate service of this machine.")
]
AgentSettings = Annotated[
    Path | None, typer.Option("--agent-settings", help="Settings file of an agent service of this machine.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def doctor(
        session: Session, cognate_settings: CognateSettings = None, agent_settings: AgentSettings = None
    ) -> Exit:
        """Look at this machine and at both services, change nothing, and say what to do. Exit code 5 tells of failures.

        With a service's settings file, also at its store, folders, devices and certificates.
        """
        from cognateforge.diagnostics.checks import Level

        levels: list[Level] = []
        area = ""
        for check in all_checks(session, {Service.COGNATE: cognate_settings, Service.AGENT: agent_settings}):
            levels.append(check.level)
            if session.as_json:
                session.emit(check.to_plain())
                continue
            if check.area != area:
                area = check.area
                print_line(area)
            for line in told(check):
                print_line(line)
        counts = {level: levels.count(level) for level in Level}
        if not session.as_json:
            print_line(", ".join(f"{count} {level.value}" for level, count in counts.items() if count))
        return Exit.PRECONDITION if counts[Level.FAIL] else Exit.OK


def all_checks(session: Session, settings: dict[Service, Path | None]) -> Iterator[Check]:
    """Yield every check that can be made from here. settings: files of services whose own side is looked at too."""
    from cognateforge.diagnostics.checks import Area
    from cognateforge.diagnostics.environment import check_environment
    from cognateforge.diagnostics.identity import check_authority, check_identity
    from cognateforge.diagnostics.plugins import server_side
    from cognateforge.diagnostics.services import Wire
    from cognateforge.exceptions import ForgeError

    yield from check_environment()
    own = Area("own certificate")
    if session.cert and session.key:
        yield from check_identity(own, cert=session.cert, key=session.key, ca=session.ca)
    elif session.ca:
        yield from check_authority(own, session.ca)
    wire = Wire({})
    for service in Service:
        where = session.cognate if service is Service.COGNATE else session.agent_server
        yield from wire.check(JobService(service, session), where)
    yield wire.skew()
    for service, file in settings.items():
        if file is None:
            continue
        try:
            side = server_side(service.value)
        except ForgeError as error:
            yield Area(f"{service.value} settings").skip("settings", error.message)
            continue
        yield from side.diagnose(file)


def told(check: Check) -> Iterator[str]:
    """Yield a check's lines for people."""
    from cognateforge.cli.terminal import printable

    yield printable(f"  {check.level.value:4}  {check.name}: {check.detail}")
    if check.remedy:
        yield printable(f"        {check.remedy}")
