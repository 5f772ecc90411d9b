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


class CognateResourceManager:
    """The capacity of Cognate's host. ADR-005: this service's own, the other one sees it through the exchange only."""

    def __init__(self, store: JobStore, settings: WorkerSettings) -> None:
        self.database = store.database
        self._store = store
        self._settings = settings

    def availability(self) -> Availability:
        """Measure now. Cores held are those that workers were given; memory is what their processes occupy."""
        cores = os.cpu_count() or 1
        counts = self._store.counts()
        running = sum(count for state, count in counts.items() if state in HELD)
        return Availability(
            cores=cores,
            cores_held=min(cores, running * (self._settings.threads or cores)),
            memory_bytes=psutil.virtual_memory().total,
            memory_held_bytes=sum(_resident_bytes(attempt.handle) for _, attempt in self._store.held()),
            running_jobs=running,
            queued_jobs=sum(count for state, count in counts.items() if state in WAITING),
        )


def _resident_bytes(handle: str) -> int:
    """Return what a worker occupies; 0 for one that ended meanwhile or has not registered yet."""
    try:
        resident: int = psutil.Process(int(handle.partition(":")[0])).memory_info().rss
    except (psutil.NoSuchProcess, ValueError):
        return 0
    return resident
