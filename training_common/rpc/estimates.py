"""What a job is expected to need: memory by a formula, time by what was measured, cost by a price that was set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import sqlalchemy as sa

from cognateforge.job.v1 import job_pb2
from training_common.jobs.speed import speeds
from training_common.settings import PriceSettings


class Estimator:
    """Estimates jobs of one server."""

    def __init__(self, *, server: str, price: PriceSettings) -> None:
        self._server = server
        self._price = price

    def estimate(
        self, connection: sa.Connection, *, memory: Mapping[str, int], configuration: str, total_steps: int
    ) -> job_pb2.Estimate:
        """Return an estimate. memory: bytes of a worker's parts, none where there is no formula."""
        parts = [job_pb2.MemoryPart(name=name, size_bytes=size) for name, size in memory.items()]
        result = job_pb2.Estimate(memory_bytes=sum(memory.values()), memory=parts)
        measured = speeds(connection, configuration=configuration, server=self._server)
        if not measured:
            return result
        result.measured_attempts = len(measured)
        result.steps_per_s = statistics.median(measured)
        seconds = total_steps / result.steps_per_s
        result.run_time.FromMilliseconds(round(1000 * seconds))
        if self._price.worker_hour is not None:
            result.cost.amount = self._price.worker_hour * seconds / 3600
            result.cost.currency = self._price.currency
        return result
