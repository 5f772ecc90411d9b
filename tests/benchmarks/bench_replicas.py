"""Short jobs over three servers that share a PostgreSQL and are killed at random, with or without their workers.

Every job must succeed with the right result, exactly once. The value is jobs/s; the yardstick is the same without a
kill, with a tenth of the jobs.
Usage: python tests/benchmarks/bench_replicas.py [jobs]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.cognate_process import clean_up_on_sigterm
from tests.benchmarks.common import print_result
from tests.support.postgres import PostgresServer
from tests.support.replicas import Outcome, run_through_kills

REPLICAS = 3
TIMEOUT_S = 3600


def checked(outcome: Outcome, jobs: int) -> float:
    """Return jobs/s. Errors: AssertionError, when a job was lost or done twice, or an event."""
    if outcome.states != {"SUCCEEDED": jobs} or outcome.done_twice or outcome.wrong_result or outcome.gaps:
        raise AssertionError(str(outcome))
    return jobs / outcome.seconds


def main(jobs: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    server = PostgresServer()
    server.start()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-replicas-") as name:
            few, calm_folder, folder = max(1, jobs // 10), Path(name) / "calm", Path(name) / "killed"
            calm_folder.mkdir()
            folder.mkdir()
            calm = run_through_kills(
                calm_folder,
                server.new_database(),
                jobs=few,
                replicas=REPLICAS,
                seed=0,
                timeout_s=TIMEOUT_S,
                kills=False,
            )
            killed = run_through_kills(
                folder, server.new_database(), jobs=jobs, replicas=REPLICAS, seed=0, timeout_s=TIMEOUT_S
            )
    finally:
        server.stop()
    print_result(
        "replicas",
        checked(killed, jobs),
        checked(calm, few),
        unit="jobs/s",
        jobs=jobs,
        server_kills=killed.server_kills,
        worker_kills=killed.worker_kills,
        attempts=killed.attempts,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
