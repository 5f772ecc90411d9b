"""What a checkpoint costs the training of Cognate-25M: beside training against in its way.

The state is the real one: weights, both moments, the EMA, the carried memory. Ours and the yardstick are the seconds by
which a save lengthens the steps that follow it: a save and a number of steps, less as many steps without a save.
`call_s` and `yardstick_call_s` are the seconds of the call alone, in which no step can run.
Usage: python tests/benchmarks/bench_checkpoint.py [steps between checkpoints] [runs]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import cognate_server.migrations
from cognate_server.precision import native_precision
from cognate_server.run import PretrainConfig, PretrainingRun
from tests.benchmarks.common import interleave, report
from tests.benchmarks.trained import real_stream
from training_common.jobs.store import JobStore
from training_common.store.database import Database
from training_common.worker import WorkerAttempt

THREADS = 1
ROWS, SEQUENCE_LENGTH = 2, 64


def main(interval: int, runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    config = PretrainConfig(
        seed=1,
        total_steps=100_000,
        batch_tokens=ROWS * SEQUENCE_LENGTH,
        sequence_length=SEQUENCE_LENGTH,
        precision=native_precision(),
    )
    stream = real_stream("gsm8k", "hotpotqa", rows=ROWS, sequence_length=SEQUENCE_LENGTH)
    run = PretrainingRun(config, stream)
    with tempfile.TemporaryDirectory() as temporary:
        database = Database(f"sqlite:///{temporary}/jobs.db")
        database.upgrade(Path(cognate_server.migrations.__file__).parent)
        attempts = {background: _attempt(database, Path(temporary), background) for background in (True, False)}
        calls: dict[bool, list[float]] = {True: [], False: []}

        def steps() -> float:
            start_s = time.perf_counter()
            for _ in range(interval):
                run.train_step(measure=False)
            return time.perf_counter() - start_s

        def stall(background: bool) -> float:
            plain_s = steps()
            start_s = time.perf_counter()
            run.save(attempts[background], planned=True)
            calls[background].append(time.perf_counter() - start_s)
            steps()
            with_save_s = time.perf_counter() - start_s
            attempts[background].settle()
            return with_save_s - plain_s

        pairs = interleave(lambda: stall(True), lambda: stall(False), runs=runs)
        size_bytes = attempts[True].store.checkpoints()[0].size_bytes
        for attempt in attempts.values():
            attempt.close()
        database.close()
    report(
        "checkpoint",
        pairs,
        unit="s",
        call_s=statistics.median(calls[True][1:]),
        yardstick_call_s=statistics.median(calls[False][1:]),
        interval_steps=interval,
        size_bytes=size_bytes,
        threads=THREADS,
        precision=config.precision.value,
    )


def _attempt(database: Database, folder: Path, background: bool) -> WorkerAttempt:
    store = JobStore(database)
    with database.write() as connection:
        store.submit(connection, plan=b"", total_steps=100_000, caller="bench")
    job = store.begin_attempt("here")
    assert job is not None
    attempt = store.attempt(job.name, job.attempt, job.fencing_token)
    return WorkerAttempt(attempt, workdir=folder / str(background), saves_in_background=background)


if __name__ == "__main__":
    main(*(int(given) for given in sys.argv[1:]), *(20, 5)[len(sys.argv) - 1 :])
