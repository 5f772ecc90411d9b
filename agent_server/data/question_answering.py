"""Rows of questions with their answers, and a context where a row has one.

    Context: <context>
    Question: <question>
    Answer: <answer>

`answer` is a text, or a list of texts that are all accepted, the first of which is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.data.examples import Segment, Written
from agent_server.data.messages import texts
from agent_server.data.pipeline import Form, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.findings import ProcessingReport
from training_common.rows import checked_text, text_field

MAX_CONTEXT_CHARS = 1 << 18
MAX_TEXT_CHARS = 65_536
_MAX_ANSWERS = 256


class QuestionAnsweringForm(Form[Written, Written]):
    """One text for each question."""

    contradiction = "contradicting_answer"

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Written]:
        """Return a question with its answers. Errors: RowRefusedError."""
        split = split_of(content, found)
        question = text_field(content, "question", max_chars=MAX_TEXT_CHARS).strip()
        answers = _answers(content)
        context = content.get("context")
        context = "" if context is None else checked_text(context, "context", max_chars=MAX_CONTEXT_CHARS).strip()
        before = f"Context: {context}\n" if context else ""
        prompt = f"{before}Question: {question}\nAnswer:"
        text = Written((Segment(prompt), Segment(f" {answers[0]}", trained=True)), accepted=list(answers))
        key = f"{same_text(question)}\n{same_text(context)}" if context else same_text(question)
        size = len(prompt) + sum(map(len, answers))
        return Sound(text, key, same_text(question), size, split, "\n".join(sorted(map(same_text, answers))))

    def make(self, splits: Splits[Written], report: ProcessingReport) -> Made[Written]:
        """Return the questions."""
        return Made(examples={split: [row.content for row in rows] for split, rows in splits.items()})


def _answers(content: Mapping[str, object]) -> list[str]:
    if isinstance(content.get("answer"), list):
        answers = texts(content["answer"], "answer", most=_MAX_ANSWERS, max_chars=MAX_TEXT_CHARS)
    else:
        answers = [text_field(content, "answer", max_chars=MAX_TEXT_CHARS)]
    return [answer.strip() for answer in answers]
