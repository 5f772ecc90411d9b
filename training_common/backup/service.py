"""What backups and diagnostics have to know of a service.

Each service tells it through the entry points `cognateforge.services`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from cognateforge import parts
from cognateforge.exceptions import InvalidRequestError
from training_common.settings import ServiceSettings

if TYPE_CHECKING:
    from cognateforge.diagnostics.checks import Check
    from training_common.diagnosis import Evidence

GROUP = "cognateforge.services"


@dataclass(frozen=True, kw_only=True)
class StoredService:
    """A service with a store of its own.

    migrations: the folder of its Alembic environment.
    tables: the names of those that its newest revision has.
    after_restore: changes what the service's own tables tell and cannot be so any more.
    """

    name: str
    load_settings: Callable[[Path | None], ServiceSettings]
    migrations: Path
    tables: frozenset[str]
    after_restore: Callable[[sa.Connection], None] = lambda _connection: None

    def diagnose(self, file: Path | None) -> Iterator[Check]:
        """Look at what the service's settings name, for `forge doctor`."""
        from training_common.diagnosis import diagnose

        return diagnose(self, file)

    def evidence(self, file: Path | None, job: str) -> Evidence:
        """Return what of a job lies on this machine, for `forge debug-bundle`. Errors: ClientSetupError."""
        from training_common.diagnosis import evidence

        return evidence(self, file, job)


def entry_points() -> dict[str, EntryPoint]:
    """Return where services are found, by their names."""
    return parts.entry_points(GROUP)


def find_service(name: str) -> StoredService:
    """Return a service by its name. Errors: InvalidRequestError, naming those that there are."""
    found = entry_points()
    if name not in found:
        raise InvalidRequestError(f"--service {name}: there is no such service; name one of {', '.join(sorted(found))}")
    service: StoredService = found[name].load()
    return service
