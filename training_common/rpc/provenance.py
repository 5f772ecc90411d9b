"""What proves where a published version comes from, for the exchange and for the agent registry alike."""

from __future__ import annotations

import asyncio

from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.layout import STATEMENT_NAME
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.files import read_file
from training_common.artifacts.registry import ArtifactRow


async def of_version(blobs: BlobStore, row: ArtifactRow) -> artifact_pb2.Provenance:
    """Return a version's manifest, statement and signature. Errors: ArtifactCorruptError, for a statement that changed.

    A version of before has no statement, and one that was not signed has no signature.
    """
    return artifact_pb2.Provenance(
        name=row.name,
        digest=row.digest,
        manifest=row.manifest,
        statement=await asyncio.to_thread(read_file, blobs, row, STATEMENT_NAME),
        signature=row.signature or b"",
    )
