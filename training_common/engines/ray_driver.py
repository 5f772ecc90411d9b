"""The driver of one worker on a Ray cluster: runs its processes by Ray Train, and ends the way they did.

    python -m training_common.engines.ray_driver --processes N --resources JSON --log FILE MODULE ARGUMENT...

It is the entrypoint of a Ray job. Nothing is restarted in it: the next attempt begins from the newest checkpoint, under
a new fencing token, and on record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from training_common.engines.processes import EX_TEMPFAIL, OUTSIDE_STATUSES
from training_common.engines.ray_process import ProcessEndedError, run_process


def main(argv: list[str]) -> int:
    """Run the worker to its end. Returns its exit status, where a signal is 128 and its number."""
    parser = argparse.ArgumentParser(
        description="Runs one worker on a Ray cluster. Started by an engine, as a Ray job."
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--resources", type=json.loads, required=True, help="of each process, as Ray names them")
    parser.add_argument("--log", required=True, help="into which processes write, where it is there")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    # Otherwise Ray Train moves each process into a folder of its own, and relative paths in settings with it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # It tells processes that their node will be taken away, which these do not ask.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # Ray Train wants a place for results of its own, of which there are none.
    with tempfile.TemporaryDirectory(prefix="forge-ray-") as place:
        # Not the trainer for torch, which would make a process group in Ray's processes, and load torch for it.
        trainer = DataParallelTrainer(
            run_process,
            train_loop_config={"command": [options.module, *options.arguments], "log": options.log},
            scaling_config=ScalingConfig(
                num_workers=options.processes,
                use_gpu=options.resources.get("GPU", 0) > 0,
                resources_per_worker=options.resources,
            ),
            run_config=RunConfig(
                storage_path=place, failure_config=FailureConfig(max_failures=0, max_preemption_failures=0)
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return status_of(error.worker_failures)
        except TrainingFailedError:
            # The controller's own, or a node that is taken away.
            return EX_TEMPFAIL
    return 0


def status_of(failures: Mapping[int, BaseException]) -> int:
    """Return the exit status that tells best why a worker failed.

    Where one process fails by itself, the others fail for its sake. One that Ray lost was ended from outside.
    """
    statuses = [_status(failures[rank]) for rank in sorted(failures)]
    return next((status for status in statuses if status not in OUTSIDE_STATUSES), max(statuses, default=EX_TEMPFAIL))


def _status(failure: BaseException) -> int:
    if isinstance(failure, ProcessEndedError):
        return 128 - failure.status if failure.status < 0 else failure.status
    return EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
