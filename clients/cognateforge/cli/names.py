"""Names on the command line: what can be none is told in words, before a server answers with its pattern."""

from __future__ import annotations

import re
import uuid

import typer


def full_job_name(name: str) -> str:
    """Return a job's full name. Errors: BadParameter, for what can be no job's."""
    try:
        number = uuid.UUID(name.removeprefix("jobs/"))
    except ValueError:
        raise typer.BadParameter(
            f"{name!r} is no job's name: give jobs/UUID or the UUID, as forge jobs lists them", param_hint="NAME"
        ) from None
    return f"jobs/{number}"


def check_artifact_name(name: str) -> str:
    """Return a model's or an agent's name, or that of a family. Errors: BadParameter, for what can be none."""
    if name and not re.fullmatch(r"[a-z][a-z0-9-]*(@[a-z0-9][a-z0-9-]*)?", name):
        raise typer.BadParameter(
            f"{name!r} is no name: a small letter, then small letters, digits and dashes; @ and a version or an alias "
            "may follow, as in cognate-25m@7"
        )
    return name
