"""Two-hop questions in HotpotQA's form, read from the official files and from the hub's.

Official rows hold lists of pairs (`context: [[title, [sentence, ...]], ...]`, `_id`); hub rows hold dicts of lists
(`context: {title: [...], sentences: [[...], ...]}`, `id`). Sentence numbers count blank sentences too, so none is ever
dropped before a supporting fact is looked up. Texts and titles may hold HTML entities; all are unescaped alike, so that
facts still find their paragraphs.
Source: Yang et al. 2018, arXiv:1809.09600.
"""

from __future__ import annotations

import html
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from training_common.findings import RowRefusedError, quote
from training_common.rows import checked_text, text_field

# Real questions have at most about 500 characters, real contexts 14,290.
MAX_QUESTION_CHARS = 4_096
MAX_SENTENCE_CHARS = 16_384
# Real rows have at most 10 paragraphs and 7 supporting facts.
MAX_PARAGRAPHS = 64
MAX_SENTENCES = 512
MAX_FACTS = 64

YES_NO = frozenset({"yes", "no"})
KINDS = ("bridge", "comparison")
# From easy to hard.
LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A titled text. A sentence after the first brings its own leading space."""

    title: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The sentences as running text."""
        return "".join(self.sentences).strip()


@dataclass(frozen=True, slots=True)
class SupportingFact:
    """A sentence that the answer rests on, found in its paragraph."""

    title: str
    sentence_index: int
    sentence: str


@dataclass(frozen=True, slots=True)
class TwoHopQuestion:
    """A question whose supporting facts, in the row's order, are the chain from question to answer."""

    key: str
    question: str
    answer: str
    kind: str
    level: str
    paragraphs: tuple[Paragraph, ...]
    facts: tuple[SupportingFact, ...]

    @property
    def gold_titles(self) -> frozenset[str]:
        """Titles of the paragraphs that hold a supporting fact."""
        return frozenset(fact.title for fact in self.facts)

    @property
    def answer_is_supported(self) -> bool:
        """Whether the answer is yes or no, or stands verbatim in a supporting sentence."""
        return self.answer in YES_NO or any(self.answer in fact.sentence for fact in self.facts)

    @property
    def chain(self) -> tuple[SupportingFact, ...]:
        """The supporting facts as steps from the question to the answer.

        The set lists a bridge's facts in no fixed order. Where one page alone holds the answer, its facts come last;
        otherwise, and for comparisons, the row's order stays.
        """
        ends = {fact.title for fact in self.facts if self.answer in fact.sentence}
        if self.kind != "bridge" or self.answer in YES_NO or len(ends) != 1:
            return self.facts
        return tuple(sorted(self.facts, key=lambda fact: fact.title in ends))

    def with_distractors(self, count: int, *, seed: int) -> tuple[Paragraph, ...]:
        """Return every gold paragraph and `count` of the others, picked by seed and key, in the row's order."""
        gold = self.gold_titles
        others = [paragraph.title for paragraph in self.paragraphs if paragraph.title not in gold]
        rng = random.Random(f"{seed}/{self.key}")  # noqa: S311 - a choice of pages, not a secret
        kept = gold | set(rng.sample(others, min(count, len(others))))
        return tuple(paragraph for paragraph in self.paragraphs if paragraph.title in kept)


def parse_question(row: Mapping[str, object]) -> TwoHopQuestion:
    """Return the question in a row of either form. Errors: RowRefusedError."""
    paragraphs = tuple(_paragraphs(row))
    return TwoHopQuestion(
        key=_key(row),
        question=_clean_field(row, "question"),
        answer=_clean_field(row, "answer"),
        kind=_choice(row, "type", KINDS),
        level=_choice(row, "level", LEVELS),
        paragraphs=paragraphs,
        facts=tuple(_facts(row, {paragraph.title: paragraph for paragraph in paragraphs})),
    )


def _clean_field(row: Mapping[str, object], field: str) -> str:
    return _clean_text(text_field(row, field, max_chars=MAX_QUESTION_CHARS), field)


def _clean_text(text: str, field: str) -> str:
    """Return a text without entities and outer space. It may be blank only now: "&nbsp;" is."""
    return checked_text(_clean(text), field, max_chars=MAX_QUESTION_CHARS)


def _clean(text: str) -> str:
    return html.unescape(text).strip()


def _key(row: Mapping[str, object]) -> str:
    name = "_id" if "_id" in row else "id"
    return text_field(row, name, max_chars=128)


def _choice(row: Mapping[str, object], field: str, known: tuple[str, ...]) -> str:
    value = row.get(field)
    if not isinstance(value, str) or value not in known:
        raise RowRefusedError(
            "unknown_value", field=field, detail=f"{quote(value)} is none of {', '.join(known)}", remedy="correct it"
        )
    return value


def _pairs(row: Mapping[str, object], field: str, hub_names: tuple[str, str]) -> Iterator[tuple[object, object]]:
    """Yield the pairs of a field in either form, checking no more than its shape."""
    value = row.get(field)
    if isinstance(value, Mapping):
        first, second = (value.get(name) for name in hub_names)
        if not _is_list(first) or not _is_list(second) or len(first) != len(second):
            raise _shape(field, f"an object with the lists {hub_names[0]!r} and {hub_names[1]!r} of equal length")
        yield from zip(first, second, strict=True)
    elif _is_list(value):
        for pair in value:
            if not _is_list(pair) or len(pair) != 2:
                raise _shape(field, "a list of pairs")
            yield pair[0], pair[1]
    else:
        raise _shape(field, "a list of pairs, or an object of lists")


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple)


def _shape(field: str, expected: str) -> RowRefusedError:
    return RowRefusedError(
        "wrong_shape", field=field, detail=f"the field is not {expected}", remedy="write the row as the set's files do"
    )


def _paragraphs(row: Mapping[str, object]) -> Iterator[Paragraph]:
    titles: set[str] = set()
    for title, sentences in _pairs(row, "context", ("title", "sentences")):
        name = _clean_text(checked_text(title, "context.title", max_chars=MAX_QUESTION_CHARS), "context.title")
        if not _is_list(sentences):
            raise _shape("context.sentences", "a list of sentences")
        if name in titles:
            raise RowRefusedError(
                "duplicate_title",
                field="context",
                detail=f"two paragraphs are titled {quote(name)}",
                remedy="merge them, or facts cannot be looked up",
            )
        titles.add(name)
        if len(titles) > MAX_PARAGRAPHS or len(sentences) > MAX_SENTENCES:
            raise RowRefusedError(
                "too_long",
                field="context",
                detail=f"more than {MAX_PARAGRAPHS} paragraphs or {MAX_SENTENCES} sentences in one",
                remedy="remove distractors",
            )
        texts = (checked_text(s, "context.sentences", max_chars=MAX_SENTENCE_CHARS, blank=True) for s in sentences)
        yield Paragraph(name, tuple(html.unescape(text) for text in texts))
    if not titles:
        raise RowRefusedError(
            "no_context", field="context", detail="there is no paragraph", remedy="use the distractor files"
        )


def _facts(row: Mapping[str, object], by_title: Mapping[str, Paragraph]) -> Iterator[SupportingFact]:
    seen: set[tuple[str, int]] = set()
    for title, index in _pairs(row, "supporting_facts", ("title", "sent_id")):
        paragraph = by_title.get(_clean(title)) if isinstance(title, str) else None
        if paragraph is None:
            raise RowRefusedError(
                "gold_paragraph_missing",
                field="supporting_facts",
                detail=f"no paragraph is titled {quote(title)}",
                remedy="use the distractor files, which hold every gold paragraph",
            )
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(paragraph.sentences):
            raise RowRefusedError(
                "fact_out_of_range",
                field="supporting_facts",
                detail=f"{quote(title)} has {len(paragraph.sentences)} sentences, the fact names number {quote(index)}",
                remedy="count sentences from 0, blank ones too",
            )
        sentence = _clean(paragraph.sentences[index])
        if not sentence:
            raise RowRefusedError(
                "blank_fact",
                field="supporting_facts",
                detail=f"sentence {index} of {quote(title)} is blank",
                remedy="name a sentence that says something; blank ones count from 0 too",
            )
        if (paragraph.title, index) not in seen:  # one that is named twice says nothing new
            yield SupportingFact(paragraph.title, index, sentence)
        seen.add((paragraph.title, index))
    if not 0 < len(seen) <= MAX_FACTS:
        raise RowRefusedError(
            "too_long" if seen else "no_facts",
            field="supporting_facts",
            detail=f"{len(seen)} facts; 1 to {MAX_FACTS} are read",
            remedy="name the sentences that the answer rests on",
        )
