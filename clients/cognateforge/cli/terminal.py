"""The terminal: what texts of others' making may do to it, what can be drawn on it, and how it is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for the tab and the end of a line, ends of lines that are not ASCII's, halves of characters,
# and marks that show what follows in another order than it is written.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\N{ARABIC LETTER MARK}\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Whoever ends a display by one of these is left with a terminal that shows what is typed.
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


def printable(text: str) -> str:
    """Return a text with a mark in place of each such character."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def printable_json(line: str) -> str:
    """Return a line of JSON of the same meaning without such characters."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    return stream.isatty() and not is_dumb()


def is_dumb() -> bool:
    """Whether the terminal's cursor cannot be moved: what is drawn there would never be seen."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def console(*, stderr: bool = False, pipe_width: int | None = None) -> Console:
    """Return rich's console for stdout or stderr. A reader that has left is a BrokenPipeError, as of any print.

    pipe_width: columns where the stream is no terminal, and has none of its own.
    """
    from rich.console import Console

    class Own(Console):
        def on_broken_pipe(self) -> None:
            # Rich would end the process by 1, which says that the watched job failed.
            self.quiet = True
            if threading.current_thread() is threading.main_thread():
                raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    return Own(stderr=stderr, width=None if stream.isatty() else pipe_width)


@contextmanager
def restored(drawn_on: Console) -> Iterator[None]:
    """Put the terminal right before SIGTERM or SIGHUP ends the process that draws on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended_by = 0

    def end(signum: int, frame: Any) -> NoReturn:
        nonlocal ended_by
        ended_by = signum
        raise SystemExit(128 + signum)

    before = {number: signal.getsignal(number) for number in _ENDINGS}
    # What is ignored, as by nohup, stays so.
    for number in (number for number, handler in before.items() if handler is signal.SIG_DFL):
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ended_by:
            with contextlib.suppress(OSError):  # the terminal may be gone
                drawn_on.show_cursor(True)
                if drawn_on.is_alt_screen:  # the display was about to begin
                    drawn_on.set_alt_screen(False)
            os.kill(os.getpid(), ended_by)


def open_missing_streams() -> None:
    """Let what is printed where stdout or stderr is closed go nowhere, instead of into whatever is opened next."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
