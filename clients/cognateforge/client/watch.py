"""Following a job, its logs or the published models, over as many streams as that takes: every event once, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cognateforge.client.patience import BREAKS, STREAM_LIFE_S, Patience
from cognateforge.exceptions import ClientSetupError, ForgeError, UnavailableError
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2


class JobResponse(Protocol):
    """A WatchJobResponse of either service."""

    @property
    def frame(self) -> job_pb2.WatchFrame:
        """The frame."""


class LogResponse(Protocol):
    """A WatchLogsResponse of either service."""

    @property
    def frame(self) -> job_pb2.LogFrame:
        """The frame."""


@dataclass(frozen=True, kw_only=True)
class ModelSnapshot:
    """Every model that was published up to a sequence, in place of events that the service no longer keeps.

    models: in the order of their publication, each once. The events after `last_sequence` follow.
    """

    models: tuple[model_pb2.FoundationModel, ...]
    last_sequence: int


ModelNews = ModelSnapshot | model_pb2.ModelEvent

ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)
ResponseT_contra = TypeVar("ResponseT_contra", contravariant=True)
NewsT = TypeVar("NewsT")
NewsT_co = TypeVar("NewsT_co", covariant=True)
PlaceT = TypeVar("PlaceT")
PlaceT_co = TypeVar("PlaceT_co", covariant=True)


class Stream(Iterable[ResponseT_co], Protocol[ResponseT_co]):
    """A sync stream that can be ended from this side."""

    def cancel(self) -> bool:
        """End it."""


class AioStream(Protocol[ResponseT_co]):
    """An asyncio stream that can be ended from this side."""

    def __aiter__(self) -> AsyncIterator[ResponseT_co]:
        """Read it."""

    def cancel(self) -> bool:
        """End it."""


class Position(Protocol[ResponseT_contra, NewsT_co, PlaceT_co]):
    """What was delivered, and so where the next stream begins."""

    @property
    def place(self) -> PlaceT_co:
        """Where the next stream begins, as its request tells it."""

    @property
    def ended(self) -> bool:
        """Whether nothing will follow."""

    def begin(self) -> None:
        """A new stream is opened."""

    def take(self, response: ResponseT_contra) -> NewsT_co | None:
        """Return what is news in a response.

        Errors: UnavailableError, when something is missing before it; ClientSetupError, when it is, and a frame of an
        unknown kind came in this stream.
        """

    def broken(self, error: ForgeError | None) -> float:
        """Return how long to wait before watching again, or raise the error when the patience is spent."""


class _Sequence:
    """Events by their contiguous sequence, and the patience with streams that bring none.

    A frame of a kind that this release does not know is passed over, for a newer service may tell more than is asked.
    Where events are missing behind one, it may have stood in their place: no further try would bring them.
    """

    def __init__(self, after_sequence: int, give_up_after_s: float, *, holes: bool = False) -> None:
        """holes: sequences have holes, as the caller has asked for only some of the events."""
        self.after_sequence = after_sequence
        self.patience = Patience(give_up_after_s)
        self.holes = holes
        self._unknown = False

    def begin(self) -> None:
        """A new stream is opened."""
        self._unknown = False

    def pass_over(self) -> None:
        """A frame of an unknown kind came. It is no progress: a service that sends nothing else tells nothing."""
        self._unknown = True

    def missing(self, what: str) -> ForgeError:
        """Return the error for a gap."""
        if self._unknown:
            return ClientSetupError(
                f"{what}, and the server sent a frame of a kind that this release does not know in its place: install "
                "a newer release"
            )
        return UnavailableError(what)

    def is_next(self, sequence: int) -> bool:
        """Take an event, and return whether it is the next one and not one that came before."""
        if sequence > self.after_sequence + 1 and not self.holes:
            raise self.missing(f"event {self.after_sequence + 1} is missing: the server sent {sequence}")
        self.patience.progress()
        news = sequence > self.after_sequence
        self.after_sequence = max(sequence, self.after_sequence)
        return news


class JobPosition:
    """What of a job's history was delivered. progress_every: as a watch's request has it."""

    def __init__(self, after_sequence: int, give_up_after_s: float, progress_every: int = 1) -> None:
        self._events = _Sequence(after_sequence, give_up_after_s, holes=progress_every > 1)
        self.ended = False

    @property
    def place(self) -> int:
        """The last sequence that was delivered."""
        return self._events.after_sequence

    def begin(self) -> None:
        """A new stream is opened."""
        self._events.begin()

    def take(self, response: JobResponse) -> job_pb2.WatchFrame | None:
        """Return the frame if it is news: an event that comes next, or the end."""
        frame = response.frame
        kind = frame.WhichOneof("frame")
        if kind == "event":
            return frame if self._events.is_next(frame.event.sequence) else None
        if kind is None:
            self._events.pass_over()
            return None
        if kind == "end":
            if frame.end.last_sequence > self.place and not self._events.holes:
                raise self._events.missing(f"the end came before event {frame.end.last_sequence}")
            self.ended = True
        self._events.patience.progress()
        return frame if self.ended else None

    def broken(self, error: ForgeError | None) -> float:
        """Return how long to wait before watching again, or raise the error when the patience is spent."""
        return self._events.patience.pause_s(error or UnavailableError("the stream closed before the job's end"))


class ModelPosition:
    """What of the outbox was delivered. A snapshot counts when it is whole; its pages are kept until then."""

    ended = False

    def __init__(self, after_sequence: int, give_up_after_s: float) -> None:
        self._events = _Sequence(after_sequence, give_up_after_s)
        self._pages: list[model_pb2.ModelSnapshot] = []

    @property
    def place(self) -> int:
        """The last sequence that was delivered."""
        return self._events.after_sequence

    def begin(self) -> None:
        """A new stream is opened: pages of a snapshot that broke off are void, for it is taken anew."""
        self._pages.clear()
        self._events.begin()

    def take(self, response: model_pb2.WatchModelsResponse) -> ModelNews | None:
        """Return the event that comes next, or the snapshot with its last page."""
        kind = response.WhichOneof("frame")
        if kind == "snapshot":
            return self._page(response.snapshot)
        if kind is None:
            self._events.pass_over()
            return None
        if self._pages:
            raise self._events.missing("the snapshot broke off before its last page")
        if kind == "event":
            return response.event if self._events.is_next(response.event.sequence) else None
        self._events.patience.progress()
        return None

    def _page(self, page: model_pb2.ModelSnapshot) -> ModelSnapshot | None:
        if self.place > 0 or (self._pages and page.last_sequence != self._pages[0].last_sequence):
            raise UnavailableError("a page of a snapshot came that was not asked for")
        self._pages.append(page)
        if page.more:
            return None
        models = tuple(model for one in self._pages for model in one.models)
        self._pages.clear()
        self._events.after_sequence = page.last_sequence
        self._events.patience.progress()
        return ModelSnapshot(models=models, last_sequence=page.last_sequence)

    def broken(self, error: ForgeError | None) -> float:
        """Return how long to wait before watching again, or raise the error when the patience is spent."""
        return self._events.patience.pause_s(error or UnavailableError("the stream closed, and a watch has no end"))


class LogPosition:
    """What of a job's logs was delivered: up to which place of which attempt's."""

    def __init__(self, attempt: int, position: int, give_up_after_s: float) -> None:
        self.place = (attempt, position)
        self.ended = False
        self._patience = Patience(give_up_after_s)

    def begin(self) -> None:
        """A new stream is opened."""

    def take(self, response: LogResponse) -> job_pb2.LogFrame | None:
        """Return the frame if it is news: lines or a gap that follow, or the end."""
        frame = response.frame
        kind = frame.WhichOneof("frame")
        if kind is None:
            return None
        if kind == "lines":
            self._advance(frame.lines, frame.lines.lines[0].position)
        elif kind == "gap":
            self._advance(frame.gap, frame.gap.position)
        self.ended = kind == "end"
        self._patience.progress()
        return None if kind == "heartbeat" else frame

    def _advance(self, part: job_pb2.LogLines | job_pb2.LogGap, begins_at: int) -> None:
        attempt, position = self.place
        expected = position if part.attempt == attempt or attempt == 0 else 0
        if part.attempt < attempt or begins_at != expected:
            raise UnavailableError(
                f"the server sent byte {begins_at} of attempt {part.attempt}'s log, and byte {expected} is next"
            )
        self.place = (part.attempt, part.next_position)

    def broken(self, error: ForgeError | None) -> float:
        """Return how long to wait before watching again, or raise the error when the patience is spent."""
        return self._patience.pause_s(error or UnavailableError("the stream closed before its end frame"))


def watch(
    open_stream: Callable[[PlaceT, float], Stream[ResponseT]], position: Position[ResponseT, NewsT, PlaceT]
) -> Generator[NewsT, None, None]:
    """Yield what is news, until the position has ended. `open_stream` takes a place and a timeout."""
    while not position.ended:
        error: ForgeError | None = None
        position.begin()
        stream = open_stream(position.place, STREAM_LIFE_S)
        try:
            for response in stream:
                if (news := position.take(response)) is not None:
                    yield news
                if position.ended:
                    return
        except BREAKS as broken:
            error = broken
        finally:
            stream.cancel()
        time.sleep(position.broken(error))


async def watch_aio(
    open_stream: Callable[[PlaceT, float], AioStream[ResponseT]], position: Position[ResponseT, NewsT, PlaceT]
) -> AsyncGenerator[NewsT, None]:
    """The same for asyncio."""
    while not position.ended:
        error: ForgeError | None = None
        position.begin()
        stream = open_stream(position.place, STREAM_LIFE_S)
        try:
            async for response in stream:
                if (news := position.take(response)) is not None:
                    yield news
                if position.ended:
                    return
        except BREAKS as broken:
            error = broken
        finally:
            stream.cancel()
        await asyncio.sleep(position.broken(error))
