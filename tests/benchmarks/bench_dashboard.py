"""First paint and update latency of the dashboard, with 1,000 jobs and a job of 100,000 steps.

The service, the dashboard and a headless Chromium are processes of their own; there is no agent service. The store is
filled without training. Milliseconds until something is drawn count from the browser's navigation start. An update's
latency is the time from the end of the transaction that records a step, as a worker's, until the plot of the open page
has it. The yardstick is the service's interval of looking for new events: half of it is the least that a watch waits
on average.
Usage: python tests/benchmarks/bench_dashboard.py [jobs] [steps] [updates]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cognateforge.client import CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result
from tests.dashboard.browser import Browser, chromium
from tests.support.stage import begin, pretraining, seeded_series, tell
from training_common.jobs.hub import POLL_INTERVAL_S
from training_common.jobs.store import AttemptStore, JobStore
from training_common.store.database import Database

LOADS = 5
# So far apart that one is drawn before the next is recorded.
UPDATES_APART_S = 1.5
_DRAWN = """
const [selector, words, done] = arguments;
const look = () => {
  const found = document.querySelector(selector);
  const text = found && `${found.getAttribute("aria-label")} ${found.innerText}`;
  if (text && text.includes(words)) requestAnimationFrame(() => done(performance.now()));
  else setTimeout(look, 5);
};
look();
"""
_WATCH = """
window.seen = {};
new MutationObserver(() => {
  const step = / to ([\\d,]+),/.exec(document.querySelector(".plot").getAttribute("aria-label"));
  if (step) window.seen[step[1].replaceAll(",", "")] ??= Date.now() / 1000;
}).observe(document.querySelector(".plot"), { attributes: true });
"""


def fill(store: JobStore, jobs: int, steps: int) -> AttemptStore:
    """Store a running job of so many steps, and others that wait. Returns the worker's hand on it."""
    plan = pretraining(steps + 1000)
    with store.database.write() as connection:
        for _ in range(jobs):
            store.submit(connection, plan=plan.SerializeToString(), total_steps=plan.total_steps, caller="bench")
    attempt = begin(store)
    seeded_series(store, attempt.job.name, steps)
    return attempt


@contextmanager
def dashboard(address: str) -> Iterator[str]:
    """Yield the address of a dashboard in a process of its own."""
    options = ["--cognate", address, "--agent-server", "127.0.0.1:9", "--port", "0", "--json"]
    command = [sys.executable, "-m", "cognateforge.cli", "dashboard", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


def load(browser: Browser, url: str, selector: str, words: str) -> tuple[float, float]:
    """Open a page, and return the milliseconds until its first paint and until it shows the words."""
    browser.open("about:blank")
    browser.open(url)
    drawn_ms: float = browser.driver.execute_async_script(_DRAWN, selector, words)
    paint_ms: float = browser.js("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? -1")
    return paint_ms, drawn_ms


def updates(browser: Browser, attempt: AttemptStore, first: int, count: int) -> list[float]:
    """Record steps, and return each one's latency in milliseconds."""
    browser.js(_WATCH)
    recorded: dict[int, float] = {}
    for step in range(first, first + count):
        tell(attempt, step, first + 1000, {"loss": 3.0, "learning_rate": 1e-4})
        recorded[step] = time.time()
        time.sleep(UPDATES_APART_S)
    seen = browser.js("return window.seen")
    return [(seen[str(step)] - recorded[step]) * 1000 for step in recorded]


def main(jobs: int, steps: int, count: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-dashboard-") as name:
        folder = Path(name)
        with cognate_process(folder / "cognate", COGNATE_SERVER_WORKERS__LOST_AFTER_S="3600") as address:
            store = JobStore(Database(f"sqlite:///{folder / 'cognate' / 'store.db'}"))
            attempt = fill(store, jobs, steps)
            with CognateClient(address, timeout_s=60) as client:
                began = time.monotonic()
                client.pretraining.GetMetrics(pb.GetMetricsRequest(name=attempt.job.name, max_points=1600))
                metrics_ms = (time.monotonic() - began) * 1000
            with dashboard(address) as url:
                browser = chromium(folder / "profile")
                try:
                    job = f"{url}jobs/cognate/{attempt.job.name.removeprefix('jobs/')}"
                    _, history_ms = load(browser, job, ".timeline", "submitted")  # its past is read once
                    overview = [load(browser, url, "main", "Newest jobs") for _ in range(LOADS)]
                    listed = [load(browser, f"{url}jobs", "main table", "cognate-25m") for _ in range(LOADS)]
                    page = [load(browser, job, ".plot", "steps 1 to") for _ in range(LOADS)]
                    latencies = updates(browser, attempt, steps + 1, count)
                finally:
                    browser.driver.quit()
            store.database.close()
    middle = {
        f"{what}_ms": round(statistics.median(row[part] for row in rows))
        for what, rows, part in (
            ("first_paint", page, 0),
            ("overview", overview, 1),
            ("job_list", listed, 1),
            ("job_curves", page, 1),
        )
    }
    print_result(
        "dashboard",
        statistics.median(latencies),
        POLL_INTERVAL_S * 1000,
        unit="ms",
        runs=count,
        p90_ms=statistics.quantiles(latencies, n=10)[8],
        get_metrics_ms=round(metrics_ms),
        job_first_history_ms=round(history_ms),
        jobs=jobs,
        steps=steps,
        **middle,
    )


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*given, *(1000, 100_000, 20)[len(given) :])
