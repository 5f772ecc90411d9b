"""Rows of PubMedQA's form: a research question, the abstract that it is asked of, and the decision.

Source: Jin et al. 2019, arXiv:1909.06146. The label is `final_decision`; `reasoning_required_pred` is an annotator's
first guess. Texts hold paragraph separators (U+2029) that are no ends of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.data.messages import texts
from training_common.rows import text_field

# The longest abstract has 398 words, in 8 parts.
MAX_CHARS = 32_768
_MAX_PARTS = 64


def is_pubmedqa(content: Mapping[str, object]) -> bool:
    """Whether a row has this form."""
    return "CONTEXTS" in content


def question(content: Mapping[str, object]) -> str:
    """Return the question. Errors: RowRefusedError."""
    return text_field(content, "QUESTION", max_chars=MAX_CHARS).strip()


def contexts(content: Mapping[str, object]) -> str:
    """Return the abstract without its conclusion, a part a line. Errors: RowRefusedError."""
    parts = texts(content.get("CONTEXTS"), "CONTEXTS", most=_MAX_PARTS, max_chars=MAX_CHARS)
    return "\n".join(part.strip() for part in parts)


def long_answer(content: Mapping[str, object]) -> str:
    """Return the abstract's conclusion. Errors: RowRefusedError."""
    return text_field(content, "LONG_ANSWER", max_chars=MAX_CHARS).strip()
