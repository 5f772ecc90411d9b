"""Metrics over steps: what a long job's series keep, and that reading them takes no memory by its length."""

import itertools
import tracemalloc

import pytest

from cognateforge.job.v1 import job_pb2
from training_common.rpc.series import MAX_POINTS, SeriesBuilder


def built(steps: range, *names: str, every: int = 1) -> list[job_pb2.MetricSeries]:
    builder = SeriesBuilder(())
    for step in steps:
        builder.add({"step": step, "metrics": dict.fromkeys(names, step / 2)})
        if step % every == 0:
            builder.add({"step": step, "metrics": {"rare": float(step)}})
    return builder.series({"loss": "nats"})


def test_a_short_series_is_told_in_whole() -> None:
    """Every step with its value and the metric's unit; what is measured now and then has its own steps."""
    loss, rare = built(range(1, 101), "loss", every=10)
    assert ("loss", "nats", list(range(1, 101))) == (loss.name, loss.unit, list(loss.steps))
    assert [step / 2 for step in loss.steps] == list(loss.values)
    assert list(range(10, 101, 10)) == list(rare.steps)


def test_of_two_values_at_a_step_the_newer_one_counts() -> None:
    """After a lost worker its steps are trained again; histograms and metrics that were not asked for are left out."""
    builder = SeriesBuilder(["loss"])
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0)):
        builder.add({"step": step, "metrics": {"loss": value, "other": 1.0, "bins": [1.0, 2.0]}})
    [loss] = builder.series({})
    assert [(1, 1.0), (2, 20.0), (3, 30.0)] == list(zip(loss.steps, loss.values, strict=True))


def test_a_long_series_is_thinned_evenly_and_ends_at_the_last_step() -> None:
    """The contract's bound, ascending steps, true values, and no part of the job that is told much more coarsely."""
    steps = range(1, 200_001)
    [loss, rare] = built(steps, "loss", every=1000)
    assert MAX_POINTS == len(loss.steps)
    assert sorted(set(loss.steps)) == list(loss.steps)
    assert [step / 2 for step in loss.steps] == list(loss.values)
    assert (1, 200_000) == (loss.steps[0], loss.steps[-1])
    gaps = [after - before for before, after in itertools.pairwise(loss.steps)]
    # Two points, the extremes, stand for a part; at most a part lies between the nearest two of neighbours.
    assert max(gaps) <= 4 * 200_000 / MAX_POINTS
    assert list(range(1000, 200_001, 1000)) == list(rare.steps)


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 2), (3, 2), (4, 4), (500, 500), (0, 1000)])
def test_a_caller_gets_no_more_points_than_it_asks_for(most: int, count: int) -> None:
    """max_points of GetMetricsRequest: the last point always, and from two on the first."""
    builder = SeriesBuilder((), most)
    for step in range(1, 1001):
        builder.add({"step": step, "metrics": {"loss": float(step % 7)}})
    [loss] = builder.series({})
    assert count == len(loss.steps)
    assert loss.steps[-1] == 1000
    assert loss.steps[0] == (1 if most != 1 else 1000)


@pytest.mark.parametrize("count", [5_000, 300_000])
def test_thinning_keeps_what_stands_out(count: int) -> None:
    """One step of very many that is too high or too low is in the answer, at its own step."""
    builder = SeriesBuilder((), 100)
    spikes = {count // 3: 99.0, count // 2: -99.0}
    for step in range(count):
        builder.add({"step": step, "metrics": {"loss": spikes.get(step, step % 10 / 10)}})
    [loss] = builder.series({})
    assert len(loss.steps) <= 100
    assert (0, count - 1) == (loss.steps[0], loss.steps[-1])
    assert set(spikes.items()) <= set(zip(loss.steps, loss.values, strict=True))


def test_a_spike_that_was_trained_away_is_gone() -> None:
    """A long job that goes back to a checkpoint: nothing of the steps that it did again is left."""
    builder = SeriesBuilder((), 1_000)
    for step in range(100_000):
        builder.add({"step": step, "metrics": {"loss": 50.0 if step >= 90_000 else 1.0}})
    for step in range(90_000, 100_000):
        builder.add({"step": step, "metrics": {"loss": 1.0}})
    [loss] = builder.series({})
    assert {1.0} == set(loss.values)


def test_all_series_together_are_a_message_that_a_client_takes() -> None:
    """gRPC's default is 4 MiB."""
    names = [f"metric_{number}" for number in range(64)]
    series = built(range(10_000_000, 10_012_000), *names, every=10**9)
    assert 64 == len(series)
    assert sum(item.ByteSize() for item in series) < 4 << 20


def test_memory_does_not_grow_with_a_jobs_length() -> None:
    """Ten times the steps take the memory of the points that are held, not of the steps."""

    def peak(count: int) -> int:
        builder = SeriesBuilder(())
        tracemalloc.start()
        for step in range(count):
            builder.add({"step": step, "metrics": {"loss": step / 2}})
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(400_000) < 1.5 * peak(40_000)
