"""What training on a new set does to what was learnt from earlier ones."""

from __future__ import annotations

from collections.abc import Sequence


def forgetting(before: float, after: float, *, higher_is_better: bool = True) -> float:
    """Return how much worse an agent became on an earlier set: the metric before training less the one after it.

    The other way round for a metric that is better when it is lower, a loss for instance. Negative where it got better.
    Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3, for one set whose best value is the one before.
    """
    return before - after if higher_is_better else after - before


def backward_transfer(results: Sequence[Sequence[float]]) -> float:
    """Return what later sets did to earlier ones: BWT = sum over i < T of (R[T][i] - R[i][i]) / (T - 1).

    results: R[i][j], the accuracy on set j after training on set i, in the order of training; T sets, 2 at least. With
    two sets it is the negative of what was forgotten of the first.
    Source: Lopez-Paz & Ranzato 2017, arXiv:1706.08840, equation 3.
    """
    sets = len(results)
    if sets < 2 or any(len(row) != sets for row in results):
        raise ValueError("backward transfer needs the results of two sets at least, on each of them after each")
    return sum(results[-1][i] - results[i][i] for i in range(sets - 1)) / (sets - 1)
