"""Events lost and doubled over 10,000 forced disconnects of WatchJob and WatchModels.

A real Cognate service in a process of its own; sync and asyncio watchers in this one, each behind a proxy that resets
its connection behind every few events, or at a random byte; both histories grow meanwhile.
Usage: python tests/benchmarks/bench_watch_cuts.py [cuts]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.cognate_process import clean_up_on_sigterm
from tests.benchmarks.common import print_result
from tests.support.cuts import watch_through_cuts


def main(cuts: int) -> None:
    """Measure and print. The yardstick is one event for each cut: what a watch gains between two of them at least."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-watch-cuts-") as name:
        result = watch_through_cuts(Path(name), cuts=cuts)
    print_result("watch_cuts", result.lost + result.doubled, result.cuts, unit="events", **asdict(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
