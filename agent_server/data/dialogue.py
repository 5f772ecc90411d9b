"""Rows of dialogues, of which the agent's turns are learnt.

Forms: `messages` of `role` and `content`, whose agent is the assistant; the Schema-Guided Dialogue's, whose agent is
SYSTEM. Nobody has to speak in turn, and anyone may have the last word.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.data import sgd
from agent_server.data.examples import Written
from agent_server.data.messages import messages, segments, written
from agent_server.data.pipeline import Form, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.attempt import Json
from training_common.findings import ProcessingReport, RowRefusedError


class DialogueForm(Form[Written, Written]):
    """One text for each dialogue."""

    companions = sgd.COMPANIONS

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Written]:
        """Return a dialogue. Errors: RowRefusedError."""
        split = split_of(content, found)
        if sgd.is_dialogue(content):
            turns = [utterance.turn for utterance in sgd.utterances(content)]
            group = sgd.identity(content, found)
        else:
            turns = messages(content)
            group = ""
        if not any(turn.by_agent for turn in turns):
            raise RowRefusedError(
                "no_agent_turn",
                field="turns" if group else "messages",
                detail="the agent says nothing",
                remedy="add its turns, or remove the row",
            )
        text = written(turns)
        return Sound(Written(segments(turns)), same_text(text), group or same_text(text), len(text), split)

    def make(self, splits: Splits[Written], report: ProcessingReport) -> Made[Written]:
        """Return the dialogues, and how often the agent speaks in them."""
        examples = {split: [row.content for row in rows] for split, rows in splits.items()}
        turns: Json = {
            split: sum(segment.trained for dialogue in dialogues for segment in dialogue.segments)
            for split, dialogues in examples.items()
        }
        return Made(examples=examples, facts={"agent_turns": turns})
