"""What a service's own code adds, where it is installed beside the client: found by entry points, loaded when asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cognateforge import parts
from cognateforge.diagnostics.checks import Check
from cognateforge.exceptions import ClientSetupError

GROUP = "cognateforge.services"


class ServerSide(Protocol):
    """A service as its own installation knows it."""

    def diagnose(self, file: Path | None) -> Iterator[Check]:
        """Look at what the settings name: store, folders, devices, certificates, discovery."""

    def evidence(self, file: Path | None, job: str) -> Evidence:
        """Return what of a job lies on this machine. Errors: ClientSetupError, for settings that cannot be used."""


class Evidence(Protocol):
    """What lies on a server's machine.

    settings: as the service reads them. secrets: texts that nobody may see. files: names and paths of logs.
    """

    @property
    def settings(self) -> dict[str, Any]:
        """The effective settings, secrets included."""

    @property
    def secrets(self) -> Sequence[str]:
        """What must be hidden."""

    @property
    def files(self) -> Sequence[tuple[str, Path]]:
        """Logs of the job's workers."""


def server_side(service: str) -> ServerSide:
    """Return a service's own part. Errors: ClientSetupError, where its code is not installed."""
    entries = parts.entry_points(GROUP)
    remedy = f"its code is not installed here: pip install 'cognateforge[{service}]', or leave its settings out"
    if service not in entries:
        raise ClientSetupError(f"{service}: {remedy}")
    try:
        found: ServerSide = entries[service].load()
    except ImportError as error:
        raise ClientSetupError(f"{service}: {remedy} ({error})") from error
    return found
