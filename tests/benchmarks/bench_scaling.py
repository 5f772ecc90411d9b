"""What a second process brings to the training of Cognate-25M: two with one thread each against one with one thread.

Ours and the yardstick are tokens a second over the same global batches, in turn; `ratio` is the efficiency, ours over
twice the yardstick: 1 would be twice as fast. It says what a machine of two idle cores can do, and less on a busy one.
`work_ratio` is processor seconds alone over those of both together, which another process's load hardly moves: what the
second process costs in work, before any waiting. The efficiency of idle cores cannot be above it.
Usage: python tests/benchmarks/bench_scaling.py [steps of a run] [runs] [rows] [ddp or fsdp2]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cognate_server.data.stream import CognateTokenStream
from cognate_server.precision import native_precision
from cognate_server.run import PretrainConfig, PretrainingRun
from tests.benchmarks.common import interleave, print_result
from tests.benchmarks.trained import real_stream
from training_common.team import ALONE, Strategy, Team

PROCESSES, THREADS = 2, 1
SEQUENCE_LENGTH = 128
DEFAULTS = ("4", "5", "8", "ddp")


def measure(rank: int, folder: str, steps: int, runs: int, rows: int, strategy: str) -> None:
    """Train together and, in the first process, alone while the other one waits; print from the first."""
    torch.set_num_threads(THREADS)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(hours=1),
    )
    team = Team(rank=rank, size=PROCESSES, strategy=Strategy(strategy))
    config = PretrainConfig(
        seed=1,
        total_steps=100_000,
        batch_tokens=rows * SEQUENCE_LENGTH,
        sequence_length=SEQUENCE_LENGTH,
        precision=native_precision(),
    )

    def stream() -> CognateTokenStream:
        return real_stream("gsm8k", "hotpotqa", rows=rows, sequence_length=SEQUENCE_LENGTH)

    together = PretrainingRun(config, stream() if team.leads else None, team)
    alone = PretrainingRun(config, stream(), ALONE) if team.leads else None

    worked_s: dict[bool, list[float]] = {True: [], False: []}

    def tokens_per_s(run: PretrainingRun | None) -> float:
        dist.barrier()
        start_s, start_work_s = time.perf_counter(), time.process_time()
        if run is not None:
            for _ in range(steps):
                run.train_step(measure=False)
        taken_s = time.perf_counter() - start_s
        work_s = torch.tensor(time.process_time() - start_work_s if run is not None else 0.0)
        dist.all_reduce(work_s)
        worked_s[run is together].append(float(work_s))
        return steps * rows * SEQUENCE_LENGTH / taken_s

    pairs = interleave(lambda: tokens_per_s(together), lambda: tokens_per_s(alone), runs=runs)
    if team.leads:
        print_result(
            "scaling",
            statistics.median(ours for ours, _ in pairs),
            statistics.median(theirs for _, theirs in pairs),
            unit="tokens/s",
            ratio=statistics.median(ours / theirs / PROCESSES for ours, theirs in pairs),
            runs=runs,
            work_ratio=statistics.median(a / t for a, t in zip(worked_s[False][1:], worked_s[True][1:], strict=True)),
            processes=PROCESSES,
            threads=THREADS,
            batch_tokens=config.batch_tokens,
            strategy=strategy,
            precision=config.precision.value,
            cores=os.cpu_count(),
            load=round(os.getloadavg()[0], 1),
        )
    dist.destroy_process_group()


def main(given: list[str]) -> None:
    """Measure in two processes."""
    steps, runs, rows = (int(number) for number in given[:3])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, steps, runs, rows, given[3])
        mp.spawn(measure, arguments, nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main([*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]])
