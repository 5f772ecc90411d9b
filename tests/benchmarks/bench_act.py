"""Time to generate with adaptive computation over always taking the most core steps, on trained weights and real rows.

Also told: whether harder tokens take more steps (correlation of a token's steps with its loss at one step), and the
validation loss of adaptive computation, of one step and of the most. Trains Cognate-25M first, unless it is kept.
Usage: python tests/benchmarks/bench_act.py [training steps] [runs]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server.losses import forward
from cognate_server.stream import Batch
from cognate_server.validation import row_losses
from tests.benchmarks.common import interleave, report
from tests.benchmarks.trained import Trained, train, validation_rows
from training_common.models.cognate_v1 import CognateV1, MemoryState
from training_common.models.generation import generate

THREADS = 2
ROWS = 128
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 1, 64, 64


@torch.no_grad()
def steps_and_losses(model: CognateV1, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return every target's core steps and its loss with one core step."""
    steps, losses = [], []
    memories: dict[int | None, MemoryState | None] = {None: None, 1: None}
    for batch in batches:
        found = {fixed: forward(model, batch, memories[fixed], fixed_steps=fixed) for fixed in memories}
        memories = {fixed: one.output.memory for fixed, one in found.items()}
        steps.append(found[None].output.steps_BT[found[None].trained_BT].double())
        logits = model.logits(found[1].hidden_XD)
        losses.append(F.cross_entropy(logits, found[1].targets_X, reduction="none").double())
    return torch.cat(steps), torch.cat(losses)


def make_generate(trained: Trained, batches: list[Batch], fixed_steps: int | None) -> Callable[[], float]:
    """Return a function that continues prompts and returns the seconds."""
    prompts = batches[0].tokens[:PROMPTS, :PROMPT_TOKENS].tolist()

    def seconds() -> float:
        start_s = time.perf_counter()
        generate(trained.model, prompts, max_new_tokens=NEW_TOKENS, fixed_steps=fixed_steps)
        return time.perf_counter() - start_s

    return seconds


def main(steps: int, runs: int) -> None:
    """Train, measure and print."""
    torch.set_num_threads(THREADS)
    trained = train(steps)
    model, batches = trained.model, validation_rows(trained, ROWS)
    most = model.config.max_steps
    taken, one_step_losses = steps_and_losses(model, batches)
    adaptive = row_losses(model, batches)
    whole = row_losses(model, batches, fixed_steps=most)
    pairs = interleave(make_generate(trained, batches, None), make_generate(trained, batches, most), runs=runs)
    for number in range(1, most + 1):
        chosen = one_step_losses[taken == number]
        if len(chosen):
            print(f"tokens with {number} steps: {len(chosen)}, loss at one step {float(chosen.mean()):.3f}")
    report(
        "act",
        pairs,
        unit="s",
        correlation_of_steps_and_loss_at_one_step=float(torch.corrcoef(torch.stack((taken, one_step_losses)))[0, 1]),
        mean_steps=float(taken.mean()),
        loss=adaptive.mean,
        loss_one_step=row_losses(model, batches, fixed_steps=1).mean,
        loss_most_steps=whole.mean,
        error_of_loss_difference=adaptive.error_of_gain(whole),
        tokens=len(taken),
        training_steps=steps,
    )


if __name__ == "__main__":
    main(*(int(given) for given in sys.argv[1:]), *(400, 7)[len(sys.argv) - 1 :])
