"""Time of one GrokFastAdamW step over that of torch's AdamW(fused=True), for Cognate-25M's parameters.

Ours includes what the yardstick lacks: norm, finite check and clip (the gradients are longer than it) and the filter.
Beside `ratio` stand: `ratio_with_clip`, over clip_grad_norm_ and AdamW(fused=True), which is what a trainer without the
filter would do; `ratio_update`, our pass over memory alone, once the clip is known, over AdamW(fused=True).
Usage: python tests/benchmarks/bench_optimizer_step.py [runs]
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cognate_server.grokfast import MAX_GRADIENT_NORM, GrokFastAdamW, parameter_groups
from tests.benchmarks.common import report
from training_common.models.cognate_v1 import CognateV1, CognateV1Config

THREADS = 2


class TimedOptimizer:
    """An optimizer on a model of its own, with fresh gradients at every step."""

    def __init__(self, gradients: list[Tensor], *, clips: bool = False) -> None:
        self.model = CognateV1(CognateV1Config())
        self._gradients = gradients
        self._clips = clips
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameter_groups(self.model), lr=1e-3, betas=(0.9, 0.95), fused=True
        )

    def step_s(self) -> float:
        """Return the seconds of one step, without those of making the gradients."""
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient.clone()
        start_s = time.perf_counter()
        if self._clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        return time.perf_counter() - start_s


class TimedGrokFast(TimedOptimizer):
    """Ours; remembers how much of the last step its pass over memory took."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__(gradients)
        self.optimizer = GrokFastAdamW(parameter_groups(self.model), lr=1e-3, ramp_steps=1)
        self.update_s = 0.0
        update = self.optimizer._update
        update.apply = self._timed(update.apply)  # type: ignore[method-assign]
        self.implementation = update.name

    def _timed(self, apply: Callable[..., list[tuple[float, float]]]) -> Callable[..., list[tuple[float, float]]]:
        def timed(*arguments: object, **options: object) -> list[tuple[float, float]]:
            start_s = time.perf_counter()
            sums = apply(*arguments, **options)
            self.update_s = time.perf_counter() - start_s
            return sums

        return timed


def main(runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in CognateV1(CognateV1Config()).parameters()]
    gradients = [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes]
    ours, plain, clipping = TimedGrokFast(gradients), TimedOptimizer(gradients), TimedOptimizer(gradients, clips=True)
    rows = [(ours.step_s(), ours.update_s, plain.step_s(), clipping.step_s()) for _ in itertools.repeat(None, runs + 2)]
    rows = rows[2:]  # the first two warm up
    print(f"implementation: {ours.implementation}, {THREADS} threads")
    report(
        "optimizer_step",
        [(whole, theirs) for whole, _, theirs, _ in rows],
        unit="s",
        ratio_with_clip=statistics.median(whole / clipped for whole, _, _, clipped in rows),
        ratio_update=statistics.median(update / theirs for _, update, theirs, _ in rows),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
