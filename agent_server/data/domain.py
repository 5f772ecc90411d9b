"""Rows of documents of a domain.

Forms: `text`; PubMedQA's, whose document is the abstract: its parts, then its conclusion.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.data import pubmedqa
from agent_server.data.examples import Segment, Written
from agent_server.data.pipeline import Form, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.attempt import Json
from training_common.findings import ProcessingReport
from training_common.rows import text_field

# Half of the longest row.
MAX_TEXT_CHARS = 1 << 19


class DomainForm(Form[Written, Written]):
    """One text for each document, all of it trained."""

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Written]:
        """Return a document. Errors: RowRefusedError."""
        split = split_of(content, found)
        if pubmedqa.is_pubmedqa(content) and "text" not in content:
            text = f"{pubmedqa.contexts(content)}\n{pubmedqa.long_answer(content)}"
        else:
            text = text_field(content, "text", max_chars=MAX_TEXT_CHARS).strip()
        return Sound(Written((Segment(text, trained=True),)), same_text(text), same_text(text), len(text), split)

    def make(self, splits: Splits[Written], report: ProcessingReport) -> Made[Written]:
        """Return the documents, and how long they are."""
        examples = {split: [row.content for row in rows] for split, rows in splits.items()}
        chars: Json = {split: sum(len(text.segments[0].text) for text in texts) for split, texts in examples.items()}
        return Made(examples=examples, facts={"characters": chars})
