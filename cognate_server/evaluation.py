"""How well a model reasons: whole answers to held-out problems, scored by the two sets' own rules.

A problem's document is prompt, reasoning and `#### answer`; the model gets the prompt and writes the rest. GSM8K counts
a final number that is the same (exact match). HotpotQA counts the same answer (exact match) and shared words (F1), both
after its normalization. Generated problems are scored by the rules of the set whose form they have, under names of
their own.

Sources: openai/grade-school-math, dataset.py (`extract_answer`); hotpotqa/hotpot, hotpot_evaluate_v1.py.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cognate_server.data.processor import ANSWER_MARK, Document
from cognate_server.data.sources import DatasetId
from cognate_server.data.stream import CognateTokenStream
from cognate_server.data.tokenizer import CognateTokenizer
from cognate_server.settings import PretrainingSettings
from training_common.models.cognate_v1 import CognateV1, MemoryState
from training_common.models.generation import generate

_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Answers of one word whose share of words with a sentence says nothing.
_CLOSED = ("yes", "no", "noanswer")


@dataclass(frozen=True, kw_only=True)
class ReasoningScore:
    """One set's score: shares of 1, means over `problems`.

    f1: for two-hop questions alone. floor: what always giving one answer, the best one for these very problems, would
        reach in exact match. No score at or below it shows any reasoning.
    """

    source: str
    problems: int
    exact_match: float
    f1: float | None
    floor: float

    def metrics(self) -> dict[str, float]:
        """Return the score under the names of `cognate_server.metrics`."""
        prefix = self.source.replace("-", "_")
        found = {f"{prefix}_exact_match": self.exact_match}
        return found if self.f1 is None else {**found, f"{prefix}_f1": self.f1}


def final_number(text: str) -> str | None:
    """Return the number after the first answer mark, without commas; None where there is none."""
    match = _NUMBER.search(text)
    return match.group(1).strip().replace(",", "") if match else None


def final_answer(text: str) -> str | None:
    """Return what stands behind the first answer mark, to the end of its line; None where there is no mark."""
    _, mark, rest = text.partition(ANSWER_MARK)
    return rest.split("\n", 1)[0].strip() if mark else None


def normalize_answer(text: str) -> str:
    """Lower the case, drop punctuation and articles, and leave single spaces."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def word_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the shared words, counted as often as they occur."""
    predicted, wanted = normalize_answer(prediction), normalize_answer(reference)
    if predicted != wanted and (predicted in _CLOSED or wanted in _CLOSED):
        return 0.0
    shared = sum((Counter(predicted.split()) & Counter(wanted.split())).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted.split()), shared / len(wanted.split())
    return 2 * precision * recall / (precision + recall)


def score(source: str, texts: Sequence[str], references: Sequence[str]) -> ReasoningScore:
    """Score the texts that a model wrote after the prompts. Errors: ValueError, when there is none."""
    if not texts:
        raise ValueError(f"{source} has no held-out problem to score")
    if DatasetId(source).arithmetic:
        wanted = [reference.replace(",", "") for reference in references]
        right = [final_number(text) == reference for text, reference in zip(texts, wanted, strict=True)]
        f1 = None
    else:
        answers = [final_answer(text) for text in texts]
        wanted = [normalize_answer(reference) for reference in references]
        # A missing answer is wrong, as in the official script, also where the right one is "The The": nothing is left.
        right = [
            answer is not None and normalize_answer(answer) == reference
            for answer, reference in zip(answers, wanted, strict=True)
        ]
        f1 = sum(word_f1(*pair) for pair in zip((answer or "" for answer in answers), references, strict=True))
        f1 /= len(texts)
    return ReasoningScore(
        source=source,
        problems=len(texts),
        exact_match=sum(right) / len(texts),
        f1=f1,
        floor=max(Counter(wanted).values()) / len(texts),
    )


def evaluate(
    model: CognateV1,
    tokenizer: CognateTokenizer,
    held_out: Sequence[Document],
    *,
    sequence_length: int,
    problems: int,
    max_new_tokens: int,
) -> list[ReasoningScore]:
    """Let the model answer the first problems of every source, greedily, and score each source.

    Reads a prompt as training does: rows of `sequence_length`, attention within a row, the memory carried over.
    """
    found = []
    for source in sorted({document.source for document in held_out}):
        chosen = [document for document in held_out if document.source == source][:problems]
        texts = _answers(model, tokenizer, chosen, sequence_length, max_new_tokens)
        found.append(score(source, texts, [document.answer for document in chosen]))
    return found


def evaluate_on(
    stream: CognateTokenStream, sequence_length: int, settings: PretrainingSettings, model: CognateV1
) -> list[ReasoningScore]:
    """Let the model answer held-out problems of each of a stream's sets, as many as a job's score takes."""
    return evaluate(
        model,
        stream.tokenizer,
        stream.held_out,
        sequence_length=sequence_length,
        problems=settings.reasoning_problems,
        max_new_tokens=settings.reasoning_tokens,
    )


@torch.no_grad()
def _answers(
    model: CognateV1,
    tokenizer: CognateTokenizer,
    documents: Sequence[Document],
    sequence_length: int,
    max_new_tokens: int,
) -> list[str]:
    tails, held = [], []
    for document in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(document.prompt)]
        whole = (len(ids) - 1) // sequence_length * sequence_length  # the tail keeps one token at least
        memory: MemoryState | None = None
        for start in range(0, whole, sequence_length):
            memory = model(torch.tensor([ids[start : start + sequence_length]]), memory=memory).memory
        tails.append(ids[whole:])
        held.append(memory or model.memory.start(1))
    continuations = generate(
        model,
        tails,
        max_new_tokens=max_new_tokens,
        stop_token=tokenizer.eos_id,
        memory=MemoryState.together(held),
    )
    return [tokenizer.decode([token for token in one.tokens if token != tokenizer.eos_id]) for one in continuations]


def metrics_of(scores: Sequence[ReasoningScore]) -> Mapping[str, float]:
    """Return all scores under their metric names."""
    return {name: value for one in scores for name, value in one.metrics().items()}


def right_share(scores: Sequence[ReasoningScore]) -> tuple[float, int]:
    """Return the share of right answers over all sets, and the number of problems."""
    problems = sum(one.problems for one in scores)
    return sum(one.exact_match * one.problems for one in scores) / max(1, problems), problems
