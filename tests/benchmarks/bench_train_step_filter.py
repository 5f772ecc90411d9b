"""Time of a whole Cognate-25M training step over the same step with clip_grad_norm_ and AdamW(fused=True) instead.

What GrokFast costs a trainer. Both start from the same weights and learn so slowly that they ponder alike.
Usage: python tests/benchmarks/bench_train_step_filter.py [runs]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from cognate_server.grokfast import BETAS, MAX_GRADIENT_NORM, parameter_groups
from cognate_server.stream import Batch
from cognate_server.trainer import PretrainingRun
from tests.benchmarks.bench_train_step import CONFIG, THREADS, VOCABULARY, OneBatch
from tests.benchmarks.common import interleave, report


class ClippedAdamW(torch.optim.AdamW):
    """What a trainer without the filter would run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(parameter_groups(model), lr=CONFIG.peak_lr, betas=BETAS, fused=True)
        self._model = model

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and update."""
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
        super().step()


def make_step(batch: Batch, *, filtered: bool) -> Callable[[], float]:
    """Return a function that takes one training step and returns its seconds."""
    run = PretrainingRun(CONFIG, OneBatch(batch))
    with torch.no_grad():
        # As after some training: with the zero head there would be no gradient below it.
        run.model.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    if not filtered:
        run.optimizer = ClippedAdamW(run.model)  # type: ignore[assignment]

    def step_s() -> float:
        start_s = time.perf_counter()
        run.train_step(measure=False)
        return time.perf_counter() - start_s

    return step_s


def main(runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (CONFIG.rows, CONFIG.sequence_length + 1))
    batch = Batch(tokens=tokens)
    pairs = interleave(make_step(batch, filtered=True), make_step(batch, filtered=False), runs=runs)
    report("train_step_filter", pairs, unit="s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
