"""A small pretraining of one process or several, as an engine launches workers; it writes its losses into a file.

python -m tests.support.small_pretraining --losses FILE
"""

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cognate_server.trainer import pretrain
from tests.cognate._support import MemoryAttempt
from tests.cognate.pretraining_processes import CONFIG, UnevenStream
from training_common.attempt import Json, PartDone
from training_common.team import ALONE, Team
from training_common.team_attempt import TeamAttempt

SMALL_CONFIG = dataclasses.replace(CONFIG, control_rates=())


class KeepingAttempt(MemoryAttempt):
    """Keeps every step's loss."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.losses: list[float] = []

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        if "loss" in metrics:
            self.losses.append(float(str(metrics["loss"])))


def losses(team: Team, folder: Path) -> list[float]:
    """Train, and return the loss of every step; none where another process leads."""
    own = KeepingAttempt(folder) if team.leads else None
    attempt = TeamAttempt(team, own, job="jobs/1", workdir=folder)
    with contextlib.suppress(PartDone):
        pretrain(SMALL_CONFIG, UnevenStream() if team.leads else None, attempt, team=team)
    return own.losses if own else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--losses", type=Path, help="needed where the first process is")
    options, _ = parser.parse_known_args()
    team = Team.join(timeout_s=60) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE
    with tempfile.TemporaryDirectory() as folder:
        seen = losses(team, Path(folder))
    if team.leads:
        options.losses.write_text(json.dumps(seen))
