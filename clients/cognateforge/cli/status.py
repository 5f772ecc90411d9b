"""Commands about the services themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import Service
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.job.v1.job_pb2 import Peer, Removed


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @command(app)
    def status(session: Session) -> Exit:
        """Show health, version and circuit breaker of both services."""
        from cognateforge.exceptions import ForgeError

        worst = Exit.OK
        for service in Service:
            try:
                row = _status(session, service)
            except ForgeError as error:
                if not session.as_json:
                    say(f"{service}:")
                code = session.report(error, service=service.value)
                worst = worst or code
                row = {"service": service.value, "address": _address(session, service), "health": "UNREACHABLE"}
            if session.as_json:
                session.emit(row)
            else:
                cells = {key: ", ".join(v) if isinstance(v, list) else v for key, v in row.items()}
                print_line("  ".join(f"{key} {value}" for key, value in cells.items() if value))
            if row["health"] != "SERVING":
                worst = worst or Exit.UNAVAILABLE
        return worst

    @command(app)
    def version(session: Session) -> None:
        """Show the version of this client."""
        from importlib.metadata import version as installed

        if session.as_json:
            session.emit({"version": installed("cognateforge")})
        else:
            print_line(installed("cognateforge"))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _address(session: Session, service: Service) -> str:
    return session.cognate if service is Service.COGNATE else session.agent_server


def _status(session: Session, service: Service) -> dict[str, Any]:
    from cognateforge.agent.v1 import training_pb2
    from cognateforge.cognate.v1 import pretraining_pb2

    if service is Service.COGNATE:
        info = session.cognate_client.pretraining.GetServerInfo(pretraining_pb2.GetServerInfoRequest()).info
    else:
        info = session.agent_client.training.GetServerInfo(training_pb2.GetServerInfoRequest()).info
    client = session.cognate_client if service is Service.COGNATE else session.agent_client
    return {
        "service": service.value,
        "address": ", ".join(client.addresses),
        "health": client.health(),
        "version": info.version,
        "capabilities": list(info.capabilities),
        "breaker": client.breaker_state,
        "removed": _removed(info.removed),
        "damaged artifacts": info.damaged_artifacts,
        **{f"circuit to {peer.name}": _circuit(peer) for peer in info.peers},
    }


def _removed(removed: Removed) -> str:
    """Return what retention has removed since the server's start, "" for nothing."""
    counts = {
        "job folders": removed.job_folders,
        "bytes": removed.size_bytes,
        "events": removed.events,
        "request ids": removed.request_ids,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _circuit(peer: Peer) -> str:
    from cognateforge.job.v1 import job_pb2

    state = job_pb2.Circuit.Name(peer.circuit).removeprefix("CIRCUIT_").lower().replace("_", "-")
    return (
        f"{state} ({peer.failed} of {peer.admitted} calls failed, {peer.refused} held back, opened {peer.opened} times)"
    )
