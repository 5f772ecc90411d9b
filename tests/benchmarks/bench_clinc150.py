"""CLINC150: in-scope accuracy and out-of-scope recall of a small agent, over TF-IDF and a support vector machine.

A bidirectional recurrent agent from random values or, with --base, all of a pretrained encoder, for instance the folder
of all-MiniLM-L6-v2. Both learn the same training rows, with the 100 that belong to no intent as a label of their own,
and answer the same test rows. Source of set and protocol: Larson et al. 2019, arXiv:1909.02027, whose own support
vector machine reached 91.0 % in scope.
Usage: python tests/benchmarks/bench_clinc150.py [--steps N] [--base FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from agent_server.architectures.model import AgentModel
from agent_server.data.classification import OUT_OF_SCOPE
from agent_server.data.examples import Labelled
from agent_server.objectives.classification import ClassificationObjective
from tests.benchmarks.agents import real_set, trained
from tests.benchmarks.common import print_result

BATCH = 64
RECURRENT: dict[str, Any] = {"lr": 2e-3, "bidirectional": True, "width": 256, "dropout": 0.5, "vocabulary_size": 2048}
# The rate that BERT's authors fine-tune with, and the mean of all tokens that this encoder was trained for.
ENCODER: dict[str, Any] = {"lr": 1e-4, "pooling": "mean"}


def answers_of(model: AgentModel, rows: Sequence[Labelled], *, max_tokens: int) -> list[int]:
    """Return the likeliest label of each row."""
    objective = ClassificationObjective()
    encoded = objective.encode(model, rows, max_tokens=max_tokens)
    answers: list[int] = []
    with torch.no_grad():
        for start in range(0, len(encoded), BATCH):
            batch = objective.batch(encoded[start : start + BATCH])
            answers += model(objective.inputs(batch)).argmax(-1).tolist()
    return answers


def rates(rows: Sequence[Labelled], answers: Sequence[int], out_of_scope: int) -> tuple[float, float]:
    """Return the share of rows in scope that are answered rightly, and of those out of scope that are told as such."""
    pairs = list(zip((row.label for row in rows), answers, strict=True))
    inside = [label == answer for label, answer in pairs if label != out_of_scope]
    outside = [answer == out_of_scope for label, answer in pairs if label == out_of_scope]
    return sum(inside) / len(inside), sum(outside) / len(outside)


def main(steps: int, base: Path | None) -> None:
    """Train both, measure and print."""
    data = real_set("classification", "agent/clinc150/data_full.jsonl", include_out_of_scope=True)
    none_of_them = data.labels.index(OUT_OF_SCOPE)
    started = time.perf_counter()
    machine = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    machine.fit([row.text for row in data.train], [row.label for row in data.train])
    svm = rates(data.test, machine.predict([row.text for row in data.test]).tolist(), none_of_them)
    svm_seconds = time.perf_counter() - started
    asked = RECURRENT if base is None else ENCODER
    with trained("classification", data, steps=steps, base=base, batch_size=BATCH, max_tokens=64, **asked) as agent:
        found = rates(data.test, answers_of(agent.model, data.test, max_tokens=64), none_of_them)
        print_result(
            "clinc150",
            found[0],
            svm[0],
            unit="in-scope accuracy",
            out_of_scope_recall=found[1],
            yardstick_out_of_scope_recall=svm[1],
            macro_f1=agent.measured["macro_f1_after"],
            labels=len(data.labels),
            train_rows=len(data.train),
            test_rows=len(data.test),
            parameters=agent.parameters,
            base="" if base is None else base.name,
            seconds=agent.train_seconds,
            yardstick_seconds=svm_seconds,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    main(options.steps, options.base)
