"""The newest checkpoint that is worth going back to, kept alive by links in every later one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_GOOD = "good"


@dataclass(frozen=True)
class GoodCheckpoint:
    """Weights and optimizer of a step at which no detector saw a sign of trouble.

    Its files are a checkpoint's own, or lie in the folder `good` of a later one.
    """

    step: int
    folder: Path

    def link_into(self, checkpoint: Path, names: Sequence[str]) -> None:
        """Let a newer checkpoint hold these files too, without another copy of their bytes."""
        target = checkpoint / _GOOD
        target.mkdir()
        for name in names:
            os.link(self.folder / name, target / name)
        (target / "step.json").write_text(json.dumps(self.step))


def good_of(checkpoint: Path, position: str) -> GoodCheckpoint | None:
    """Return what a checkpoint holds to go back to. position: its JSON file that has `good_step`, its own or None."""
    own: int | None = json.loads((checkpoint / position).read_text(encoding="utf-8"))["good_step"]
    if own is not None:
        return GoodCheckpoint(own, checkpoint)
    folder = checkpoint / _GOOD
    return GoodCheckpoint(json.loads((folder / "step.json").read_text()), folder) if folder.exists() else None
