"""A run of Cognate-25M twice, and once cut at a random step and resumed: the bits, and what the cut costs in time.

On real rows in equal parts, in the precision that a job gets here. The ratio is the wall time of both parts of the cut
run, pause checkpoint, restart of the run and restore included, over that of the first uninterrupted run. Ends with
status 1 when any bit of the weights or any reported loss differs.
Usage: python tests/benchmarks/bench_resume.py [steps] [seed of the cut]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from cognate_server.precision import native_precision
from cognate_server.trainer import PretrainConfig, PretrainResult, pretrain
from tests.benchmarks.common import print_result
from tests.benchmarks.trained import real_stream
from tests.cognate._support import MemoryAttempt, weights
from training_common.attempt import AttemptStopped, StopKind

THREADS = 2
ROWS, SEQUENCE_LENGTH = 2, 64


def run(config: PretrainConfig, folder: Path, *, pause_at: int | None = None) -> tuple[PretrainResult | None, float]:
    """Train to the end or to the pause; return the result, None when paused, and the seconds."""
    stream = real_stream("gsm8k", "hotpotqa", rows=ROWS, sequence_length=SEQUENCE_LENGTH)
    attempt = MemoryAttempt(folder, stop=None if pause_at is None else (pause_at + 1, StopKind.PAUSE))
    start_s = time.perf_counter()
    result = None
    try:
        result = pretrain(config, stream, attempt)
    except AttemptStopped:
        if attempt.saved[-1:] != [pause_at]:
            raise
    return result, time.perf_counter() - start_s


def main(steps: int, seed: int) -> int:
    """Run, compare and print; return the exit status."""
    torch.set_num_threads(THREADS)
    config = PretrainConfig(
        seed=1,
        total_steps=steps,
        batch_tokens=ROWS * SEQUENCE_LENGTH,
        sequence_length=SEQUENCE_LENGTH,
        warmup_steps=max(1, steps // 10),
        precision=native_precision(),
    )
    pause_at = int(torch.randint(1, steps, (1,), generator=torch.Generator().manual_seed(seed)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, first_s = run(config, folder / "first")
        again, _ = run(config, folder / "again")
        _, before_s = run(config, folder / "cut", pause_at=pause_at)
        resumed, after_s = run(config, folder / "cut")
        assert first is not None
        assert again is not None
        assert resumed is not None
        same = {
            name: weights(one) == weights(first) and one.validation == first.validation
            for name, one in (("again", again), ("resumed", resumed))
        }
    print_result(
        "resume",
        before_s + after_s,
        first_s,
        unit="s",
        equal_again=same["again"],
        equal_resumed=same["resumed"],
        cut_at_step=pause_at,
        steps=steps,
        precision=config.precision.value,
    )
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*(int(given) for given in sys.argv[1:]), *(200, 1)[len(sys.argv) - 1 :]))
