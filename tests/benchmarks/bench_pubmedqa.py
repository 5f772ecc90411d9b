"""PubMedQA: accuracy of yes, no or maybe on the official test rows, over always answering what is most frequent there.

A bidirectional recurrent agent from random values or, with --base, all of a pretrained encoder reads question and
abstract of some 440 rows. Beside it stands a linear support vector machine on TF-IDF of words and pairs of words, on
the same rows.
Usage: python tests/benchmarks/bench_pubmedqa.py [--steps N] [--base FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from agent_server.data.examples import Labelled
from tests.benchmarks.agents import SEED, real_set, trained
from tests.benchmarks.common import print_result

RECURRENT: dict[str, Any] = {
    "lr": 5e-4, "bidirectional": True, "width": 64, "dropout": 0.5, "vocabulary_size": 2048, "batch_size": 32,
    "max_tokens": 384,
}  # fmt: skip
ENCODER: dict[str, Any] = {"lr": 5e-5, "pooling": "mean", "batch_size": 16, "max_tokens": 384}


def machine_accuracy(train: Sequence[Labelled], test: Sequence[Labelled]) -> float:
    """Return the accuracy of a linear support vector machine."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    machine = LinearSVC(random_state=SEED)
    machine.fit(vectors.fit_transform([row.text for row in train]), [row.label for row in train])
    answers: list[int] = machine.predict(vectors.transform([row.text for row in test])).tolist()
    return sum(answer == row.label for answer, row in zip(answers, test, strict=True)) / len(test)


def main(steps: int, base: Path | None) -> None:
    """Train, measure and print."""
    data = real_set("classification", "agent/pubmedqa/ori_pqal.jsonl")
    asked = RECURRENT if base is None else ENCODER
    with trained("classification", data, steps=steps, base=base, **asked) as agent:
        found = agent.measured
        print_result(
            "pubmedqa",
            found["accuracy_after"],
            found["majority_share"],
            unit="accuracy",
            macro_f1=found["macro_f1_after"],
            machine=machine_accuracy(data.train, data.test),
            validation_accuracy=found["validation_accuracy"],
            rows=agent.rows["accuracy_after"],
            base="" if base is None else base.name,
            seconds=agent.train_seconds,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    main(options.steps, options.base)
