"""Jobs that come at random, wait for free slots, train and leave: as a simulation, and as theory where there is one.

A job that does not fit yet holds the place for itself, and those behind it wait: so does the scheduler's queue.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import simpy

# Jobs that come before anything is counted, as a share of those that are.
WARM_UP = 0.2
# Parts of a course whose means are taken as independent.
BATCHES = 10


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When jobs come and how long they hold their slots, in seconds. Draws are from the random numbers given."""

    between_s: Callable[[random.Random], float]
    holds_s: Callable[[random.Random], float]
    slots: int = 1


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a simulation has seen. waits_s: of every counted job, in the order of their starts."""

    waits_s: Sequence[float]
    sojourns_s: Sequence[float]
    seconds: float
    # Time for which so many jobs had slots, and so many were in the system.
    running_s: dict[int, float]
    present_s: dict[int, float]

    @property
    def mean_wait_s(self) -> float:
        """Return the mean wait for slots."""
        return math.fsum(self.waits_s) / len(self.waits_s)

    @property
    def wait_error_s(self) -> float:
        """Return the standard error of the mean wait, by the means of batches: waits of neighbours are alike."""
        length = len(self.waits_s) // BATCHES
        means = [math.fsum(self.waits_s[n * length : (n + 1) * length]) / length for n in range(BATCHES)]
        return statistics.stdev(means) / math.sqrt(BATCHES)

    @property
    def arrival_rate(self) -> float:
        """Return jobs a second."""
        return len(self.waits_s) / self.seconds

    def mean_running(self) -> float:
        """Return how many jobs had slots, mean over time."""
        return _mean(self.running_s)

    def mean_present(self) -> float:
        """Return how many jobs waited or ran, mean over time."""
        return _mean(self.present_s)

    def running_quantile(self, share: float) -> int:
        """Return a number of running jobs that was not exceeded for this share of the time."""
        return _quantile(self.running_s, share)

    def wait_quantile_s(self, share: float) -> float:
        """Return a wait that this share of the jobs did not exceed."""
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def simulate(arrivals: Arrivals, *, slots: int, jobs: int, seed: int) -> Course:
    """Let so many jobs come after a warm-up, and return what became of them."""
    chance = random.Random(seed)  # noqa: S311 - of arrivals, guards nothing
    # Until the slots have been taken a few times over.
    warm = max(round(WARM_UP * jobs), 5 * (slots // arrivals.slots))

    def draws() -> Iterator[tuple[float, float]]:
        for _ in range(warm + jobs):
            yield arrivals.between_s(chance), arrivals.holds_s(chance)

    return follow(list(draws()), slots=slots, job_slots=arrivals.slots, warm=warm)


def follow(jobs: Sequence[tuple[float, float]], *, slots: int, job_slots: int = 1, warm: int = 0) -> Course:
    """Simulate jobs of which the seconds between arrivals and on their slots are known. warm: so many do not count."""
    if job_slots > slots:
        raise ValueError(f"a job of {job_slots} slots has no place among {slots}")
    clock = simpy.Environment()
    free = simpy.Container(clock, capacity=slots, init=slots)
    waits: list[float] = []
    sojourns: list[float] = []
    running, present = _Counter(clock), _Counter(clock)
    begun = 0.0

    def job(number: int, holds_s: float) -> Generator[Any, Any, None]:
        came = clock.now
        present.change(1)
        yield free.get(job_slots)
        began = clock.now
        running.change(1)
        if number >= warm:
            waits.append(began - came)
        yield clock.timeout(holds_s)
        running.change(-1)
        present.change(-1)
        free.put(job_slots)
        if number >= warm:
            sojourns.append(clock.now - came)

    def source() -> Generator[Any, Any, None]:
        nonlocal begun
        for number, (between_s, holds_s) in enumerate(jobs):
            yield clock.timeout(between_s)
            if number == warm:
                begun = clock.now
                running.reset()
                present.reset()
            clock.process(job(number, holds_s))
        # What comes after the last arrival is no steady state.
        running.stop()
        present.stop()

    ended = clock.process(source())
    clock.run(until=ended)
    last_s = float(clock.now)
    clock.run()
    return Course(
        waits_s=waits,
        sojourns_s=sojourns,
        seconds=last_s - begun,
        running_s=running.seconds,
        present_s=present.seconds,
    )


class _Counter:
    """For how long a number had which value."""

    def __init__(self, clock: simpy.Environment) -> None:
        self._clock = clock
        self._value, self._since, self._stopped = 0, 0.0, False
        self.seconds: dict[int, float] = {}

    def change(self, by: int) -> None:
        self._count()
        self._value += by

    def reset(self) -> None:
        """Forget what was, but for the value."""
        self._count()
        self.seconds.clear()

    def stop(self) -> None:
        self._count()
        self._stopped = True

    def _count(self) -> None:
        now = self._clock.now
        if not self._stopped and now > self._since:
            self.seconds[self._value] = self.seconds.get(self._value, 0.0) + now - self._since
        self._since = now


def _mean(seconds: dict[int, float]) -> float:
    total = math.fsum(seconds.values())
    return math.fsum(value * time for value, time in seconds.items()) / total if total else 0.0


def _quantile(seconds: dict[int, float], share: float) -> int:
    left = share * math.fsum(seconds.values())
    for value in sorted(seconds):
        left -= seconds[value]
        if left <= 0:
            return value
    return max(seconds, default=0)


def erlang_c(servers: int, offered: float) -> float:
    """Return the share of jobs that wait in M/M/c. offered: arrival rate times mean time of service, below `servers`.

    Source: by Erlang B's recursion B(n) = a B(n-1) / (n + a B(n-1)), and C = B / (1 - (a/c)(1 - B)).
    """
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def mean_wait_s(servers: int, *, rate: float, service_s: float) -> float:
    """Return the mean wait of M/M/c in seconds, by Erlang C. rate: jobs a second."""
    offered = rate * service_s
    if offered >= servers:
        return math.inf
    return erlang_c(servers, offered) * service_s / (servers - offered)


def between_of(moments_s: Sequence[float]) -> list[float]:
    """Return the seconds between moments, the first counted from 0."""
    return [later - earlier for earlier, later in pairwise([0.0, *moments_s])]
