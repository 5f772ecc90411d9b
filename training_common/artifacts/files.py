"""Files of published versions, out of the store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cognateforge.exceptions import ArtifactCorruptError
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.registry import ArtifactRow
from training_common.digests import sha256_bytes, sha256_file


def read_file(blobs: BlobStore, row: ArtifactRow, path: str) -> bytes:
    """Return a small file of a version, empty where it has none of that name.

    Bytes may come from elsewhere, and slowly: not for the store's threads.
    Errors: ArtifactCorruptError, when its stored bytes are not those that were published.
    """
    file = next((file for file in row.files if file.path == path), None)
    if file is None:
        return b""
    data = b"".join(piece for _, piece in blobs.open_payload((file,), 0))
    if sha256_bytes(data) != file.digest:
        raise ArtifactCorruptError(f"{file.path} of {row.name}: its stored bytes are not what the manifest names")
    return data


def unpack(files: Iterable[StoredFile], blobs: BlobStore, folder: Path) -> None:
    """Write a version's files into a folder. Errors: ArtifactCorruptError."""
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            for _, piece in blobs.open_payload((file,), 0):
                target.write(piece)
        if sha256_file(path) != file.digest:
            raise ArtifactCorruptError(
                f"{file.path}: its stored bytes are not what the manifest names; restore them, or train anew"
            )
