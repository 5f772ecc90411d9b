"""Model cards: what the cards of models and of agents have in common, and a published version's card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.files import read_file
from training_common.artifacts.registry import ArtifactRow

CARD_FILE = "README.md"
# The contract's bound on a card in an answer.
MAX_CARD_CHARS = 65_536


def card_of(blobs: BlobStore, row: ArtifactRow) -> str:
    """Return a version's card as Markdown, empty where it has none, cut where an answer ends. As `read_file` does."""
    data = read_file(blobs, row, CARD_FILE)
    return data.decode("utf-8", errors="replace")[:MAX_CARD_CHARS]


def results_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return what was measured as a table. results: metric, dataset, value and rows of each."""
    lines = [f"| {r['metric']} | {r['dataset']} | {r['value']:.4f} | {r['rows']} |" for r in results]
    return "\n".join(["| metric | rows from | value | rows |", "| --- | --- | --- | --- |", *lines])


def source_text(source: Mapping[str, Any]) -> str:
    """Return a set in words. source: name, kind and digest."""
    return f"{source['name']} ({source['kind']}, {source['digest']})"
