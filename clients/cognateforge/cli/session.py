"""What every command shares: where the services are, how results leave, how errors end."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from cognateforge.cli.exits import Exit, exit_for
from cognateforge.cli.terminal import console, printable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from cognateforge.client import (
        AgentClient,
        AsyncAgentClient,
        AsyncCognateClient,
        CallBreaker,
        CognateClient,
        TlsFiles,
    )
    from cognateforge.exceptions import ForgeError

    # What a list's row is made of: its message, fields beside it, and the cells for people.
    Row = tuple[Message, Mapping[str, Any], Sequence[object]]

T = TypeVar("T")

# What a full or broken disk answers to whatever is printed into a file on it.
_UNWRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

COMMON: Mapping[str, tuple[Any, Any]] = {
    "cognate": (
        Annotated[
            str,
            typer.Option(
                "--cognate",
                envvar="FORGE_COGNATE",
                help="Cognate service: host:port, unix:PATH or consul://SERVICE.",
            ),
        ],
        "127.0.0.1:7101",
    ),
    "agent_server": (
        Annotated[
            str,
            typer.Option("--agent-server", envvar="FORGE_AGENT", help="Agent service, in the same forms."),
        ],
        "127.0.0.1:7102",
    ),
    "ca": (
        Annotated[
            Path | None,
            typer.Option("--tls-ca", envvar="FORGE_TLS_CA", help="PEM of who signs servers."),
        ],
        None,
    ),
    "cert": (
        Annotated[
            Path | None,
            typer.Option("--tls-cert", envvar="FORGE_TLS_CERT", help="PEM of your certificate."),
        ],
        None,
    ),
    "key": (
        Annotated[
            Path | None,
            typer.Option("--tls-key", envvar="FORGE_TLS_KEY", help="PEM of its key."),
        ],
        None,
    ),
    "timeout_s": (
        Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for each call.")],
        10.0,
    ),
    "as_json": (
        Annotated[bool, typer.Option("--json", help="Results as JSON, one object a line; errors too.")],
        False,
    ),
}


@dataclass
class Session:
    """One run of a command."""

    cognate: str
    agent_server: str
    ca: Path | None
    cert: Path | None
    key: Path | None
    timeout_s: float
    as_json: bool
    _open: ExitStack = field(default_factory=ExitStack)

    @functools.cached_property
    def cognate_client(self) -> CognateClient:
        """The Cognate service, dialled when first used."""
        from cognateforge.client import CognateClient

        return self._open.enter_context(CognateClient(self.cognate, tls=self._tls, timeout_s=self.timeout_s))

    def async_cognate_client(self, breaker: CallBreaker | None = None) -> AsyncCognateClient:
        """Return a client of the Cognate service for an event loop that the caller runs: open and close it there."""
        from cognateforge.client import AsyncCognateClient

        return AsyncCognateClient(self.cognate, tls=self._tls, timeout_s=self.timeout_s, breaker=breaker)

    def async_agent_client(self, breaker: CallBreaker | None = None) -> AsyncAgentClient:
        """Return the same of the agent service."""
        from cognateforge.client import AsyncAgentClient

        return AsyncAgentClient(self.agent_server, tls=self._tls, timeout_s=self.timeout_s, breaker=breaker)

    @functools.cached_property
    def agent_client(self) -> AgentClient:
        """The agent service, dialled when first used."""
        from cognateforge.client import AgentClient

        return self._open.enter_context(AgentClient(self.agent_server, tls=self._tls, timeout_s=self.timeout_s))

    @property
    def _tls(self) -> TlsFiles | None:
        from cognateforge.client import TlsFiles

        if self.ca is None and self.cert is None and self.key is None:
            return None
        return TlsFiles(ca=self.ca, cert=self.cert, key=self.key)

    def emit(self, value: Message | dict[str, Any]) -> None:
        """Print one result as a line of JSON."""
        from cognateforge.cli.plain import to_line

        print_line(to_line(value))

    def show(self, value: Message, **extra: Any) -> None:
        """Print one result: a line of JSON, or its fields one below the other."""
        from cognateforge.cli.plain import to_plain

        plain = {**extra, **to_plain(value)}
        if self.as_json:
            self.emit(plain)
        else:
            for line in _indented(plain):
                print_line(line)

    def table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Print a list: each row's message and extra fields as a line of JSON, or its cells in a table."""
        from cognateforge.cli.plain import to_plain

        if self.as_json:
            for message, extra, _ in rows:
                self.emit({**extra, **to_plain(message)})
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, pad_edge=False)
        for _, _, cells in rows:
            # As a Text: what is in brackets would be taken for markup.
            table.add_row(*(Text(printable(str(cell))) for cell in cells))
        # A pipe has no width: nothing is cut there.
        console(pipe_width=400).print(table)

    def report(self, error: ForgeError, **beside: Any) -> Exit:
        """Tell an error and what is known about it on stderr, and return its exit code."""
        from cognateforge.cli import errors

        for line in [errors.to_json(error, **beside)] if self.as_json else errors.lines(error):
            say(line)
        return exit_for(error)

    def close(self) -> None:
        """End every call."""
        self._open.close()


def _indented(value: Mapping[str, Any], depth: int = 0) -> list[str]:
    lines: list[str] = []
    pad = "  " * depth
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{pad}{key}:", *_indented(item, depth + 1)]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines.append(f"{pad}{key}:")
            for entry in item:
                lines.append(f"{pad}  - " + ", ".join(f"{k} {v}" for k, v in entry.items() if v not in ("", None, [])))
        elif item not in ("", []):
            lines.append(f"{pad}{key}: {', '.join(map(str, item)) if isinstance(item, list) else item}")
    return lines


def print_line(text: str, *, newline: bool = True) -> None:
    """Print a result to stdout, at once: a reader of a pipe follows a watched job."""
    typer.echo(printable(text), nl=newline)


def say(text: str) -> None:
    """Tell a person something, on stderr."""
    typer.echo(printable(text), err=True)


def new_request_id(given: str | None) -> str:
    """Return the request id that was given, or a new one."""
    return given or str(uuid.uuid4())


def first_found(tries: Sequence[Callable[[], T]]) -> T:
    """Return the first answer. What the others lack, or cannot tell, is an error only when nobody answers."""
    from cognateforge.exceptions import ForbiddenError, NotFoundError, UnavailableError

    errors: list[ForgeError] = []
    for attempt in tries:
        try:
            return attempt()
        except (NotFoundError, UnavailableError, ForbiddenError) as error:
            errors.append(error)
    # "Not found" is certain only when every service could tell.
    unsure = next((error for error in errors if not isinstance(error, NotFoundError)), None)
    missing = [error for error in errors if isinstance(error, NotFoundError)]
    if unsure is None:
        missing[0].message = "; ".join(dict.fromkeys(error.message for error in missing))
        raise missing[0]
    if missing:
        unsure.message = f"{missing[0].message}; and the other service cannot tell: {unsure.message}"
    raise unsure


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., Exit | None]], Callable[..., None]]:
    """Make a command of a function that takes a Session first. Every command gets the common options."""

    def register(function: Callable[..., Exit | None]) -> Callable[..., None]:
        registered: Callable[..., None] = app.command(name)(_with_common(function))
        return registered

    return register


def group(app: typer.Typer, function: Callable[..., Exit | None]) -> typer.Typer:
    """Make a command of a function, as `command` does, that has commands below it, and return the group for those.

    The function runs where none of them is named. Options before the name of one would be lost, so they are refused.
    """
    below = typer.Typer(invoke_without_command=True)
    plain = _with_common(function)

    def run(context: typer.Context, **values: Any) -> None:
        if context.invoked_subcommand is None:
            plain(**values)
            return
        for option in context.command.params:
            source = context.get_parameter_source(option.name or "")
            if source is not None and source.name == "COMMANDLINE":
                place = f"{context.command_path} {context.invoked_subcommand}"
                raise typer.BadParameter(f"options belong behind {place!r}", param_hint=option.opts[0])

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    own = inspect.signature(plain)
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__annotations__ = {"context": typer.Context, **plain.__annotations__}
    run.__signature__ = own.replace(parameters=[context, *own.parameters.values()])  # type: ignore[attr-defined]
    below.callback()(run)
    app.add_typer(below, name=function.__name__)
    return below


def _with_common(function: Callable[..., Exit | None]) -> Callable[..., None]:
    """Return the function with the common options in place of its Session."""
    own = list(inspect.signature(function).parameters.values())[1:]
    hints = get_type_hints(function, include_extras=True)
    hints.pop(next(iter(inspect.signature(function).parameters)))

    def run(**values: Any) -> None:
        session = Session(**{key: values.pop(key) for key in COMMON})
        raise typer.Exit(_run(function, session, values))

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {**hints, **{key: kind for key, (kind, _) in COMMON.items()}, "return": None}
    parameters = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
    parameters += [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for key, (kind, default) in COMMON.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _print_no_more() -> None:
    """Let what stdout still holds go nowhere: the end of the process would fail at it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(function: Callable[..., Exit | None], session: Session, values: dict[str, Any]) -> int:
    from cognateforge.exceptions import ForgeError, LocalStorageError

    try:
        return int(function(session, **values) or Exit.OK)
    except ForgeError as error:
        return int(session.report(error))
    except KeyboardInterrupt:
        say("interrupted")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left
        _print_no_more()
        return int(Exit.OK)
    except OSError as error:
        if error.errno not in _UNWRITTEN:
            raise
        _print_no_more()
        with contextlib.suppress(OSError):  # stderr may be what cannot be written
            session.report(LocalStorageError(f"what was to be written could not be: {error.strerror}"))
        return int(Exit.LOCAL)
    finally:
        session.close()
