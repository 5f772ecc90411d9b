"""Metrics over steps: what a long job's series keep, and that reading them takes no memory by its length."""

import tracemalloc

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
    assert 200_000 == loss.steps[-1]
    gaps = [after - before for before, after in zip(loss.steps, loss.steps[1:], strict=False)]
    assert max(gaps) <= 2 * 200_000 / MAX_POINTS
    assert list(range(1000, 200_001, 1000)) == list(rare.steps)


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
