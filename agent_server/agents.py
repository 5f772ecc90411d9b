"""Published agents: look-up by version or alias, and aliases that move."""

from __future__ import annotations

import sqlalchemy as sa

from agent_server import tables as t
from cognateforge.exceptions import AgentNotFoundError, TooManyAliasesError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.store.database import now_us

# What the contract lets one agent carry.
MAX_ALIASES = 64


def find_agent(registry: ArtifactRegistry, name: str) -> ArtifactRow:
    """Return the agent of "family@version", "family@alias" or a family's newest. Errors: AgentNotFoundError."""
    family, _, version = name.partition("@")
    if version and not version.isdigit():
        with registry.database.read() as connection:
            query = sa.select(t.aliases.c.version).filter_by(family=family, alias=version)
            number = connection.execute(query).scalar()
        if number is None:
            raise AgentNotFoundError(f"no alias {name}; get the agent to see which aliases point at it")
    else:
        number = int(version) if version else None
    row = registry.find(family, number)
    if row is None:
        raise AgentNotFoundError(f"no agent {name} is published; list the agents to see what there is")
    return row


def aliases_of(registry: ArtifactRegistry, rows: list[ArtifactRow]) -> dict[str, list[str]]:
    """Return the aliases that point at each of the rows, by the row's name, sorted."""
    found: dict[str, list[str]] = {row.name: [] for row in rows}
    query = sa.select(t.aliases).where(t.aliases.c.family.in_({row.family for row in rows})).order_by(t.aliases.c.alias)
    with registry.database.read() as connection:
        for alias in connection.execute(query).mappings():
            found.get(f"{alias['family']}@{alias['version']}", []).append(alias["alias"])
    return found


def set_alias(connection: sa.Connection, row: ArtifactRow, alias: str, *, caller: str, request_id: str) -> list[str]:
    """Point an alias at a version and keep the move, in the caller's transaction; return the version's aliases.

    Errors: TooManyAliasesError, when the version has as many as the contract allows.
    """
    key = {"family": row.family, "alias": alias}
    before = connection.execute(sa.select(t.aliases.c.version).filter_by(**key)).scalar()
    if before is None:
        connection.execute(sa.insert(t.aliases).values(**key, version=row.version))
    else:
        connection.execute(sa.update(t.aliases).filter_by(**key).values(version=row.version))
    connection.execute(
        sa.insert(t.alias_moves).values(
            **key,
            from_version=before,
            to_version=row.version,
            caller=caller,
            request_id=request_id,
            time_us=now_us(),
        )
    )
    query = sa.select(t.aliases.c.alias).filter_by(family=row.family, version=row.version).order_by(t.aliases.c.alias)
    aliases = list(connection.execute(query).scalars())
    if len(aliases) > MAX_ALIASES:
        raise TooManyAliasesError(f"{row.name} has {MAX_ALIASES} aliases already: move one of them elsewhere first")
    return aliases
