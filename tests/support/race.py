"""Publishers that race for the same names, each a process: python -m tests.support.race ORDER

Writes, as JSON, what became of each publisher in each round. Nothing that makes threads is used before the processes
part.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from tests.support.stored import Stored
from training_common.artifacts.blobs import ManifestExistsError

_AT_ONCE = 10


def _publish(stored: Stored, number: int, rounds: int, barrier: Barrier, told: Connection) -> None:
    blobs = stored.open()

    def race(version: int) -> str:
        try:
            blobs.put_manifest("cognate-25m", version, b"%d" % number * 10_000)
        except ManifestExistsError as error:
            return str(error)
        return "won"

    # Some rounds at once: the server under test lets some of those who lose a race wait for seconds.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        results: list[str] = []
        for first in range(1, rounds + 1, _AT_ONCE):
            barrier.wait()
            results += pool.map(race, range(first, min(first + _AT_ONCE, rounds + 1)))
    told.send(results)


def main(order: dict[str, Any]) -> None:
    """Run the race and print the results."""
    context = multiprocessing.get_context("fork")
    stored = Stored(**{**order["stored"], "files_dir": Path(order["stored"]["files_dir"])})
    barrier = context.Barrier(order["publishers"])
    ends = []
    for number in range(order["publishers"]):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (stored, number, order["rounds"], barrier, theirs)
        context.Process(target=_publish, args=arguments, daemon=True).start()
        ends.append(ours)
    print(json.dumps([end.recv() for end in ends]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
