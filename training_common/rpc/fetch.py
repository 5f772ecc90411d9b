"""Streams a published artifact's payload, for the exchange and for the agent registry alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from cognateforge.agent.v1 import agent_pb2
from cognateforge.exceptions import FieldViolation, OffsetOutOfRangeError
from cognateforge.exchange.v1 import model_pb2
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRow

Frame = TypeVar("Frame", model_pb2.FetchModelResponse, agent_pb2.FetchAgentResponse)


def check_offset(row: ArtifactRow, offset_bytes: int) -> None:
    """Raise OffsetOutOfRangeError when `offset_bytes` is beyond the payload's end. The end itself is a fine place."""
    if offset_bytes > row.size_bytes:
        message = f"offset_bytes {offset_bytes} is beyond {row.name}'s {row.size_bytes} bytes: start at 0"
        raise OffsetOutOfRangeError(message, violations=[FieldViolation(field="offset_bytes", description=message)])


async def frames(
    blobs: BlobStore, row: ArtifactRow, offset_bytes: int, new_frame: Callable[[], Frame]
) -> AsyncIterator[Frame]:
    """Yield the payload from `offset_bytes` on, each piece as the chunk of a new frame.

    Files are read on the event loop: a piece out of the page cache takes less time than a hop to a thread, and gRPC's
    flow control waits between the pieces.
    Errors: ArtifactCorruptError.
    """
    for offset, piece in blobs.open_payload(row.files, offset_bytes):
        frame = new_frame()
        # Set in place: a Chunk that is handed to the frame's constructor would be copied once more.
        frame.chunk.offset_bytes = offset
        frame.chunk.data = piece
        yield frame
