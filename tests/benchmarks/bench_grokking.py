"""Iterations to 95 % validation accuracy on modular multiplication: Adam over GrokFast, by the published protocol.

Lee et al. 2024 (arXiv:2405.20233): a decoder of 2 layers, width 128 and 422,784 parameters learns x * y mod 97 from
half of the 9,312 equations with y > 0. Rate 1e-3 with 10 steps of warm-up, betas (0.9, 0.98), batch 512, Adam with L2
0.005 (coupled), EMA from step 0 with alpha 0.98 and lambda 2; accuracy is taken after each epoch of 10 iterations. The
filter is the service's own, bit for bit what its kernel does; Adam, with its coupled decay, is torch's.

Amplified by 1 + lambda = 3, gradients outweigh the coupled decay three times as much, and Adam itself does not see the
scale. So the control that isolates the filter is Adam without it at L2 0.005 / 3 ("scale-matched"); `ratio` is the
median of its iterations over that of GrokFast's. Runs that end at the cap are printed with ">=" and count as the cap.
Usage: python tests/benchmarks/bench_grokking.py [--seeds N] [--control-seeds N] [--other-seeds N] [--cap N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cognate_server.grokfast import ALPHA, LAMBDA
from cognate_server.grokfast.foreach import amplify
from tests.benchmarks.common import print_result

# T tokens of an equation without its result, N equations, D model width

PRIME = 97
WIDTH, HEADS, LAYERS = 128, 4, 2
BATCH = 512
LR, WARMUP = 1e-3, 10
BETAS = (0.9, 0.98)
TARGET = 0.95


@dataclass(frozen=True)
class Recipe:
    """One line of the table. decay: coupled in Adam, decoupled in AdamW."""

    name: str
    optimizer: type[torch.optim.Adam]
    decay: float
    filtered: bool = False


GROKFAST = Recipe("GrokFast: Adam, L2 0.005, filter", torch.optim.Adam, 0.005, filtered=True)
SCALE_MATCHED = Recipe("Adam, L2 0.005 / 3 (scale-matched)", torch.optim.Adam, 0.005 / 3)
OTHERS = (
    Recipe("AdamW, decay 1", torch.optim.AdamW, 1.0),
    Recipe("AdamW, decay 1, filter", torch.optim.AdamW, 1.0, filtered=True),
    Recipe("Adam, no decay (the paper's baseline)", torch.optim.Adam, 0.0),
)


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm.

    As published, the first residual starts behind its norm. Started before it, seed 0 takes 1,560 iterations, not 910.
    """

    def __init__(self) -> None:
        super().__init__()
        # The order of construction is that of the published code, for equal seeds to give equal weights.
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_TND: Tensor) -> Tensor:
        length = x_TND.shape[0]
        hidden_TT = torch.full((length, length), -torch.inf).triu(1)
        x_TND = self.norms[0](x_TND)
        mixed_TND, _ = self.attention(x_TND, x_TND, x_TND, attn_mask=hidden_TT, need_weights=False)
        x_TND = x_TND + mixed_TND
        after: Tensor = x_TND + self.feed_forward(self.norms[1](x_TND))
        return after


class Decoder(nn.Module):
    """Token and position embeddings, two blocks, norm, untied head."""

    def __init__(self) -> None:
        super().__init__()
        vocabulary = PRIME + 2
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens_TN: Tensor) -> Tensor:
        x_TND = self.tokens(tokens_TN) + self.positions.weight[: len(tokens_TN), None]
        for block in self.blocks:
            x_TND = block(x_TND)
        logits: Tensor = self.head(self.norm(x_TND))
        return logits


def equations() -> Tensor:
    """Return all of them as token columns x, op, y, =, result: (5, 9312)."""
    x, y = torch.cartesian_prod(torch.arange(PRIME), torch.arange(1, PRIME)).T
    return torch.stack([x, torch.full_like(x, PRIME + 1), y, torch.full_like(x, PRIME), x * y % PRIME])


class Training:
    """One seed under one recipe."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        self._model = Decoder()
        data = equations()
        half = data.shape[1] // 2
        order = torch.randperm(data.shape[1])
        self._train, self._valid = data[:, order[:half]], data[:, order[half:]]
        self._is_filtered = recipe.filtered
        self._slow: list[Tensor] = []
        self._optimizer = recipe.optimizer(self._model.parameters(), lr=LR, betas=BETAS, weight_decay=recipe.decay)
        self.iterations = 0

    def epoch(self) -> None:
        """Go through the training half once, in a new order."""
        self._train = self._train[:, torch.randperm(self._train.shape[1])]
        for batch in torch.split(self._train, BATCH, dim=1):
            self._model.zero_grad()
            F.cross_entropy(self._model(batch[:-1])[-1], batch[-1]).backward()  # type: ignore[no-untyped-call]
            if self._is_filtered:
                self._filter()
            self._optimizer.param_groups[0]["lr"] = LR * min(1.0, self.iterations / WARMUP)
            self._optimizer.step()
            self.iterations += 1

    @torch.no_grad()
    def _filter(self) -> None:
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        self._slow = self._slow or [gradient.clone() for gradient in gradients]
        amplify(gradients, self._slow, ALPHA, 1 - ALPHA, LAMBDA)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of the other half's equations whose result is the likeliest token."""
        right = sum(
            int(torch.count_nonzero(self._model(batch[:-1])[-1].argmax(-1) == batch[-1]))
            for batch in torch.split(self._valid, BATCH, dim=1)
        )
        return right / self._valid.shape[1]


@dataclass(frozen=True)
class Outcome:
    """Iterations to the target, or to the cap."""

    iterations: int
    reached: bool

    def __str__(self) -> str:
        return f"{'' if self.reached else '>= '}{self.iterations:,}"


def run(recipe: Recipe, seed: int, cap: int) -> Outcome:
    """Train until the target or the cap."""
    training = Training(recipe, seed)
    start_s = time.perf_counter()
    accuracy = 0.0
    while accuracy < TARGET and training.iterations < cap:
        training.epoch()
        accuracy = training.accuracy()
    outcome = Outcome(training.iterations, accuracy >= TARGET)
    seconds = time.perf_counter() - start_s
    print(f"{recipe.name:<38} seed {seed}: {outcome} ({accuracy:.1%}, {seconds:.0f} s)", file=sys.stderr, flush=True)
    return outcome


def main(arguments: argparse.Namespace) -> None:
    """Run, print the table and the JSON object."""
    torch.set_num_threads(arguments.threads)
    plan = [(GROKFAST, arguments.seeds), (SCALE_MATCHED, arguments.control_seeds)]
    plan += [(recipe, arguments.other_seeds) for recipe in OTHERS]
    table = {r: [run(r, seed, arguments.cap) for seed in range(seeds)] for r, seeds in plan if seeds}
    print(f"| iterations to {TARGET:.0%} | seeds, from 0 | median |\n| --- | --- | --- |")
    for recipe, outcomes in table.items():
        print(f"| {recipe.name} | {' / '.join(map(str, outcomes))} | {_median(outcomes):,.0f} |")
    ours, control = table[GROKFAST], table[SCALE_MATCHED]
    print_result(
        "grokking",
        _median(ours),
        _median(control),
        unit="iterations",
        ratio=_median(control) / _median(ours),
        runs=len(ours),
        seed_0=ours[0].iterations,
        yardstick_is_lower_bound=not all(outcome.reached for outcome in control),
    )


def _median(outcomes: list[Outcome]) -> float:
    return statistics.median(outcome.iterations for outcome in outcomes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Iterations to 95 % validation accuracy, Adam over GrokFast.")
    parser.add_argument("--seeds", type=int, default=5, help="of GrokFast")
    parser.add_argument("--control-seeds", type=int, default=5, help="of the scale-matched control")
    parser.add_argument("--other-seeds", type=int, default=1, help="of the other controls")
    parser.add_argument("--cap", type=int, default=3_000, help="iterations at which a run is given up")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.seeds < 1 or options.control_seeds < 1:
        parser.error("--seeds and --control-seeds must be at least 1")
    main(options)
