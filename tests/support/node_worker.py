"""One process of a small pretraining that may run on several machines; the first one writes every step to a file.

python -m tests.support.node_worker FOLDER EXCHANGE_TIMEOUT_S
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cognate_server.trainer import pretrain
from tests.cognate._support import MemoryAttempt
from tests.cognate.pretraining_processes import CONFIG, UnevenStream
from training_common.attempt import Json, PartDone, TeamBrokenError
from training_common.engines.processes import EX_TEMPFAIL, end_with_parent
from training_common.team import ALONE, Team
from training_common.team_attempt import TeamAttempt

NODE_CONFIG = dataclasses.replace(CONFIG, total_steps=120, checkpoint_interval_steps=5, control_rates=())
# Slow enough that a test can act between two steps.
STEP_S = 0.25


class TellingAttempt(MemoryAttempt):
    """Tells of every step in a file, with the number of processes that took it."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder)
        self._size = size

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        if "loss" in metrics:
            time.sleep(STEP_S)
            with (self.workdir / "steps").open("a") as file:
                file.write(json.dumps([step, self._size, metrics["loss"]]) + "\n")


def main(folder: Path, timeout_s: float) -> int:
    end_with_parent(os.getppid())
    try:
        team = Team.join(timeout_s=timeout_s) if int(os.environ["WORLD_SIZE"]) > 1 else ALONE
        own = TellingAttempt(folder, team.size) if team.leads else None
        attempt = TeamAttempt(team, own, job="jobs/1", workdir=folder)
        pretrain(NODE_CONFIG, UnevenStream() if team.leads else None, attempt, team=team)
    except PartDone:
        pass
    except TeamBrokenError as error:
        print(error, flush=True)
        return EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
