"""Rows of a prompt and two answers, the first of which is preferred: `prompt`, `chosen`, `rejected`."""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.data.examples import Preferred
from agent_server.data.messages import Turn, prompt
from agent_server.data.pipeline import Form, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.findings import ProcessingReport, RowRefusedError
from training_common.rows import text_field

MAX_TEXT_CHARS = 1 << 18


class PreferenceForm(Form[Preferred, Preferred]):
    """One pair for each row."""

    contradiction = "contradicting_preference"

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Preferred]:
        """Return a pair. Errors: RowRefusedError."""
        split = split_of(content, found)
        asked, chosen, rejected = (
            text_field(content, name, max_chars=MAX_TEXT_CHARS).strip() for name in ("prompt", "chosen", "rejected")
        )
        if chosen == rejected:
            raise RowRefusedError(
                "equal_pair",
                field="rejected",
                detail="both answers are the same",
                remedy="remove the row: it says nothing of what is preferred",
            )
        pair = Preferred(prompt([Turn("User", asked)]), f" {chosen}", f" {rejected}")
        # Case and punctuation may be all that two answers differ by, so that they are compared as they are.
        key = "\n".join((same_text(asked), *sorted((chosen, rejected))))
        return Sound(pair, key, same_text(asked), len(asked) + len(chosen) + len(rejected), split, chosen)

    def make(self, splits: Splits[Preferred], report: ProcessingReport) -> Made[Preferred]:
        """Return the pairs."""
        return Made(examples={split: [row.content for row in rows] for split, rows in splits.items()})
