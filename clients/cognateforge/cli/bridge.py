"""Runs the bridge to NATS from the command line."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cognateforge.cli.session import Session, print_line
from cognateforge.exceptions import ClientSetupError


def publish(session: Session, *, url: str, stream: str, subject: str, source: str, credentials: Path | None) -> None:
    """Publish until interrupted, and print a line for each event that the stream holds.

    Errors: ClientSetupError, where the extra `nats` is not installed; those of the bridge.
    """
    try:
        from cognateforge.bridge.nats import NatsBridge, connect
    except ModuleNotFoundError as error:
        if error.name != "nats":
            raise
        raise ClientSetupError("the bridge needs a NATS client: pip install 'cognateforge[nats]'") from error

    async def run() -> None:
        path = str(credentials) if credentials else None
        async with connect(url, credentials=path) as jetstream, session.async_cognate_client() as client:
            bridge = NatsBridge(jetstream, stream=stream, subject=subject, source=source)
            async for told in bridge.run(client):
                if session.as_json:
                    line = {"name": told.event.subject, "sequence": told.event.sequence}
                    session.emit({**line, "stream_sequence": told.stream_sequence, "duplicate": told.duplicate})
                else:
                    print_line(f"{told.event.subject} is message {told.stream_sequence} of {stream}")

    asyncio.run(run())
