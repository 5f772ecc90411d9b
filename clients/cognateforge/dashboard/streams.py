"""What a page follows: a job's events and logs as server-sent events, taken up again where they broke off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar, cast

from sse_starlette import ServerSentEvent

from cognateforge.cli.plain import to_plain
from cognateforge.client.patience import BREAKS
from cognateforge.dashboard.plain import error_json, event_json
from cognateforge.dashboard.upstream import Upstream
from cognateforge.exceptions import ForgeError, OutOfRangeError
from cognateforge.job.v1 import job_pb2

T = TypeVar("T")

# A person sees no difference below a tenth of a second, and a job that is fast makes hundreds of events in it.
GATHER_S = 0.1
GATHER_MOST = 500
RETRY_S = 1.0


def told(kind: str, data: Any, place: str | None = None) -> ServerSentEvent:
    """Return one server-sent event. place: where the browser goes on after a break."""
    return ServerSentEvent(json.dumps(data, ensure_ascii=False, allow_nan=False), event=kind, id=place)


async def gathered(frames: AsyncIterator[T]) -> AsyncGenerator[list[T], None]:
    """Yield what comes within a moment together. Errors: those of the frames, after what came before them."""
    queue: asyncio.Queue[T | None] = asyncio.Queue(GATHER_MOST)

    async def fill() -> None:
        try:
            async with aclosing(cast("AsyncGenerator[T, None]", frames)) as source:
                async for frame in source:
                    await queue.put(frame)
        finally:
            # Not where the reader has left and the queue may be full.
            if not filling.cancelled() and not filling.cancelling():
                await queue.put(None)

    filling = asyncio.create_task(fill())
    try:
        while (frame := await queue.get()) is not None:
            batch = [frame]
            ended = False
            while not queue.empty() and len(batch) < GATHER_MOST and not ended:
                following = queue.get_nowait()
                ended = following is None
                if following is not None:
                    batch.append(following)
            yield batch
            if ended:
                break
            # The first news goes at once, and what follows on its heels goes together.
            await asyncio.sleep(GATHER_S)
        await filling
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)


async def job_events(upstream: Upstream, name: str, after: int) -> AsyncGenerator[ServerSentEvent, None]:
    """Yield a job's events after a sequence, and its end."""
    while True:
        try:
            async with _gathering(upstream.watch(name, after)) as batches:
                async for batch in batches:
                    events = [frame.event for frame in batch if frame.HasField("event")]
                    if events:
                        after = events[-1].sequence
                        yield told("events", [event_json(event) for event in events], str(after))
                    if batch[-1].HasField("end"):
                        yield told("end", to_plain(batch[-1].end))
                        return
        except OutOfRangeError as error:
            # Retention was faster than the reader: the page goes on with what is left.
            after = max(after, int(error.metadata.get("oldest_sequence", "1")) - 1)
            yield told("gap", {"after": after})
        except BREAKS:
            pass  # whether the service is away is told by the board
        except ForgeError as error:
            yield told("refused", error_json(error))
            return
        await asyncio.sleep(RETRY_S)


async def job_logs(upstream: Upstream, name: str, place: tuple[int, int]) -> AsyncGenerator[ServerSentEvent, None]:
    """Yield what a job's workers write. place: an attempt, 0 for the newest, and where in its log to begin."""
    while True:
        try:
            async with _gathering(upstream.logs(name, *place)) as batches:
                async for batch in batches:
                    parts = [part for frame in batch if (part := _log_part(frame)) is not None]
                    for part in parts:
                        place = part["attempt"], part["next_position"]
                    if parts:
                        yield told("lines", parts, f"{place[0]}:{place[1]}")
                    if batch[-1].HasField("end"):
                        yield told("end", {})
                        return
        except BREAKS:
            pass
        except ForgeError as error:
            yield told("refused", error_json(error))
            return
        await asyncio.sleep(RETRY_S)


@asynccontextmanager
async def _gathering(frames: AsyncIterator[T]) -> AsyncIterator[AsyncGenerator[list[T], None]]:
    async with aclosing(gathered(frames)) as batches:
        yield batches


def _log_part(frame: job_pb2.LogFrame) -> dict[str, Any] | None:
    if frame.HasField("lines"):
        lines = [[line.text, line.continued] for line in frame.lines.lines]
        return {"attempt": frame.lines.attempt, "next_position": frame.lines.next_position, "lines": lines}
    if frame.HasField("gap"):
        missing = frame.gap.next_position - frame.gap.position
        return {"attempt": frame.gap.attempt, "next_position": frame.gap.next_position, "missing_bytes": missing}
    return None
