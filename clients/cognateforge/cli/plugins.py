"""Commands that other parts of this project bring, found by their entry points `cognateforge.commands`.

The client library knows none of them, and imports one when its command is run or its help is shown. Only entry points
of our own distributions count: to look through all that is installed would take longer than most commands.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import typer
from typer.core import TyperGroup

from cognateforge import parts

GROUP = "cognateforge.commands"


def entry_points() -> dict[str, EntryPoint]:
    """Return the entry points by the names of their commands."""
    return parts.entry_points(GROUP)


class ExtensibleGroup(TyperGroup):
    """A group whose own commands come first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in entry_points() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = entry_points().get(cmd_name)
        return None if entry is None else _commands(entry.load())[cmd_name]


def _commands(register: Callable[[typer.Typer], None]) -> dict[str, Any]:
    """Return the commands that a function adds to an application."""
    app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
    register(app)
    return dict(typer.main.get_group(app).commands)
