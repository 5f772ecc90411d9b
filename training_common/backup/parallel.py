"""Several files at a time: an object store takes its time to answer, and one file is hashed while another is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Beyond a few a disk gains nothing, and a bucket little.
_THREADS = 4
# What is taken from the items at once, so that any number of them takes no more memory.
_BATCH = 16 * _THREADS


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what `work` makes of each item, in their order. Its first error ends it."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="backup") as threads:
        while batch := list(itertools.islice(rest, _BATCH)):
            yield from threads.map(work, batch)
