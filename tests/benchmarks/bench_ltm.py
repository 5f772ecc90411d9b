"""Validation loss with the long-term memory over that without, on HotpotQA's documents, which are longer than a row.

Attention sees one row of 128 tokens; the memory is carried from row to row. Two ablations: reads switched off, and
contents that start afresh in every row, so that only what earlier rows left is missing. Trains Cognate-25M first,
unless it is kept.
Usage: python tests/benchmarks/bench_ltm.py [training steps]
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from cognate_server.validation import first_rows, row_losses
from tests.benchmarks.common import print_result
from tests.benchmarks.trained import real_stream, train

THREADS = 2
ROWS = 160


def main(steps: int) -> None:
    """Train, measure and print."""
    torch.set_num_threads(THREADS)
    trained = train(steps)
    stream = real_stream("hotpotqa", rows=8, sequence_length=128, tokenizer=trained.stream.tokenizer)
    batches = first_rows(stream.validation_batches(), ROWS)
    afresh = [
        dataclasses.replace(batch, fresh_rows=torch.ones(len(batch.tokens), dtype=torch.bool)) for batch in batches
    ]
    whole = row_losses(trained.model, batches)
    off = row_losses(trained.model, batches, read_memory=False)
    fresh = row_losses(trained.model, afresh)
    print_result(
        "ltm",
        whole.mean,
        off.mean,
        unit="nats/token",
        gain_nats=off.mean - whole.mean,
        error_of_gain=whole.error_of_gain(off),
        carried_gain_nats=fresh.mean - whole.mean,
        error_of_carried_gain=whole.error_of_gain(fresh),
        rows=len(whole.sums_R),
        training_steps=steps,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
