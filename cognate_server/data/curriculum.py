"""From easy to hard: which documents may be drawn at a step.

A curriculum begins with a share of the easiest documents and admits harder ones as training goes on, by the square root
of time: what is new arrives at a rate that falls as the admitted part grows. Each set has its own order of difficulty
(`cognate_server.data.difficulty`), so the mix of the sets stays as the plan says.
Source: Platanios et al. 2019, arXiv:1903.09848, equation 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from training_common.attempt import Json

# The paper's 0.01 is 75 of GSM8K's 7,473 documents, which one batch on an accelerator reads many times over.
DEFAULT_INITIAL_COMPETENCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """How the admitted share of a set grows.

    steps: training steps until every document is admitted, at least 1.
    initial_competence: share of the easiest documents that the first step may draw from, above 0 and at most 1.

    Errors: ValueError, naming the field.
    """

    steps: int
    initial_competence: float = DEFAULT_INITIAL_COMPETENCE

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"curriculum.steps must be at least 1, got {self.steps}")
        if not 0 < self.initial_competence <= 1:
            raise ValueError(
                f"curriculum.initial_competence must be above 0 and at most 1, got {self.initial_competence}"
            )

    def competence(self, step: int) -> float:
        """Return the share of each set that may be drawn in the step after `step` steps."""
        if step >= self.steps:
            return 1.0
        start = self.initial_competence**2
        return min(1.0, math.sqrt(step * (1 - start) / self.steps + start))

    def to_json(self) -> Mapping[str, Json]:
        """Return what a manifest names."""
        return {"steps": self.steps, "initial_competence": self.initial_competence}
