"""Validation loss of GrokFast over that of plain AdamW, each at its best learning rate, at equal tokens and start.

Cognate-25M from one seed on GSM8K and HotpotQA in equal parts. At every learning rate both are trained in lockstep on
the same batches with the same schedule and clipping; the lowest final loss of each side counts, so neither gets the
other's rate. `--plot FILE` draws all curves (needs matplotlib: pip install -e '.[plots]').
Usage: python tests/benchmarks/bench_grokfast_control.py [--steps N] [--rates RATE ...] [--plot FILE]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cognate_server.acceleration import Curve
from cognate_server.precision import native_precision
from cognate_server.run import PretrainConfig, PretrainingRun
from cognate_server.validation import RowLosses, first_rows, row_losses
from tests.benchmarks.common import print_result
from tests.benchmarks.trained import real_stream

ROWS, SEQUENCE_LENGTH = 4, 128
VALIDATION_ROWS = 64
VALIDATIONS = 10
RATES = (0.4e-3, 0.75e-3, 1.5e-3)


@dataclass(frozen=True)
class Arm:
    """One training: its curve of (step, validation loss in nats per token), and the last validation's rows."""

    name: str
    rate: float
    curve: Curve
    rows: RowLosses

    @property
    def loss(self) -> float:
        """The final validation loss."""
        return self.curve[-1][1]


def train_pair(rate: float, steps: int, seed: int) -> tuple[Arm, Arm]:
    """Train GrokFast and the control at one learning rate."""
    stream = real_stream("gsm8k", "hotpotqa", rows=ROWS, sequence_length=SEQUENCE_LENGTH)
    batches = first_rows(stream.validation_batches(), VALIDATION_ROWS)
    config = PretrainConfig(
        seed=seed,
        total_steps=steps,
        batch_tokens=ROWS * SEQUENCE_LENGTH,
        sequence_length=SEQUENCE_LENGTH,
        peak_lr=rate,
        warmup_steps=max(1, steps // 10),
        precision=native_precision(),
        control_rates=(1.0,),
    )
    run = PretrainingRun(config, stream)
    assert run.control is not None
    [control] = run.control.models
    curves: dict[str, list[tuple[int, float]]] = {"GrokFast": [], "AdamW": []}
    while run.step < steps:
        run.train_step(measure=False)
        if run.step % max(1, steps // VALIDATIONS) == 0 or run.step == steps:
            for name, model in (("GrokFast", run.model), ("AdamW", control)):
                curves[name].append((run.step, row_losses(model, batches).mean))
            losses = ", ".join(f"{name} {curve[-1][1]:.4f}" for name, curve in curves.items())
            print(f"rate {rate:g}, step {run.step}/{steps}: {losses}", file=sys.stderr, flush=True)
    return (
        Arm("GrokFast", rate, curves["GrokFast"], row_losses(run.model, batches)),
        Arm("AdamW", rate, curves["AdamW"], row_losses(control, batches)),
    )


def plot(arms: list[Arm], file: Path) -> None:
    """Draw every curve: one colour for each learning rate, dashes for the control."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    colours = {rate: f"C{index}" for index, rate in enumerate(sorted({arm.rate for arm in arms}))}
    for arm in arms:
        steps, losses = zip(*arm.curve, strict=True)
        style = "-" if arm.name == "GrokFast" else "--"
        axes.plot(steps, losses, style, color=colours[arm.rate], label=f"{arm.name}, {arm.rate:g}")
    axes.set_xlabel(f"steps of {ROWS * SEQUENCE_LENGTH:,} tokens")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("Cognate-25M on GSM8K and HotpotQA: GrokFast and AdamW by peak learning rate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(arguments: argparse.Namespace) -> None:
    """Train all arms, print the table and the JSON object."""
    torch.set_num_threads(arguments.threads)
    arms = [arm for rate in arguments.rates for arm in train_pair(rate, arguments.steps, arguments.seed)]
    print("| optimizer | peak rate | " + " | ".join(f"step {step}" for step, _ in arms[0].curve) + " |")
    print("| --- " * (2 + len(arms[0].curve)) + "|")
    for arm in sorted(arms, key=lambda one: (one.name, one.rate)):
        print(f"| {arm.name} | {arm.rate:g} | " + " | ".join(f"{loss:.3f}" for _, loss in arm.curve) + " |")
    if arguments.plot is not None:
        plot(arms, arguments.plot)
    ours, theirs = (
        min((arm for arm in arms if arm.name == name), key=lambda one: one.loss) for name in ("GrokFast", "AdamW")
    )
    print_result(
        "grokfast_control",
        ours.loss,
        theirs.loss,
        unit="nats/token",
        runs=len(arms),
        rate=ours.rate,
        rate_of_control=theirs.rate,
        gain_nats=theirs.loss - ours.loss,
        error_of_gain=ours.rows.error_of_gain(theirs.rows),
        training_steps=arguments.steps,
        curves=[{"name": arm.name, "rate": arm.rate, "curve": arm.curve} for arm in arms],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GrokFast against plain AdamW, each at its best learning rate.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak learning rates of both sides")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="an image file for the curves")
    options = parser.parse_args()
    if options.steps < VALIDATIONS:
        parser.error(f"--steps must be at least {VALIDATIONS}")
    main(options)
