"""Streams a published artifact's payload, for the exchange and for the agent registry alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cognateforge.agent.v1 import agent_pb2
from cognateforge.exceptions import ArtifactCorruptError, FieldViolation, OffsetOutOfRangeError
from cognateforge.exchange.v1 import model_pb2
from training_common.artifacts import scrub
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow

# Each holds a fetch that waits for a bucket.
_READERS = ThreadPoolExecutor(16, thread_name_prefix="fetch")
Frame = TypeVar("Frame", model_pb2.FetchModelResponse, agent_pb2.FetchAgentResponse)


def check_offset(row: ArtifactRow, offset_bytes: int) -> None:
    """Raise OffsetOutOfRangeError when `offset_bytes` is beyond the payload's end. The end itself is a fine place."""
    if offset_bytes > row.size_bytes:
        message = f"offset_bytes {offset_bytes} is beyond {row.name}'s {row.size_bytes} bytes: start at 0"
        raise OffsetOutOfRangeError(message, violations=[FieldViolation(field="offset_bytes", description=message)])


async def _from_afar(payload: Iterator[tuple[int, bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    loop = asyncio.get_running_loop()
    while (piece := await loop.run_in_executor(_READERS, next, payload, None)) is not None:
        yield piece


async def guarded(
    registry: ArtifactRegistry,
    row: ArtifactRow,
    served: AsyncIterator[Frame],
    find: Callable[[ArtifactRegistry, str], ArtifactRow],
) -> AsyncIterator[Frame]:
    """Yield a fetch's frames. Bytes that are missed under way are damage, unless the version was collected meanwhile.

    Errors: ArtifactCorruptError; those of `find`, for a version that was collected.
    """
    try:
        async for frame in served:
            yield frame
    except ArtifactCorruptError as error:
        await registry.database.run(find, registry, row.name)
        found = scrub.damage_of(row, error)
        await registry.database.run_write(scrub.record, registry, row, [found])
        raise


async def frames(
    blobs: BlobStore,
    row: ArtifactRow,
    offset_bytes: int,
    new_frame: Callable[[], Frame],
    sent: Callable[[int], None] = lambda _size_bytes: None,
) -> AsyncIterator[Frame]:
    """Yield the payload from `offset_bytes` on, each piece as the chunk of a new frame.

    sent: told of the bytes of each piece that gRPC has taken.
    Files of a folder are read on the event loop: a piece out of the page cache takes less time than a hop to a thread,
    and gRPC's flow control waits between the pieces.
    Errors: ArtifactCorruptError; StoreAwayError.
    """
    payload = blobs.open_payload(row.files, offset_bytes)
    if blobs.far:
        async for offset, piece in _from_afar(payload):
            yield _frame(new_frame, offset, piece)
            sent(len(piece))
        return
    for offset, piece in payload:
        yield _frame(new_frame, offset, piece)
        sent(len(piece))


def _frame(new_frame: Callable[[], Frame], offset: int, piece: bytes) -> Frame:
    frame = new_frame()
    # Set in place: a Chunk that is handed to the frame's constructor would be copied once more.
    frame.chunk.offset_bytes = offset
    frame.chunk.data = piece
    return frame
