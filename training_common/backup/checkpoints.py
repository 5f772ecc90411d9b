"""Checkpoints in a backup: of jobs that have not ended, the newest that can be copied, and those that are pinned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cognateforge.exceptions import ArtifactCorruptError
from training_common.artifacts.blobs import StoredFile
from training_common.backup.snapshot import OpenCheckpoint
from training_common.checkpoints import MANIFEST
from training_common.digests import sha256_bytes


@contextmanager
def unreadable_is_corrupt() -> Iterator[None]:
    """Turn an OSError into ArtifactCorruptError: what is to be copied cannot be read."""
    try:
        yield
    except OSError as error:
        raise ArtifactCorruptError(f"{error.filename}: {error.strerror}") from error


def newest_and_pinned(checkpoints: Iterable[OpenCheckpoint]) -> Iterator[tuple[str, list[OpenCheckpoint]]]:
    """Yield each job with its newest checkpoint and its pinned ones. checkpoints: by job, the newest first."""
    for job, group in itertools.groupby(checkpoints, key=lambda checkpoint: checkpoint.job):
        yield job, [one for at, one in enumerate(group) if at == 0 or one.pinned]


def checkpoint_files(root: Path, checkpoint: OpenCheckpoint) -> list[StoredFile]:
    """Return a checkpoint's files with their paths below `root`, the folder of all jobs' folders.

    Errors: ArtifactCorruptError, when its own manifest is gone, or not the one that was recorded.
    """
    with unreadable_is_corrupt():
        data = (root / checkpoint.folder / MANIFEST).read_bytes()
    if sha256_bytes(data) != checkpoint.digest:
        raise ArtifactCorruptError(f"{checkpoint.folder}/{MANIFEST} does not have the recorded digest")
    own = StoredFile(path=f"{checkpoint.folder}/{MANIFEST}", size_bytes=len(data), digest=checkpoint.digest)
    named = [
        StoredFile(path=f"{checkpoint.folder}/{name}", size_bytes=facts["size_bytes"], digest=facts["digest"])
        for name, facts in json.loads(data)["files"].items()
    ]
    return [*named, own]
