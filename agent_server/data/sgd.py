"""Rows of the Schema-Guided Dialogue's form: a dialogue of turns, with the spans that fill slots.

Source: Rastogi et al. 2019, arXiv:1909.05855. The files come in folders of a split each, and the same `dialogue_id`
means another dialogue in another split: dialogues are told apart by split and id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent_server.data.examples import Span
from agent_server.data.messages import AGENT, MAX_TURN_CHARS, MAX_TURNS, Turn, objects
from agent_server.data.source import SourceRow
from agent_server.data.spans import RawSpan, checked_spans
from training_common.findings import RowRefusedError, quote
from training_common.rows import checked_text, text_field

# The services' schemas stand beside the dialogues.
COMPANIONS = ("schema.json", "schema_*.json")
_SPEAKERS = {"USER": "User", "SYSTEM": AGENT}
_MAX_FRAMES = 64
_MAX_SLOTS = 1_024
_MAX_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn, as it stands in the row, with the spans of all its services."""

    turn: Turn
    spans: tuple[Span, ...]


def is_dialogue(content: Mapping[str, object]) -> bool:
    """Whether a row has this form."""
    return "turns" in content


def identity(content: Mapping[str, object], found: SourceRow) -> str:
    """Return what tells a dialogue from all others. Errors: RowRefusedError."""
    name = text_field(content, "dialogue_id", max_chars=_MAX_ID_CHARS)
    split = content.get("split")
    return "\n".join((str(split) if isinstance(split, str) else "", found.split or found.row.file, name))


def utterances(content: Mapping[str, object]) -> list[Utterance]:
    """Return the turns of a dialogue. Errors: RowRefusedError."""
    return [_utterance(place, turn) for place, turn in objects(content.get("turns"), "turns", most=MAX_TURNS)]


def _utterance(place: str, turn: Mapping[str, object]) -> Utterance:
    speaker = turn.get("speaker")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise RowRefusedError(
            "unknown_value",
            field=f"{place}.speaker",
            detail=f"{quote(speaker)} is no speaker",
            remedy=f"write one of {', '.join(_SPEAKERS)}",
        )
    text = checked_text(turn.get("utterance"), f"{place}.utterance", max_chars=MAX_TURN_CHARS)
    raw = [
        RawSpan(slot_place, slot.get("start"), slot.get("exclusive_end"), slot.get("slot"))
        for frame_place, frame in objects(turn.get("frames", []), f"{place}.frames", most=_MAX_FRAMES, empty=True)
        for slot_place, slot in objects(frame.get("slots", []), f"{frame_place}.slots", most=_MAX_SLOTS, empty=True)
    ]
    return Utterance(Turn(_SPEAKERS[speaker], text), checked_spans(text, raw, end="exclusive_end", label="slot"))
