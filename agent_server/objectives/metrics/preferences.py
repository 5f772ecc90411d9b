"""Which of two answers an agent prefers, by the rewards that its probabilities imply."""

from __future__ import annotations

from collections.abc import Sequence


def preference_accuracy(margins: Sequence[float]) -> float:
    """Return the share of pairs whose preferred answer has the larger reward; a tie counts half.

    margins: reward of the preferred answer less that of the other. The implied reward of an answer y to x is
    beta * (log p(y|x) - log p_base(y|x)). So the base itself scores 0.5.
    Source: Rafailov et al. 2023, arXiv:2305.18290, section 4.
    """
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)


def reward_margin(margins: Sequence[float]) -> float:
    """Return the mean margin of the pairs. Source: as above."""
    return sum(margins) / len(margins)
