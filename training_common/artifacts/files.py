"""Small files of published versions, read whole."""

from __future__ import annotations

from cognateforge.exceptions import ArtifactCorruptError
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRow
from training_common.digests import sha256_bytes


def read_file(blobs: BlobStore, row: ArtifactRow, path: str) -> bytes:
    """Return a file of a version, empty where it has none of that name.

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
