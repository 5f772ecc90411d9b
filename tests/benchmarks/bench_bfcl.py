"""The Berkeley Function Calling Leaderboard: share of held-back requests whose calls match, over never calling.

A recurrent agent from random values. It has to copy names and values that training never had, which a small network
without attention does not learn: the figure says what training on a thousand rows gives, and no more.
Usage: python tests/benchmarks/bench_bfcl.py [steps]
"""

from __future__ import annotations

import sys

from tests.benchmarks.agents import real_set, trained
from tests.benchmarks.common import print_result


def main(steps: int) -> None:
    """Train, measure and print."""
    data = real_set("tool_calling", "agent/bfcl/single_and_multi_turn.jsonl")
    with trained(
        "tool_calling", data, steps=steps, lr=2e-3, width=256, vocabulary_size=4096, batch_size=8, max_tokens=384
    ) as agent:
        found = agent.measured
        print_result(
            "bfcl",
            found["ast_match_after"],
            found["no_call_share"],
            unit="share of answers that match",
            ratio=None if found["no_call_share"] else 0.0,
            before=found["ast_match_before"],
            answers=agent.rows["ast_match_after"],
            loss_before=found["loss_before"],
            loss_after=found["loss_after"],
            seconds=agent.train_seconds,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
