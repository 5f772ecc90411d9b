"""Which checkpoints of a job are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cognateforge.job.v1 import job_pb2
from training_common.jobs.store import CheckpointRow

# The newest may be torn by the crash that makes it needed, so the one before it stays.
LEAST_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Retention:
    """A policy: a checkpoint stays when any of its rules, or a pin, wants it.

    last: how many of the newest. best: how many of those with the best score. every_steps: all at multiples of it; 0
    means none. highest_is_best: whether a higher score is better.
    """

    last: int = LEAST_KEPT
    best: int = 0
    every_steps: int = 0
    highest_is_best: bool = False

    def superfluous(self, rows: Sequence[CheckpointRow]) -> list[CheckpointRow]:
        """Return which of the available checkpoints, newest first, may go."""
        kept = {row.id for row in rows[: max(LEAST_KEPT, self.last)]}
        kept |= {row.id for row in self._best_first(rows)[: self.best]}
        return [row for row in rows if row.id not in kept and not row.pinned and not self._is_milestone(row)]

    def _is_milestone(self, row: CheckpointRow) -> bool:
        return self.every_steps > 0 and row.step % self.every_steps == 0

    def _best_first(self, rows: Sequence[CheckpointRow]) -> list[CheckpointRow]:
        """Return those with a score, the best first; of equal ones the newer, which has learnt for longer."""
        sign = -1.0 if self.highest_is_best else 1.0
        scored = [(sign * row.score, -row.step, -row.id, row) for row in rows if row.score is not None]
        return [row for *_, row in sorted(scored, key=lambda one: one[:3])]


def retention_of(policy: job_pb2.CheckpointPolicy, *, highest_is_best: bool) -> Retention:
    """Return a plan's policy. An absent one keeps the newest two."""
    return Retention(
        last=max(LEAST_KEPT, policy.keep_last),
        best=policy.keep_best,
        every_steps=policy.keep_every_steps,
        highest_is_best=highest_is_best,
    )
