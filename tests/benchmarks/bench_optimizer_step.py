"""Time of one GrokFastAdamW step over that of torch's AdamW(fused=True), for Cognate-25M's parameters.

Ours includes what the yardstick lacks: finite check, clipping (the gradients are longer than the clip) and the filter.
Usage: python tests/benchmarks/bench_optimizer_step.py [runs]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cognate_server.grokfast import GrokFastAdamW, parameter_groups
from tests.benchmarks.common import interleave, report
from training_common.models.cognate_v1 import CognateV1, CognateV1Config

THREADS = 2


def make_step(
    build: Callable[[nn.Module], torch.optim.Optimizer], gradients: list[Tensor], model: nn.Module
) -> Callable[[], float]:
    """Return a function that takes one step with fresh gradients and returns the seconds of the step alone."""
    optimizer = build(model)

    def step_s() -> float:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        start_s = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start_s

    return step_s


def main(runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    models = [CognateV1(CognateV1Config()) for _ in range(2)]
    gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in models[0].parameters()]
    ours = make_step(
        lambda model: GrokFastAdamW(parameter_groups(model), lr=1e-3, warmup_steps=1), gradients, models[0]
    )
    yardstick = make_step(
        lambda model: torch.optim.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), fused=True),
        gradients,
        models[1],
    )
    report("optimizer_step", interleave(ours, yardstick, runs=runs), unit="s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
