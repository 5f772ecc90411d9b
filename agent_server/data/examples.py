"""What data pipelines hand to training: examples of each form, free of torch.

A task has one form of example (`agent_server.tasks`). Texts are as the rows have them; tokens are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from training_common.attempt import Json
from training_common.findings import ProcessingReport

# Numbers that may come beside a text: far more than an image encoder gives.
MOST_FEATURES = 65_536


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the number of its label. features: what comes beside it, for instance of an image; mostly nothing."""

    text: str
    label: int
    features: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text that fills a slot. start, end: characters, end exclusive."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text and its spans, in order, none of which overlap."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a text. The loss falls on the tokens of trained pieces alone."""

    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """A text in pieces, for a language model.

    segments: in reading order; what stands before the first trained one is the prompt of an answer that is generated.
    weight: factor of this text's part of the loss.
    accepted: what a metric compares a generated answer with; its form is the task's (`agent_server.tasks`).
    """

    segments: tuple[Segment, ...]
    weight: float = 1.0
    accepted: Json = None


@dataclass(frozen=True, slots=True)
class Preferred:
    """A prompt and two answers, the first of which is preferred."""

    prompt: str
    chosen: str
    rejected: str


E = TypeVar("E")


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """All that tells which data an agent was trained on.

    kind: "generated", "folder" or "hub". source: what was asked for. rows: by split. facts: what the task adds, for
    instance the share of the majority class.
    """

    name: str
    kind: str
    source: dict[str, Json]
    files: tuple[dict[str, Json], ...]
    digest: str
    labels: tuple[str, ...]
    rows: dict[str, int]
    report: ProcessingReport
    facts: dict[str, Json]

    def to_json(self) -> dict[str, Json]:
        """Return the manifest as it is published."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": dict(self.source),
            "files": list(self.files),
            "digest": self.digest,
            "labels": list(self.labels),
            "rows": dict(self.rows),
            "report": self.report.to_json(),
            **self.facts,
        }


@dataclass(frozen=True, kw_only=True)
class PreparedData(Generic[E]):
    """Examples ready to train on. labels: of classes or slots, in the order of their numbers; empty for texts."""

    name: str
    labels: tuple[str, ...]
    train: Sequence[E]
    validation: Sequence[E]
    test: Sequence[E]
    manifest: DataManifest

    @property
    def report(self) -> ProcessingReport:
        """What became of every row."""
        return self.manifest.report


def texts_of(examples: Sequence[Labelled | Tagged | Written | Preferred]) -> Iterator[str]:
    """Yield the texts of examples of any form, for who learns a tokenizer."""
    for example in examples:
        match example:
            case Labelled(text=text) | Tagged(text=text):
                yield text
            case Written(segments=segments):
                yield "".join(segment.text for segment in segments)
            case Preferred(prompt=prompt, chosen=chosen, rejected=rejected):
                yield prompt + chosen
                yield prompt + rejected
