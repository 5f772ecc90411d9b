"""Conversations: how rows write them, and the one plain form that models read them in.

    User: <text>
    Agent: <text>
    User: <text>
    Agent:

Every turn begins a line with who speaks. What the agent learns to say comes after "Agent:", with a space in front.
Training and evaluation use this same form; docs/data.md shows it for every task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from agent_server.data.examples import Segment
from training_common.findings import RowRefusedError, quote
from training_common.rows import checked_text

AGENT = "Agent"
# By the role, or the speaker, that a row names.
_SPEAKERS = {"system": "System", "user": "User", "assistant": AGENT, "tool": "Tool"}
# The longest real trajectory has 25 turns, of 1,215 words in all.
MAX_TURNS = 1_024
MAX_TURN_CHARS = 65_536


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says. speaker: as it is written before the text."""

    speaker: str
    text: str

    @property
    def by_agent(self) -> bool:
        """Whether it is the agent's."""
        return self.speaker == AGENT


def messages(content: Mapping[str, object], field: str = "messages") -> list[Turn]:
    """Return the turns of a row with messages of role and content. Nobody has to speak in turn.

    Errors: RowRefusedError.
    """
    value = content.get(field)
    if field not in content:
        raise RowRefusedError(
            "missing_field",
            field=field,
            detail="the field is missing",
            remedy="write the conversation as a list of messages with role and content",
        )
    return [
        Turn(_speaker(message, place), _text(message.get("content"), f"{place}.content"))
        for place, message in objects(value, field, most=MAX_TURNS)
    ]


def objects(value: object, field: str, *, most: int, empty: bool = False) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the objects of a list with their places. Errors: RowRefusedError for anything else."""
    if value is None:
        raise RowRefusedError(
            "missing_field",
            field=field,
            detail="the field is missing, or null",
            remedy="add it as a list of objects" + (", an empty one where there are none" if empty else ""),
        )
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowRefusedError(
            "wrong_type",
            field=field,
            detail=f"expected a list of objects, got {quote(value)}",
            remedy="write it as one",
        )
    if not value and not empty:
        raise RowRefusedError("blank", field=field, detail="the list is empty", remedy="fill it in or remove the row")
    if len(value) > most:
        raise RowRefusedError(
            "too_long", field=field, detail=f"{len(value)} entries, at most {most} are read", remedy="split the row"
        )
    return ((f"{field}[{number}]", item) for number, item in enumerate(value))


def texts(value: object, field: str, *, most: int, max_chars: int) -> list[str]:
    """Return a list of texts, none of them blank. Errors: RowRefusedError."""
    if not isinstance(value, list) or not value:
        raise RowRefusedError(
            "wrong_type", field=field, detail=f"expected a list of texts, got {quote(value)}", remedy="write it as one"
        )
    if len(value) > most:
        raise RowRefusedError(
            "too_long", field=field, detail=f"{len(value)} entries, at most {most} are read", remedy="split the row"
        )
    return [checked_text(item, f"{field}[{number}]", max_chars=max_chars) for number, item in enumerate(value)]


def _speaker(message: Mapping[str, object], place: str) -> str:
    role = message.get("role")
    if isinstance(role, str) and role in _SPEAKERS:
        return _SPEAKERS[role]
    raise RowRefusedError(
        "unknown_value",
        field=f"{place}.role",
        detail=f"{quote(role)} is no role",
        remedy=f"write one of {', '.join(_SPEAKERS)}",
    )


def _text(value: object, place: str) -> str:
    return checked_text(value, place, max_chars=MAX_TURN_CHARS).strip()


def written(turns: Sequence[Turn]) -> str:
    """Return turns as they are read, each with its line break."""
    return "".join(f"{turn.speaker}: {turn.text}\n" for turn in turns)


def prompt(turns: Sequence[Turn], *, before: str = "") -> str:
    """Return what an answer of the agent follows. before: what stands above the conversation, in whole lines."""
    return f"{before}{written(turns)}{AGENT}:"


def answered(before: str, answer: str) -> tuple[Segment, Segment]:
    """Return a prompt and the answer that is trained."""
    return Segment(before), Segment(f" {answer}", trained=True)


def segments(turns: Sequence[Turn]) -> tuple[Segment, ...]:
    """Return a whole conversation, of which the agent's turns are trained. The line break after one is not its own."""
    parts: list[Segment] = []
    before = ""
    for turn in turns:
        if turn.by_agent:
            parts += answered(f"{before}{AGENT}:", turn.text)
            before = "\n"
        else:
            before += written([turn])
    return (*parts, Segment(before)) if before.strip() else tuple(parts)
