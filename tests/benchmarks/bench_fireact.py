"""FireAct: how often an imitating agent acts as was demonstrated, over always taking the most frequent action.

A recurrent agent from random values, on the trajectories that reached their goal. Turns of held-back questions, 64 of
them, are written token by token, before and after.
Usage: python tests/benchmarks/bench_fireact.py [steps]
"""

from __future__ import annotations

import sys

from agent_server.train_config import Constraints
from tests.benchmarks.agents import real_set, trained
from tests.benchmarks.common import print_result


def main(steps: int) -> None:
    """Train, measure and print."""
    data = real_set("behavioural", "agent/fireact/multitask_multimethod.jsonl", successes_only=True)
    with trained(
        "behavioural", data, steps=steps, lr=2e-3, width=256, vocabulary_size=4096, batch_size=16, max_tokens=256,
        constraints=Constraints(),
    ) as agent:  # fmt: skip
        found = agent.measured
        print_result(
            "fireact",
            found["action_kind_accuracy_after"],
            found["majority_share"],
            unit="share of turns with the demonstrated kind of action",
            before=found["action_kind_accuracy_before"],
            turns=agent.rows["action_kind_accuracy_after"],
            exact_match=found["action_exact_match_after"],
            violation_share=found["violation_share_after"],
            loss_before=found["loss_before"],
            loss_after=found["loss_after"],
            left_out=dict(data.report.left_out),
            seconds=agent.train_seconds,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
