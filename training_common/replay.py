"""The replay of some steps of a job, away from its files: what a verification's worker does.

    python -m <service>.worker --settings FILE --verify verifications/... --attempt N

The service's own `work` runs as it does in a job, with an attempt that begins at one checkpoint, writes into a scratch
folder, tells nobody and stops at the step of another. Then the files of both are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cognateforge.exceptions import CheckpointGoneError, InternalError
from training_common.attempt import AttemptStopped, CheckpointRef, FencedOutError, Json, StopKind
from training_common.checkpoints import MANIFEST, problem_of
from training_common.digests import canonical_json, files_under, sha256_bytes, sha256_file, write_folder
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore
from training_common.jobs.verifications import Claim, VerificationStore
from training_common.retention import Retention
from training_common.worker import WorkerAttempt

# Of a job's folder everything else may be read by its service: tokenizers, prepared data, decisions.
_NOT_READ = frozenset({"checkpoints", "logs"})
_PARAMETERS = ".safetensors"
_TORCH = ".pt"


class ReplayStore(AttemptStore):
    """The job as its replay sees it. Nothing can be written."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        raise FencedOutError("a replay changes nothing of its job")
        yield  # makes it a generator

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Leave the facts as they are: they are the job's own."""


class ReplayAttempt(WorkerAttempt):
    """An attempt that begins at a given checkpoint and ends at a given step.

    given_up: whether to stop, because the verification is another worker's now.
    """

    def __init__(
        self, store: ReplayStore, *, workdir: Path, start: CheckpointRef, to_step: int, given_up: Callable[[], bool]
    ) -> None:
        # Not the base's own: that one opens the job's checkpoints.
        self.store = store
        self._workdir = workdir
        self._to_step = to_step
        self._given_up = given_up
        self._polls_left = 0
        self.newest = start

    @property
    def reached(self) -> bool:
        """Whether the step to compare at is saved."""
        return self.newest.step == self._to_step

    @property
    def saves_in_background(self) -> bool:
        return False

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        """Tell nobody."""

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        """Tell nobody."""

    def keep(self, retention: Retention) -> None:
        """Keep all: they are few, and go with the scratch folder."""

    def settle(self) -> None:
        """Every save is done when it returns."""

    def close(self) -> None:
        """Every save is done when it returns."""

    def require_storage(self) -> None:
        """A scratch folder that cannot be written ends the replay."""

    def move(self, to: JobState, *, message: str = "") -> None:
        """The job stays where it is; what follows training is not replayed."""
        if to is not JobState.RUNNING:
            raise AttemptStopped(StopKind.REVOKED)

    def trained(self) -> None:
        raise AttemptStopped(StopKind.REVOKED)

    def latest_checkpoint(self) -> CheckpointRef | None:
        # A trainer asks once a step whether to stop; so many times it is not.
        self._polls_left = self._to_step - self.newest.step
        return self.newest

    def stop_requested(self) -> StopKind | None:
        if self.reached or self._given_up():
            return StopKind.REVOKED
        if self._polls_left <= 0:
            # The job saved there because it was paused or asked to yield, so the plan has no checkpoint of this step.
            return StopKind.PAUSE
        self._polls_left -= 1
        return None

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        target = self._workdir / "checkpoints" / f"step-{step}"
        if target.exists():
            shutil.rmtree(target)
        write_folder(target, write)
        self.newest = CheckpointRef(step=step, path=target)
        saved: Future[CheckpointRef] = Future()
        saved.set_result(self.newest)
        return saved


def replay(
    store: VerificationStore,
    claim: Claim,
    *,
    job_dir: Path,
    scratch: Path,
    run: Callable[[ReplayAttempt], None],
    given_up: Callable[[], bool],
    threads: int,
) -> dict[str, Any]:
    """Replay, compare and return the receipt.

    run: does the service's work with the attempt. Errors: CheckpointGoneError; FencedOutError; those of `run`.
    """
    started = time.monotonic()
    start, target = (job_dir / "checkpoints" / row.folder for row in (claim.start, claim.target))
    for row, folder in ((claim.start, start), (claim.target, target)):
        if problem := problem_of(folder, row.digest):
            raise CheckpointGoneError(f"the checkpoint of step {row.step}: {problem}")
    _copy_inputs(job_dir, scratch)
    attempt_row = store.attempt_of(claim)
    attempt = ReplayAttempt(
        ReplayStore(store.database, claim.job, attempt_row),
        workdir=scratch,
        start=CheckpointRef(step=claim.start.step, path=start),
        to_step=claim.target.step,
        given_up=given_up,
    )
    while not attempt.reached:
        before = attempt.newest.step
        with contextlib.suppress(AttemptStopped):
            run(attempt)
        if given_up():
            raise FencedOutError(f"{claim.row.name}: try {claim.row.tries} is no longer current")
        # Validation asks whether to stop, too: then it stops early, and goes on from there.
        if not before < attempt.newest.step <= claim.target.step:
            raise InternalError(f"the replay from step {before} did not come to step {claim.target.step}")
    return _receipt(target, attempt.newest.path, seconds=time.monotonic() - started, threads=threads)


def _copy_inputs(job_dir: Path, scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in sorted(job_dir.iterdir()):
        if path.name in _NOT_READ or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, scratch / path.name)
        else:
            shutil.copyfile(path, scratch / path.name)


def _receipt(recorded: Path, replayed: Path, *, seconds: float, threads: int) -> dict[str, Any]:
    ours = digests_under(recorded)
    del ours[MANIFEST]
    theirs = digests_under(replayed)
    names = sorted(ours | theirs)
    # Files of a step to go back to lie in folders below, and are those of an earlier checkpoint.
    parameters = [name for name in names if name.endswith(_PARAMETERS) and "/" not in name] or names
    digests = [sha256_bytes(canonical_json({name: one.get(name, "") for name in parameters})) for one in (ours, theirs)]
    return {
        "verdict": "EQUAL" if digests[0] == digests[1] else "DIFFERENT",
        "recorded_digest": digests[0],
        "replayed_digest": digests[1],
        "files": [
            {
                "path": name,
                "recorded_digest": ours.get(name, ""),
                "replayed_digest": theirs.get(name, ""),
                "parameters": name in parameters,
            }
            for name in names
        ],
        "environment": _environment(threads),
        "seconds": round(seconds, 3),
    }


def digests_under(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a checkpoint by its path; of torch's own files, of the values in them.

    How torch writes a value depends on which of its parts are the same object, and a restored one has others.
    """
    return {
        path.relative_to(folder).as_posix(): _digest_of_values(path) if path.suffix == _TORCH else sha256_file(path)
        for path in files_under(folder)
    }


def _digest_of_values(path: Path) -> str:
    import torch  # a worker that has such files has it

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"tensor {flat.dtype} {tuple(flat.shape)} ".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"map {len(value)} ".encode())
            for key in sorted(value, key=repr):
                digest.update(f"{key!r} ".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)} ".encode())
            for one in value:
                add(one)
        else:
            digest.update(f"{type(value).__name__} {value!r} ".encode())

    add(torch.load(path, map_location="cpu", weights_only=True))
    return f"sha256:{digest.hexdigest()}"


def _environment(threads: int) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.platform(),
        "threads": str(threads),
    }
    for package in ("cognateforge", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {name: value[:500] for name, value in found.items()}


def _processor() -> str:
    """Return the processor's name as Linux tells it, "" elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


@contextlib.contextmanager
def beating(store: VerificationStore, claim: Claim, handle: str, interval_s: float) -> Iterator[Callable[[], bool]]:
    """Give signs of life from a thread while the body runs. Yields whether the verification was given up."""
    done, given_up = threading.Event(), threading.Event()
    store.beat(claim.row, handle)

    def beat() -> None:
        while not done.wait(interval_s):
            try:
                store.beat(claim.row, handle)
            except FencedOutError:
                given_up.set()
                return
            except sa.exc.OperationalError:  # the store is busy or away: the next beat tries again
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield given_up.is_set
    finally:
        done.set()
        thread.join()
