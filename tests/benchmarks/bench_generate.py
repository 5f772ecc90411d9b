"""Tokens/s of generation over kept keys and values, over those of a whole forward pass for every token.

Cognate-25M with random values; one row, or as many as asked for, each with a prompt of 128 tokens that is read within
the time. Both must choose the same tokens. `fixed_maximum` is the same generation with the most core steps for every
token, interleaved with the other two; `mean_steps` is what the adaptive one took.
Usage: python tests/benchmarks/bench_generate.py [runs] [rows]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from cognate_server.construct import CognateModelConstructor
from tests.benchmarks.common import interleave, report
from training_common.models.cognate_v1 import CognateV1, CognateV1Config
from training_common.models.generation import generate

THREADS = 2
PROMPT_TOKENS = 128
NEW_TOKENS = 32


def make_model() -> CognateV1:
    """Return Cognate-25M with a head that says something: at construction it is zero."""
    config = CognateV1Config()
    counts = torch.ones(config.vocabulary_size)
    model = CognateModelConstructor(config).construct(config, seed=0, unigram_counts=counts)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    return model.eval()


@torch.no_grad()
def whole_forward(model: CognateV1, prompts: list[list[int]]) -> list[list[int]]:
    """Continue greedily with the whole forward pass for every token; prompts are of one length."""
    tokens_BT = torch.tensor(prompts)
    for _ in range(NEW_TOKENS):
        output = model(tokens_BT)
        recall = output.recall.map(lambda part: part[:, -1])
        next_B = model.log_probabilities(output.hidden_BTD[:, -1], recall).argmax(-1)
        tokens_BT = torch.cat((tokens_BT, next_B.unsqueeze(1)), dim=1)
    rows: list[list[int]] = tokens_BT[:, PROMPT_TOKENS:].tolist()
    return rows


def tokens_per_s(produce: Callable[[], object], rows: int) -> float:
    """Return the new tokens of all rows over the wall-clock time."""
    start_s = time.perf_counter()
    produce()
    return rows * NEW_TOKENS / (time.perf_counter() - start_s)


def main(runs: int, rows: int) -> None:
    """Check that both say the same, measure and print."""
    torch.set_num_threads(THREADS)
    model = make_model()
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, model.config.vocabulary_size, (rows, PROMPT_TOKENS), generator=draw).tolist()
    found = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    if [list(row.tokens) for row in found] != whole_forward(model, prompts):
        sys.exit("generation and the whole forward pass chose different tokens")
    most = model.config.max_steps
    fixed: list[float] = []

    def ours() -> float:
        fixed.append(tokens_per_s(lambda: generate(model, prompts, max_new_tokens=NEW_TOKENS, fixed_steps=most), rows))
        return tokens_per_s(lambda: generate(model, prompts, max_new_tokens=NEW_TOKENS), rows)

    pairs = interleave(ours, lambda: tokens_per_s(lambda: whole_forward(model, prompts), rows), runs=runs)
    steps = [step for row in found for step in row.steps]
    report(
        "generate",
        pairs,
        unit="tokens/s",
        rows=rows,
        mean_steps=sum(steps) / len(steps),
        fixed_maximum=statistics.median(fixed[1:]),
    )


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *(5, 1)[len(arguments) :])
