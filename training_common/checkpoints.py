"""Checkpoints as folders: written whole or not at all, with a manifest that names every file's digest.

A checkpoint is handed out only after its digests held. One that is torn or changed is skipped and reported.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from training_common import faults
from training_common.attempt import AttemptWaits, CheckpointRef
from training_common.digests import canonical_json, files_under, sha256_bytes, sha256_file, write_folder
from training_common.jobs.store import AttemptStore
from training_common.retention import Retention

MANIFEST = "checkpoint.json"
# step-STEP.ATTEMPT, and .step-STEP.ATTEMPT.PROCESS while it is being written.
_FOLDER = re.compile(r"\.?step-\d+\.(\d+)(?:\.\d+)?$")


class CheckpointFolder:
    """The checkpoints of one job, on disk and in the store."""

    def __init__(self, root: Path, store: AttemptStore) -> None:
        self._root = root
        self._store = store
        self.retention = Retention()
        root.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what attempts before this one began to write and did not record: they can no longer record it.

        What later attempts write is left alone: this one may have been given up meanwhile.
        """
        recorded = self._store.checkpoint_folders()
        for path in self._root.iterdir():
            found = _FOLDER.match(path.name)
            if path.name not in recorded and found and int(found[1]) < self._store.attempt.number:
                shutil.rmtree(path, ignore_errors=True)

    def require_present(self) -> None:
        """Make sure that the job's checkpoints are not all away. Errors: AttemptWaits.

        A folder that is not mounted would otherwise cost a job all that it has learnt.
        """
        rows = self._store.checkpoints()
        if rows and not any((self._root / row.folder).exists() for row in rows):
            raise AttemptWaits(
                "storage",
                message=f"none of the job's {len(rows)} checkpoints is in its folder; mount what belongs there, or "
                "cancel the job and start it anew",
            )

    def save(self, *, step: int, write: Callable[[Path], None], score: float | None = None) -> CheckpointRef:
        """Make a checkpoint durable, then record it; afterwards drop what the retention does not want.

        Errors: FencedOutError, OSError. Nothing is recorded then.
        """
        # The attempt is in the name: a worker that was given up cannot write into its successor's folder.
        name = f"step-{step:010d}.{self._store.attempt.number}"
        target = self._root / name
        if target.exists():
            shutil.rmtree(target)

        def fill(folder: Path) -> None:
            self._write(write, folder)
            files = {
                path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "digest": sha256_file(path)}
                for path in files_under(folder)
            }
            (folder / MANIFEST).write_bytes(canonical_json({"step": step, "files": files}))

        write_folder(target, fill)
        size_bytes = sum(path.stat().st_size for path in files_under(target))
        digest = sha256_bytes((target / MANIFEST).read_bytes())
        self._store.add_checkpoint(step=step, digest=digest, size_bytes=size_bytes, folder=name, score=score)
        self._retain()
        return CheckpointRef(step=step, path=target)

    @staticmethod
    def _write(write: Callable[[Path], None], folder: Path) -> None:
        try:
            write(folder)
        except Exception as error:
            if faults.of_full_disk(error, folder):
                raise OSError(errno.ENOSPC, "no space left for a checkpoint", str(folder)) from error
            raise

    def latest(self) -> CheckpointRef | None:
        """Return the newest checkpoint whose digests hold. Damaged ones are reported and passed over."""
        for row in self._store.checkpoints():
            problem = problem_of(self._root / row.folder, row.digest)
            if problem is None:
                return CheckpointRef(step=row.step, path=self._root / row.folder)
            self._store.drop_checkpoint(
                row, kind="checkpoint_skipped", message=f"checkpoint of step {row.step}: {problem}; it is not used"
            )
        return None

    def _retain(self) -> None:
        for row in self.retention.superfluous(self._store.checkpoints()):
            message = f"checkpoint of step {row.step}: the policy does not keep it"
            if self._store.retire_checkpoint(row, kind="checkpoint_removed", message=message):
                shutil.rmtree(self._root / row.folder, ignore_errors=True)


def problem_of(folder: Path, digest: str) -> str | None:
    """Return what is wrong with a checkpoint's files, or None. Errors: OSError, when the storage fails now."""
    try:
        manifest = (folder / MANIFEST).read_bytes()
        if sha256_bytes(manifest) != digest:
            return f"{MANIFEST} does not have the recorded digest"
        for name, facts in json.loads(manifest)["files"].items():
            if sha256_file(folder / name) != facts["digest"]:
                return f"{name} does not have the digest in {MANIFEST}"
    except OSError as error:
        if faults.of_storage(error):
            raise  # of that nothing can be read now it does not follow that it is damaged
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return None
