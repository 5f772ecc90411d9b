"""Following a job to its end, over as many streams as that takes: every event once, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Protocol

from cognateforge.client.patience import BREAKS, STREAM_LIFE_S, Patience
from cognateforge.exceptions import ForgeError, UnavailableError
from cognateforge.job.v1 import job_pb2


class Response(Protocol):
    """A WatchJobResponse of either service."""

    @property
    def frame(self) -> job_pb2.WatchFrame:
        """The frame."""


class Stream(Iterable[Response], Protocol):
    """A sync stream that can be ended from this side."""

    def cancel(self) -> bool:
        """End it."""


class AioStream(Protocol):
    """An asyncio stream that can be ended from this side."""

    def __aiter__(self) -> AsyncIterator[Response]:
        """Read it."""

    def cancel(self) -> bool:
        """End it."""


class Position:
    """What of a job's history was delivered."""

    def __init__(self, after_sequence: int, give_up_after_s: float) -> None:
        self.after_sequence = after_sequence
        self.ended = False
        self._patience = Patience(give_up_after_s)

    def take(self, frame: job_pb2.WatchFrame) -> bool:
        """Return whether the frame is news: an event that comes next, or the end."""
        kind = frame.WhichOneof("frame")
        if kind == "event":
            sequence = frame.event.sequence
            if sequence > self.after_sequence + 1:
                raise UnavailableError(f"event {self.after_sequence + 1} is missing: the server sent {sequence}")
            self._patience.progress()
            news = sequence == self.after_sequence + 1
            self.after_sequence = max(sequence, self.after_sequence)
            return news
        if kind == "end":
            if frame.end.last_sequence > self.after_sequence:
                raise UnavailableError(f"the end came before event {frame.end.last_sequence}")
            self.ended = True
        self._patience.progress()
        return self.ended

    def broken(self, error: ForgeError | None) -> float:
        """Return how long to wait before watching again, or raise the error when the patience is spent."""
        return self._patience.pause_s(error or UnavailableError("the stream closed before the job's end"))


def watch(open_stream: Callable[[int, float], Stream], position: Position) -> Iterator[job_pb2.WatchFrame]:
    """Yield the events and the end of a job. `open_stream` takes after_sequence and a timeout."""
    while not position.ended:
        error: ForgeError | None = None
        stream = open_stream(position.after_sequence, STREAM_LIFE_S)
        try:
            for response in stream:
                if position.take(response.frame):
                    yield response.frame
                if position.ended:
                    return
        except BREAKS as broken:
            error = broken
        finally:
            stream.cancel()
        time.sleep(position.broken(error))


async def watch_aio(
    open_stream: Callable[[int, float], AioStream], position: Position
) -> AsyncIterator[job_pb2.WatchFrame]:
    """The same for asyncio."""
    while not position.ended:
        error: ForgeError | None = None
        stream = open_stream(position.after_sequence, STREAM_LIFE_S)
        try:
            async for response in stream:
                if position.take(response.frame):
                    yield response.frame
                if position.ended:
                    return
        except BREAKS as broken:
            error = broken
        finally:
            stream.cancel()
        await asyncio.sleep(position.broken(error))
