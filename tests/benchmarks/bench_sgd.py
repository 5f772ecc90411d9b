"""The Schema-Guided Dialogue: F1 of slots over a lookup in the training rows, and the loss of the system's turns.

Two recurrent agents from random values. Slots: a bidirectional network, on the training dialogues, a tenth of which are
held back; the yardstick marks, the longest first, each text that filled a slot in at least half of its occurrences in
training, with the slot that it filled most often. Turns: the loss for each system turn of half of the development
dialogues, other services among them, before and after, beside that of the training turns' token frequencies under the
same tokenizer.
Usage: python tests/benchmarks/bench_sgd.py [slot steps] [turn steps]
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from agent_server.architectures.model import AgentModel
from agent_server.data.examples import Span, Tagged, Written
from agent_server.objectives.language import LanguageObjective
from agent_server.objectives.metrics.spans import score_spans
from tests.benchmarks.agents import real_set, trained
from tests.benchmarks.common import print_result

MAX_TOKENS = 192


def lookup(train: Iterable[Tagged], test: Iterable[Tagged]) -> float:
    """Return the F1 of marking what filled a slot in training in at least half of its occurrences there."""
    train = list(train)
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        for span in example.spans:
            seen[example.text[span.start : span.end].lower()][span.label] += 1

    def any_of(words: Iterable[str]) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})(?!\w)")

    every = any_of(seen)
    occurs = Counter(found.group() for example in train for found in every.finditer(example.text.lower()))
    pattern = any_of(word for word, labels in seen.items() if 2 * labels.total() >= occurs[word])
    return score_spans(
        [
            (
                example.spans,
                [
                    Span(found.start(), found.end(), seen[found.group()].most_common(1)[0][0])
                    for found in pattern.finditer(example.text.lower())
                ],
            )
            for example in test
        ]
    ).f1


def frequency_turn_loss(model: AgentModel, train: Sequence[Written], test: Sequence[Written]) -> float:
    """Return the mean over system turns of their tokens' mean loss, by how often tokens occur in training turns."""
    objective = LanguageObjective("dialogue")

    def turns(examples: Sequence[Written]) -> list[list[int]]:
        found: defaultdict[int, list[int]] = defaultdict(list)
        for row in objective.encode(model, examples, max_tokens=MAX_TOKENS):
            for token, turn in zip(row.tokens, row.turns, strict=True):
                if turn >= 0:
                    found[turn].append(token)
        return list(found.values())

    counts = Counter(token for turn in turns(train) for token in turn)
    every, tokens = counts.total(), len(counts) + 1  # the one more stands for all that were never seen
    losses = [
        sum(-math.log((counts[token] + 1) / (every + tokens)) for token in turn) / len(turn) for turn in turns(test)
    ]
    return sum(losses) / len(losses)


def main(slot_steps: int, turn_steps: int) -> None:
    """Train both agents, measure and print."""
    slots = real_set("extraction", "agent/sgd/train_sample.jsonl")
    with trained(
        "extraction", slots, steps=slot_steps, lr=4e-3, bidirectional=True, width=160, dropout=0.5,
        vocabulary_size=2048, batch_size=32,
    ) as tagger:  # fmt: skip
        f1 = lookup(slots.train, slots.test)
    dialogues = real_set("dialogue", "agent/sgd")
    with trained(
        "dialogue", dialogues, steps=turn_steps, lr=2e-3, width=256, vocabulary_size=2048, batch_size=16,
        max_tokens=MAX_TOKENS,
    ) as speaker:  # fmt: skip
        frequencies = frequency_turn_loss(speaker.model, dialogues.train, dialogues.test)
    print_result(
        "sgd",
        tagger.measured["slot_f1_after"],
        f1,
        unit="slot F1",
        slot_precision=tagger.measured["slot_precision_after"],
        slot_recall=tagger.measured["slot_recall_after"],
        slot_texts=tagger.rows["slot_f1_after"],
        turn_loss_before=speaker.measured["turn_loss_before"],
        turn_loss_after=speaker.measured["turn_loss_after"],
        turn_loss_of_frequencies=frequencies,
        turns=speaker.rows["turn_loss_after"],
        seconds=tagger.train_seconds + speaker.train_seconds,
    )


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *(1800, 400)[len(arguments) :])
