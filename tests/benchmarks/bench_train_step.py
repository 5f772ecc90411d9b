"""Executed model FLOP/s of a pretraining step over those of a plain compiled GPT of 25M parameters with the same batch.

A step is all of it: batch, forward, loss, backward, optimizer. Executed FLOPs are those that the step's tokens needed
in matrix products and attention, by the same arithmetic for both (`step_flops`): a token that has halted counts nothing
from then on, and masked, recomputed or skipped work earns nothing. Both run in the precision that a job gets here, and
under the allocator's settings that `make bench` shares with workers.
Usage: python tests/benchmarks/bench_train_step.py [runs]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cognate_server.flops import PASSES, step_flops
from cognate_server.precision import Precision, native_precision
from cognate_server.stream import Batch
from cognate_server.trainer import PretrainConfig, PretrainingRun
from tests.benchmarks.common import interleave, report
from training_common.attempt import Json

THREADS = 2
VOCABULARY = 15_616
WIDTH = 512
CONFIG = PretrainConfig(seed=0, total_steps=1_000, warmup_steps=1_000, precision=native_precision())


class OneBatch:
    """A stream that gives the same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def next_batch(self) -> Batch:
        """Return the batch."""
        return self._batch

    def state_dict(self) -> Mapping[str, Json]:
        """Return nothing: there is no position."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Do nothing."""

    def validation_batches(self) -> Iterable[Batch]:
        """Return no batch."""
        return []

    def unigram_counts(self) -> Tensor:
        """Return a flat distribution."""
        return torch.ones(VOCABULARY)


class PlainBlock(nn.Module):
    """A GPT-2 block; the feed-forward width of 2,304 brings five of them to 25M parameters with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2_304), nn.GELU(), nn.Linear(2_304, WIDTH))

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        query, key, value = self.query_key_value(self.norms[0](x_BTD)).view(B, T, 3, 8, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.output(mixed.transpose(1, 2).reshape(B, T, WIDTH))
        after: Tensor = x_BTD + self.feed_forward(self.norms[1](x_BTD))
        return after


class PlainGPT(nn.Module):
    """Token and position embeddings, five blocks, norm, tied head: 25.1M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONFIG.sequence_length, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(5))
        self.norm = nn.LayerNorm(WIDTH)
        # As GPT-2 starts. With torch's own values of the embedding logits are so far apart that most probabilities are
        # denormal numbers, which slow every product down.
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions.weight
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.embedding.weight)


def make_ours(batch: Batch) -> Callable[[], float]:
    """Return a function that takes one pretraining step and returns its executed FLOP/s."""
    run = PretrainingRun(CONFIG, OneBatch(batch))
    with torch.no_grad():
        # As after some training: with the zero head there would be no gradient below it.
        run.model.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))

    def flops_per_s() -> float:
        start_s = time.perf_counter()
        outcome = run.train_step(measure=False)
        elapsed_s = time.perf_counter() - start_s
        steps = sum(number * count for number, count in enumerate(outcome.taken_N.tolist()))
        tokens = CONFIG.rows * CONFIG.sequence_length
        flops = step_flops(CONFIG.model, rows=CONFIG.rows, tokens=tokens, targets=outcome.targets, core_steps=steps)
        return flops / elapsed_s

    return flops_per_s


def make_yardstick(batch: Batch) -> Callable[[], float]:
    """Return the same for the plain GPT: fused AdamW, clipped gradients, compiled by torch."""
    model = PlainGPT()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def backward(forward: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=CONFIG.precision is Precision.BFLOAT16):
            logits = forward(batch.tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = len(model.blocks) * 2 * WIDTH * (CONFIG.sequence_length + 1)
    flops = PASSES * CONFIG.rows * CONFIG.sequence_length * (2 * (weights + VOCABULARY * WIDTH) + attention)

    def flops_per_s() -> float:
        start_s = time.perf_counter()
        backward(compiled)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return flops / (time.perf_counter() - start_s)

    return flops_per_s


def main(runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (CONFIG.rows, CONFIG.sequence_length + 1))
    batch = Batch(tokens=tokens)
    report("train_step", interleave(make_ours(batch), make_yardstick(batch), runs=runs), unit="FLOP/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
