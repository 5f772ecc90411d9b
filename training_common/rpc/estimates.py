"""What a job is expected to need: memory by a formula, time by what was measured, cost by a price that was set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from cognateforge.job.v1 import job_pb2
from training_common.jobs.speed import speeds
from training_common.settings import OfferSettings, PriceSettings

# The part that only the first process of a job holds.
_FIRST_ALONE = "checkpoint_copy"


class Estimator:
    """Estimates jobs of one server. gpus: how many a worker takes."""

    def __init__(self, *, server: str, price: PriceSettings, gpus: int = 0) -> None:
        self._server = server
        self._price = price
        self._gpus = gpus

    def estimate(
        self,
        connection: sa.Connection,
        *,
        memory: Mapping[str, int],
        configuration: str,
        total_steps: int,
        processes: int = 1,
    ) -> job_pb2.Estimate:
        """Return an estimate. memory: bytes of the parts of the first process, none where there is no formula."""
        parts = [job_pb2.MemoryPart(name=name, size_bytes=size) for name, size in memory.items()]
        result = job_pb2.Estimate(memory_bytes=sum(memory.values()), memory=parts)
        measured = speeds(connection, configuration=configuration, server=self._server)
        if not measured:
            return result
        result.measured_attempts = len(measured)
        result.steps_per_s = statistics.median(measured)
        seconds = total_steps / result.steps_per_s
        result.run_time.FromMilliseconds(round(1000 * seconds))
        need = need_of(memory, processes=processes, gpus=self._gpus * processes)
        for spot, field in ((False, result.cost), (True, result.spot_cost)):
            choice = cheapest(self._price, need, spot=spot)
            if choice is not None:
                field.amount = choice.hour * seconds / 3600
                field.currency, field.offer = self._price.currency, choice.offer
        return result


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a job takes in all. memory_bytes: 0 where nobody knows."""

    memory_bytes: int
    processes: int
    gpus: int = 0


def need_of(memory: Mapping[str, int], *, processes: int, gpus: int) -> Need:
    """Return what a job takes whose first process has these parts of memory."""
    first = sum(memory.values())
    others = (processes - 1) * (first - memory.get(_FIRST_ALONE, 0))
    return Need(memory_bytes=first + others, processes=processes, gpus=gpus)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a job costs least. offer: "" for this server. hour: price of an hour of this server's speed."""

    offer: str
    hour: float


def cheapest(price: PriceSettings, need: Need, *, spot: bool) -> Choice | None:
    """Return where a job costs least, or None where nothing that fits has such a price.

    An offer fits that has the memory, a core for each process, and the graphics processors. Of a job whose memory
    nobody knows, no offer can be said to fit. This server's workers have no spot price.
    """
    choices = []
    if price.worker_hour is not None and not spot:
        choices.append(Choice(offer="", hour=price.worker_hour * need.processes))
    for name, offer in price.offers.items():
        fits = offer.memory_bytes >= need.memory_bytes > 0 and offer.cores >= need.processes and offer.gpus >= need.gpus
        hour = _hour(price, offer, spot=spot) if fits else None
        if hour is not None:
            choices.append(Choice(offer=name, hour=hour / offer.speed))
    return min(choices, key=lambda choice: (choice.hour, choice.offer), default=None)


def _hour(price: PriceSettings, offer: OfferSettings, *, spot: bool) -> float | None:
    if offer.hour is not None:
        return offer.hour.spot if spot else offer.hour.on_demand
    total, kinds = 0.0, price.kinds
    for amount, prices in (
        (offer.cores, kinds.core),
        (offer.memory_bytes / 2**30, kinds.memory_gib),
        (offer.gpus, kinds.gpu),
    ):
        hour = prices.spot if spot else prices.on_demand
        if amount and hour is None:
            return None
        total += amount * (hour or 0.0)
    return total
