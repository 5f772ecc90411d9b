"""What this host has, and what of it Cognate's jobs hold."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from training_common.jobs.states import HELD, WAITING
from training_common.jobs.store import JobStore
from training_common.settings import WorkerSettings


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Processor cores and memory of this host, and how many jobs use or want them."""

    cores: int
    cores_held: int
    memory_bytes: int
    memory_held_bytes: int
    running_jobs: int
    queued_jobs: int


def measure(store: JobStore, settings: WorkerSettings) -> Availability:
    """Measure now. Cores that are held are those that workers were given; memory is what their processes occupy."""
    cores = os.cpu_count() or 1
    counts = store.counts()
    running = sum(count for state, count in counts.items() if state in HELD)
    occupied = 0
    for _, attempt in store.held():
        try:
            occupied += psutil.Process(int(attempt.handle.partition(":")[0])).memory_info().rss
        except (psutil.NoSuchProcess, ValueError):
            continue  # it ended meanwhile, or has not registered yet
    return Availability(
        cores=cores,
        cores_held=min(cores, running * (settings.threads or cores)),
        memory_bytes=psutil.virtual_memory().total,
        memory_held_bytes=occupied,
        running_jobs=running,
        queued_jobs=sum(count for state, count in counts.items() if state in WAITING),
    )
