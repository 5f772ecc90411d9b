"""Texts of others' making on their way to a terminal, which would obey some of their characters."""

from __future__ import annotations

import re

# Control characters but for the tab and the end of a line, ends of lines that are not ASCII's, halves of characters,
# and marks that show what follows in another order than it is written.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\N{ARABIC LETTER MARK}\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return a text with a mark in place of each such character."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def printable_json(line: str) -> str:
    """Return a line of JSON of the same meaning without such characters."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
