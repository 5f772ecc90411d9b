"""What telemetry costs: a unary RPC with metrics and traces over one without, and a training step with its progress.

The RPC is GetJob on two real Cognate services of one build, called in turn: one tells nothing, the other is scraped
every five seconds and sends its metrics, and spans of the default share of calls, to a collector. `value` and
`yardstick` are the CPU times of the two servers' processes for a call, which a busy machine does not stretch as it does
the time that passes; the ratio of the rates of calls stands beside them. Two processes that do the same differ by a few
hundredths for as long as they live, so there are several pairs of them, and `rpc_ratio_error` is their standard error.

A step is one of Cognate-25M's pretraining. With telemetry it is measured, and its progress event, with every metric, is
written to a real store under a worker's fencing token, inside the attempt's span: at every step, as is the default of a
plan. Without, it is the step alone. Steps are taken in turn by one run, several pairs for each run of the bench, as
single ones differ by far more than what is looked for: `step_cpu_ratio` is where the pairs' ratios lie by the process's
CPU time, and with 95 % it is below `step_cpu_ratio_below`; `step_ratio` is the median by the time that passed.
Usage: python tests/benchmarks/bench_telemetry.py [runs]
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import cognate_server.migrations
from cognate_server.metrics import checked
from cognate_server.stream import Batch
from cognate_server.tracker import CognateProgressTracker
from cognate_server.trainer import PretrainingRun
from cognateforge.client import CognateClient
from tests.benchmarks.bench_train_step import CONFIG, THREADS, VOCABULARY, OneBatch
from tests.benchmarks.bench_unary_rpc import CALLS, make_driver, submit
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import center, interleave, print_result
from tests.support.otlp_sink import otlp_sink
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.settings import TelemetrySettings
from training_common.store.database import Database
from training_common.telemetry.attempt_trace import AttemptTrace
from training_common.telemetry.spans import Tracer
from training_common.worker import WorkerAttempt

# More often than Prometheus is usually told to, so that a short run has some.
SCRAPE_EVERY_S = 5.0
# Pairs of servers.
PROCESSES = 8
# Pairs of steps for each pair of RPC measurements.
STEP_PAIRS = 4


@dataclass(frozen=True)
class Cost:
    """What something took: CPU seconds, and seconds that passed."""

    cpu_s: float
    wall_s: float


@contextmanager
def scraped(admin: str) -> Iterator[None]:
    """Scrape a socket's /metrics now and then, as Prometheus does."""
    ended = threading.Event()

    async def scrape() -> None:
        reader, writer = await asyncio.open_unix_connection(admin)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        if not (await reader.read()).startswith(b"HTTP/1.1 200"):
            raise AssertionError("the scrape was refused")
        writer.close()

    def run() -> None:
        while not ended.wait(SCRAPE_EVERY_S):
            asyncio.run(scrape())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def server_process(data_dir: Path) -> psutil.Process:
    """Return the service's process over a folder."""
    found = [child for child in psutil.Process().children() if str(data_dir) in child.environ().values()]
    return found[0]


def cpu_of(process: psutil.Process, drive: Callable[[], float], rates: list[float]) -> Callable[[], float]:
    """Return a function that drives the calls and returns the server's CPU seconds for one."""

    def measured() -> float:
        before = process.cpu_times()
        rates.append(drive())
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / CALLS

    return measured


def rpc(folder: Path, endpoint: str, runs: int) -> dict[str, float]:
    """Return what a call costs with and without telemetry, over pairs of new servers."""
    unbounded = {"COGNATE_SERVER_LIMITS__CALLER_CALLS_PER_S": "0"}
    rates: dict[str, list[float]] = {"telling": [], "silent": []}
    costs = []
    for number in range(PROCESSES):
        admin = str(folder / f"admin-{number}")
        told = {
            "COGNATE_SERVER_TELEMETRY__ADDRESS": f"unix:{admin}",
            "COGNATE_SERVER_TELEMETRY__OTLP_ENDPOINT": endpoint,
        }
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner())
            measures = []
            for name, settings in (("telling", {**told, **unbounded}), ("silent", unbounded)):
                data_dir = folder / f"{name}-{number}"
                address = stack.enter_context(cognate_process(data_dir, None, **settings))
                with CognateClient(address) as client:
                    request, answer = submit(client)
                drive = make_driver(runner, address, None, request, answer)
                measures.append(cpu_of(server_process(data_dir), drive, rates[name]))
            with scraped(admin):
                pairs = interleave(*measures, runs=max(2, runs // PROCESSES))
        costs.append([statistics.median(one) for one in zip(*pairs, strict=True)])
    ratios = [telling / silent for telling, silent in costs]
    return {
        "telling_cpu_s": statistics.mean(telling for telling, _ in costs),
        "silent_cpu_s": statistics.mean(silent for _, silent in costs),
        "rpc_ratio_error": statistics.stdev(ratios) / math.sqrt(len(ratios)),
        "rpc_rate_ratio": statistics.median(rates["telling"]) / statistics.median(rates["silent"]),
    }


def step(folder: Path, endpoint: str, runs: int) -> dict[str, float]:
    """Return what a training step costs with and without its progress being told."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    batch = Batch(tokens=torch.randint(0, VOCABULARY, (CONFIG.rows, CONFIG.sequence_length + 1)))
    run = PretrainingRun(CONFIG, OneBatch(batch))
    tracker = CognateProgressTracker(
        CONFIG.model, total_steps=CONFIG.total_steps, batch_tokens=CONFIG.batch_tokens, step=0, peak_flops_per_s=1e12
    )
    database = Database(f"sqlite:///{folder / 'store.db'}")
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    store = JobStore(database)
    with database.write() as connection:
        store.submit(connection, plan=b"", total_steps=CONFIG.total_steps, caller="bench")
    job = store.begin_attempt("bench")
    assert job is not None
    tracer = Tracer(TelemetrySettings(otlp_endpoint=endpoint), service="bench", instance="bench")
    trace = AttemptTrace(tracer)
    attempt_store = store.attempt(job.name, job.attempt, job.fencing_token)
    attempt = WorkerAttempt(attempt_store, workdir=folder / "work", trace=trace)

    def plain() -> Cost:
        return timed(lambda: run.train_step(measure=False))

    def told() -> Cost:
        return timed(tell)

    def tell() -> None:
        outcome = run.train_step(measure=True)
        tracker.count(outcome)
        metrics = tracker.step_metrics(outcome, run.optimizer.report, step=run.step, learning_rate=run.next_lr)
        attempt.progress(step=run.step, total_steps=CONFIG.total_steps, metrics=checked(metrics))

    def timed(work: Callable[[], object]) -> Cost:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        work()
        return Cost(time.process_time() - cpu_s, time.perf_counter() - wall_s)

    with contextlib.ExitStack() as stack:
        stack.callback(database.close)
        stack.callback(tracer.close)
        stack.enter_context(trace.of(attempt_store, rank="0"))
        attempt.move(JobState.RUNNING)
        pairs = interleave(told, plain, runs=runs * STEP_PAIRS)
    ratio, below = center([with_it.cpu_s / alone.cpu_s for with_it, alone in pairs])
    return {
        "step_s": statistics.median(alone.wall_s for _, alone in pairs),
        "step_cpu_ratio": ratio,
        "step_cpu_ratio_below": below,
        "step_ratio": statistics.median(with_it.wall_s / alone.wall_s for with_it, alone in pairs),
    }


def main(runs: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-telemetry-") as name, otlp_sink() as sink:
        folder = Path(name)
        calls = rpc(folder, sink.endpoint, runs)
        (folder / "step").mkdir()
        steps = step(folder / "step", sink.endpoint, runs)
        beside = {key: round(value, 4) for key, value in {**calls, **steps}.items() if not key.endswith("_cpu_s")}
        spans = len(sink.spans)
    print_result(
        "telemetry",
        calls["telling_cpu_s"],
        calls["silent_cpu_s"],
        unit="CPU s/call",
        runs=runs,
        spans_received=spans,
        **beside,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
