"""A real worker process with a toy job: it hashes instead of training, so that job tests need no torch.

The plan is JSON: steps, step_s, checkpoint_every, what to wait for, and what to do wrong. The result depends on every
step, so a resumed run ends with the same result only when nothing was lost or done twice. Of several processes the
first one works, and the others hear of every step, for which they do need torch.
"""

import errno
import hashlib
import json
import os
import time
from pathlib import Path

from cognateforge.exceptions import DataUnavailableError
from training_common.attempt import AttemptStopped, AttemptWaits, StopKind
from training_common.jobs.states import JobState
from training_common.retention import Retention
from training_common.settings import ServiceSettings, load
from training_common.worker import AssistantContext, WorkerContext, run


class ToySettings(ServiceSettings):
    address: str = "127.0.0.1:0"
    data_dir: Path = Path("var/toy")


def load_settings(file: Path | None) -> ToySettings:
    return load(ToySettings, file=file, prefix="TOY_SERVER_")


def work(context: WorkerContext[ToySettings]) -> None:
    attempt = context.attempt
    plan = json.loads(attempt.store.job.plan)
    attempt.keep(Retention(**plan.get("retention", {})))
    step, value = 0, b""
    checkpoint = attempt.latest_checkpoint()
    if checkpoint is not None:
        saved = json.loads((checkpoint.path / "state.json").read_text())
        step, value = saved["step"], bytes.fromhex(saved["value"])
    if "needs_file" in plan and not Path(plan["needs_file"]).exists():
        raise AttemptWaits("Cognate", message="connection refused", give_up_after_s=plan.get("give_up_after_s", 0))
    attempt.move(JobState.RUNNING)
    replayed = context.job_dir.parent.name == "verifications"
    waits = context.job_dir / "replay-waits"
    if replayed and waits.exists():
        waits.write_text(str(os.getpid()))
        time.sleep(3600)

    def tell(goes_on: bool) -> None:
        if context.team is not None:
            context.team.agree(lambda: goes_on)

    def save(step: int, value: bytes) -> None:
        def write(folder: Path) -> None:
            if attempt.store.attempt.number == 1 and step == plan.get("disk_full_at"):
                raise OSError(errno.ENOSPC, "No space left on device")
            (folder / "state.json").write_text(json.dumps({"step": step, "value": value.hex()}))
            (folder / "ballast").write_bytes(b"x" * plan.get("ballast_bytes", 0))
            time.sleep(plan.get("slow_save_s", 0.0))
            if attempt.store.attempt.number == 1 and step == plan.get("stuck_in_save_at"):
                (attempt.workdir / "stuck").touch()
                time.sleep(3600)

        attempt.save_checkpoint(step=step, write=write, score=plan.get("scores", {}).get(str(step)))

    while step < plan["steps"]:
        stop = attempt.stop_requested()
        if stop is not None:
            if stop is StopKind.YIELD and plan.get("keeps_going"):
                time.sleep(3600)
            if stop.saves:
                save(step, value)
            tell(False)
            raise AttemptStopped(stop)
        tell(True)
        if step == plan.get("raise_at"):
            raise RuntimeError("secret detail of a library")
        if step == plan.get("missing_at"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/secret/file")
        if step == plan.get("refuse_at"):
            raise DataUnavailableError("the toy data is gone")
        time.sleep(plan.get("step_s", 0.0))
        step, value = step + 1, hashlib.sha256(value + bytes([step % 256])).digest()
        if replayed and step == plan.get("differs_at"):
            value = hashlib.sha256(value).digest()
        attempt.progress(step=step, total_steps=plan["steps"], metrics={"loss": 1 / step})
        if step % plan.get("checkpoint_every", 10) == 0:
            save(step, value)
    tell(False)
    if attempt.store.attempt.number == 1 and "product_bytes" in plan:
        (context.job_dir / "product").mkdir()
        (context.job_dir / "product" / "weights").write_bytes(b"x" * plan["product_bytes"])
        raise OSError(errno.ENOSPC, "No space left on device")
    attempt.trained()
    attempt.event("result", {"message": value.hex()})
    attempt.move(JobState.SUCCEEDED)


def assist(context: AssistantContext[ToySettings]) -> None:
    plan, heard = json.loads(context.plan), 0
    while context.team.agree(lambda: False):  # what the first one says
        heard += 1
        if heard == plan.get("assistant_raises_at"):
            raise RuntimeError("secret detail of a library")


def expected_result(steps: int) -> str:
    value = b""
    for step in range(steps):
        value = hashlib.sha256(value + bytes([step % 256])).digest()
    return value.hex()


if __name__ == "__main__":
    run(load_settings, work, assist)
