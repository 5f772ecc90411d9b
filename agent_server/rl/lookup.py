"""Looks a plan's environment up in a process of its own: python -m agent_server.rl.lookup QUESTION

To know which environments a module has, it has to be imported, and it is a stranger's code: one that raises, hangs or
ends its process must not do that to the server. Names that need no such module are looked up at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence

from agent_server.architectures.refusal import guard_process, require_separate
from agent_server.asking import ask
from agent_server.rl.registry import require_environment
from cognateforge.exceptions import FieldViolation, InvalidFieldError

# Shorter than the 30 s that clients give a call by default: its answer names the module that hangs.
_PATIENCE_S = 20.0
_MAX_ANSWER_BYTES = 1 << 16
# Of what a module raised, so much is told.
_TOLD_CHARS = 300


def look_up(task: str, name: str, *, modules: tuple[str, ...], field: str, patience_s: float = _PATIENCE_S) -> None:
    """Refuse a name that this server has no environment for. May block for a little more than `patience_s`.

    task: reinforcement or multi_agent. modules: what the operator allows beside the registries.
    Errors: InvalidFieldError, which names `field`.
    """
    module = name.rpartition(":")[0]
    if task == "reinforcement" and module not in modules:
        require_environment(task, name, modules=modules, field=field)
        return
    if problem := _asked(task, name, modules, patience_s):
        raise InvalidFieldError(f"{field}: {problem}", violations=[FieldViolation(field=field, description=problem)])


@functools.lru_cache(maxsize=256)
def _known(task: str, name: str, modules: tuple[str, ...], patience_s: float) -> None:
    """Return for an environment that was found; a cache keeps that, and no refusal. Errors: _UnknownError."""
    question = json.dumps([task, name, modules])
    try:
        text, end = ask(__name__, question, patience_s=patience_s, most_bytes=_MAX_ANSWER_BYTES)
    except TimeoutError:
        raise _UnknownError(f"{name!r} took more than {patience_s:g} s to look up: its module hangs") from None
    try:
        problem = str(json.loads(text)["problem"])
    except (ValueError, KeyError, TypeError):
        problem = f"{name!r} ended the process that looked it up, by {end}: correct its module"
    if problem:
        raise _UnknownError("".join(c if c.isprintable() else " " for c in problem))


class _UnknownError(Exception):
    """What keeps an environment from being used, in words."""


def _asked(task: str, name: str, modules: tuple[str, ...], patience_s: float) -> str:
    try:
        _known(task, name, modules, patience_s)
    except _UnknownError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str]) -> int:
    """Answer on standard output, where nothing else is let through."""
    task, name, modules = json.loads(arguments[0])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what a module prints is no answer
        problem = ""
        try:
            guard_process()
            require_environment(task, name, modules=tuple(modules), field="")
            require_separate()
        except InvalidFieldError as error:
            problem = error.violations[0].description
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: it is the module's
            told = f"{type(error).__name__}: {error}"[:_TOLD_CHARS]
            problem = f"{name!r} cannot be looked up: {told}; correct its module"
        json.dump({"problem": problem}, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
