"""What an agent does in a turn: `Thought: ...` and, on a line of its own, `Action: search[query]`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_PREFIX = r"Action(?:[ \t]+\d+)?[ \t]*:[ \t]*"
_ACTION = r"(?P<kind>[A-Za-z_][\w-]*)[ \t]*\[(?P<argument>.*)\][ \t]*"
_MARKED = re.compile(rf"^[ \t]*{_PREFIX}{_ACTION}$", re.MULTILINE)
_BARE = re.compile(rf"\s*{_ACTION}\s*")
_BEGIN = re.compile(rf"^[ \t]*{_PREFIX}", re.MULTILINE)


@dataclass(frozen=True)
class Action:
    """An action: what kind, and on what. Both without outer space, the argument with single spaces inside."""

    kind: str
    argument: str


def parse_action(text: str) -> Action | None:
    """Return the first action of a turn, or an action that stands alone; None where there is none.

    Form: Yao et al. 2022, arXiv:2210.03629 (ReAct), also with a number: `Action 2: finish[Paris]`.
    """
    found = _MARKED.search(text) or _BARE.fullmatch(text)
    if found is None:
        return None
    return Action(found["kind"], " ".join(found["argument"].split()))


def before_action(text: str) -> str | None:
    """Return a turn up to where the kind of its first action begins; None where no action begins."""
    found = _BEGIN.search(text)
    return None if found is None else text[: found.end()]


def same_kind(written: str, demonstrated: str) -> bool:
    """Return whether both turns act, and with an action of the same kind."""
    own, other = parse_action(written), parse_action(demonstrated)
    return own is not None and other is not None and own.kind == other.kind


def same_action(written: str, demonstrated: str) -> bool:
    """Return whether both turns act, and with the same kind and argument, letter for letter but for spaces."""
    own, other = parse_action(written), parse_action(demonstrated)
    return own is not None and own == other


def violates(written: str, allowed: Collection[str]) -> bool:
    """Return whether a turn breaks the constraint: its action is of no allowed kind, or none can be read."""
    action = parse_action(written)
    return action is None or action.kind not in allowed
