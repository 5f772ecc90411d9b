"""Names on the command line: what can be none is told in words, before a server answers with its pattern."""

from __future__ import annotations

import re
import uuid

import typer


def full_job_name(name: str) -> str:
    """Return a job's full name. Errors: BadParameter, for what can be no job's."""
    return _full_name(name, "job", "jobs", "forge jobs lists", "NAME")


def full_reservation_name(name: str, option: str = "NAME") -> str:
    """Return a reservation's full name. Errors: BadParameter, for what can be no reservation's."""
    return _full_name(name, "reservation", "reservations", "forge reservations list shows", option)


def _full_name(name: str, what: str, collection: str, listed: str, option: str) -> str:
    try:
        number = uuid.UUID(name.removeprefix(f"{collection}/"))
    except ValueError:
        raise typer.BadParameter(
            f"{name!r} is no {what}'s name: give {collection}/UUID or the UUID, as {listed} them", param_hint=option
        ) from None
    return f"{collection}/{number}"


def check_artifact_name(name: str) -> str:
    """Return a model's or an agent's name, or that of a family. Errors: BadParameter, for what can be none."""
    if name and not re.fullmatch(r"[a-z][a-z0-9-]*(@[a-z0-9][a-z0-9-]*)?", name):
        raise typer.BadParameter(
            f"{name!r} is no name: a small letter, then small letters, digits and dashes; @ and a version or an alias "
            "may follow, as in cognate-25m@7"
        )
    return name


def check_version_name(name: str) -> str:
    """Return the name of one version. Errors: BadParameter, for a family, an alias, and what can be no name."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*@[1-9][0-9]*", name):
        raise typer.BadParameter(f"{name!r} is no version: give its family and number, as in cognate-25m@7")
    return name
