"""Stores of both services for tests of backups: settings, rows of every kind in every table, and what they hold."""

from __future__ import annotations

import base64
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import agent_server.stored
import agent_server.tables
import cognate_server.stored
import cognate_server.tables
from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from training_common.artifacts.open import open_registry
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.backup.service import StoredService
from training_common.settings import ServiceSettings
from training_common.store import tables as common
from training_common.store.database import Database

SERVICES = {"cognate": cognate_server.stored.SERVICE, "agent": agent_server.stored.SERVICE}
_TABLES = {
    "cognate": [*common.metadata.sorted_tables, *cognate_server.tables.metadata.sorted_tables],
    "agent": [*common.metadata.sorted_tables, *agent_server.tables.metadata.sorted_tables],
}
# The first key of what `fill` writes.
FIRST = 100
_TEXTS = ["", "plain", "ä漢😀", "two\nlines\u2028and\x85more", "quote ' \" \\ ,", "Zz", "zZ", "a\tb", "null"]
_FLOATS = [0.0, -0.0, 1 / 3, 1e308, 5e-324, math.inf, -math.inf, -1.5]
_INTEGERS = [0, 1, -1, 2**31 - 1, -(2**31)]
_LARGE = [*_INTEGERS, 2**63 - 1, -(2**63), 2**53 + 1]
_DOCUMENTS: list[Any] = [None, {}, [], {"a": [1, 2.5, None, "ä😀"], "b": {"c": False}}, "text", 2**60, 0.1, True]


def settings_of(service: str, folder: Path, store_url: str = "", **more: Any) -> ServiceSettings:
    """Return settings of a service with everything below a folder."""
    values = {"data_dir": folder, "store_url": store_url, **more}
    return CognateSettings.model_validate(values) if service == "cognate" else AgentSettings.model_validate(values)


def service_of(service: str) -> StoredService:
    return SERVICES[service]


@contextmanager
def opened(settings: ServiceSettings) -> Iterator[ArtifactRegistry]:
    """Yield the artifacts of a service over its database, which is brought to its newest revision."""
    service = "cognate" if isinstance(settings, CognateSettings) else "agent"
    database = Database(settings.database_url)
    try:
        database.upgrade(SERVICES[service].migrations)
        yield open_registry(settings, database)
    finally:
        database.close()


def publish(registry: ArtifactRegistry, folder: Path, content: bytes, *, family: str = "cognate-25m") -> ArtifactRow:
    """Publish a version of two files, one of which all versions share."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_bytes(content)
    (folder / "shared").write_bytes(b"the same in every version")
    files = [registry.blobs.put(folder / name, name) for name in ("weights", "shared")]
    with registry.database.write() as connection:
        return registry.publish(connection, family=family, state="READY", job="jobs/x", files=files, body={})


def fill(service: str, connection: sa.Connection, *, seed: int, rows: int = 12) -> None:
    """Write rows of made-up values into every table: NULL and odd values wherever a column allows them.

    Their keys are beyond those of what was written before.
    """
    generator = random.Random(seed)  # noqa: S311
    given: dict[str, list[int]] = {}
    for table in _TABLES[service]:
        made = [_row(table, number, given, generator) for number in range(FIRST, FIRST + rows)]
        connection.execute(sa.insert(table), made)
        given[table.name] = [row["id"] for row in made if "id" in row]


def _row(table: sa.Table, number: int, given: dict[str, list[int]], generator: random.Random) -> dict[str, Any]:
    row = {column.name: _value(column, number, given, generator) for column in table.columns}
    # What a restore settles is another test's matter: these rows stay as they are.
    settled: dict[str, dict[str, Any]] = {
        "jobs": {"state": "SUCCEEDED"},
        "checkpoints": {"available": False},
        "artifacts": {"collect_us": 1 + number, "tier": "STANDARD"},
        "descents": {"told": False},
    }
    return {**row, **settled.get(table.name, {})}


def _value(column: sa.Column[Any], number: int, given: dict[str, list[int]], generator: random.Random) -> Any:
    if column.foreign_keys:
        [key] = column.foreign_keys
        parents = given[key.column.table.name]
        unique = column.primary_key or any(
            column.name in index.columns for index in column.table.constraints if isinstance(index, sa.UniqueConstraint)
        )
        return parents[number - FIRST] if unique else generator.choice(parents)
    unique = column.primary_key or column.unique or _in_unique(column)
    if column.nullable and generator.random() < 0.4:
        return sa.null() if isinstance(column.type, sa.JSON) else None
    kind = column.type
    if isinstance(kind, sa.JSON):
        return generator.choice(_DOCUMENTS)
    if isinstance(kind, sa.Boolean):
        return generator.random() < 0.5
    if isinstance(kind, sa.LargeBinary):
        return generator.randbytes(generator.choice([0, 1, 300]))
    if isinstance(kind, sa.Float):
        return generator.choice(_FLOATS)
    if isinstance(kind, sa.Integer):
        large = isinstance(kind, sa.BigInteger) and not column.primary_key
        return number if unique else generator.choice(_LARGE if large else _INTEGERS)
    text = generator.choice(_TEXTS)
    return (f"{number}{text}" if unique else text)[: getattr(kind, "length", None) or 200]


def _in_unique(column: sa.Column[Any]) -> bool:
    constraints = column.table.constraints
    return any(isinstance(one, sa.UniqueConstraint) and column.name in one.columns for one in constraints)


def contents(service: str, url: str) -> dict[str, list[list[str]]]:
    """Return every row of every table, each value as text that tells NULL, JSON's null and types apart."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    found = {}
    with engine.connect() as connection:
        for table in _TABLES[service]:
            columns = [sa.cast(c, sa.Text) if isinstance(c.type, sa.JSON) else c for c in table.columns]
            rows = [[_shown(value) for value in row] for row in connection.execute(sa.select(*columns))]
            found[table.name] = sorted(rows)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return repr(value + 0.0 if isinstance(value, float) else value)
