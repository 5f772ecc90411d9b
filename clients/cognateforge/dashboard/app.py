"""The HTTP side: files, JSON to read, streams to follow, and one way to act."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from cognateforge.cli.plain import to_plain
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.dashboard import streams
from cognateforge.dashboard.artifacts import Artifacts
from cognateforge.dashboard.board import Board
from cognateforge.dashboard.guard import ActionGuard, HostGuard
from cognateforge.dashboard.history import History
from cognateforge.dashboard.plain import error_json, job_json, row_json, series_json
from cognateforge.dashboard.upstream import Upstream, Upstreams
from cognateforge.exceptions import (
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    ForgeError,
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
    PreconditionError,
    UnavailableError,
)
from cognateforge.exchange.v1 import resource_pb2
from cognateforge.job.v1 import job_pb2

STATIC = Path(__file__).parent / "static"
# The pages, which one file draws: its script reads the path.
PAGES = (
    "/",
    "/jobs",
    "/jobs/{service}/{id}",
    "/resources",
    "/models",
    "/models/{name}",
    "/agents",
    "/agents/{name}",
    "/compare/{kind}",
    "/alerts",
)
JOBS_PAGE = 50
# A job's first points, twice as many as a wide plot has pixels: a line's low and high of each.
POINTS = 1_600

# Streams at once, of all pages: each has one to a service behind it, of which that one bounds the number too.
STREAMS = 256
# The contract's numbers of attempts.
_MOST_ATTEMPTS = 2**31 - 1

_STATUS: tuple[tuple[type[ForgeError], int], ...] = (
    (InvalidRequestError, 400),
    (OutOfRangeError, 400),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (ConflictError, 409),
    (PreconditionError, 409),
    (UnavailableError, 503),
    (DeadlineExceededError, 504),
)
_VERBS = {"pause": "Pause", "resume": "Resume", "cancel": "Cancel"}

Handler = Callable[[Request], Awaitable[Response]]


def build(upstreams: Upstreams, *, actions: bool = False, names: Collection[str] = ()) -> Starlette:
    """Return the application. actions: whether jobs can be steered. names: hosts besides addresses and localhost."""
    pages = _Pages(upstreams, ActionGuard(actions))
    return Starlette(
        routes=pages.routes(),
        middleware=[Middleware(HostGuard, names=names)],
        exception_handlers={ForgeError: _on_error, HTTPException: _on_http_error},
        lifespan=pages.lifespan,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 502)
    return JSONResponse({"error": error_json(cast("ForgeError", error))}, status_code=status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    told = cast("HTTPException", error)
    return JSONResponse({"error": {"reason": "", "message": told.detail, "violations": []}}, told.status_code)


class _Pages:
    """The handlers. They ask the services, and write what these answer as JSON."""

    def __init__(self, upstreams: Upstreams, guard: ActionGuard) -> None:
        self._upstreams, self._guard = upstreams, guard
        self._artifacts, self._history = Artifacts(upstreams), History()
        self._board: Board | None = None
        self._streams = 0

    def _streamed(self, frames: AsyncGenerator[Any, None]) -> Response:
        """Return what follows a stream. Errors: HTTPException, where there are as many as there may be."""
        if self._streams >= STREAMS:
            raise HTTPException(503, f"{STREAMS} streams are open: close pages of this dashboard")
        self._streams += 1

        async def counted() -> AsyncIterator[Any]:
            async with aclosing(frames) as source:
                async for frame in source:
                    yield frame

        def ended() -> None:
            self._streams -= 1

        return _Streamed(counted(), ended)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Hold the clients open as long as the server runs."""
        await self._upstreams.open()
        try:
            yield
        finally:
            if self._board is not None:
                await self._board.close()
            await self._upstreams.close()

    @property
    def board(self) -> Board:
        """The board, made on the first look: it belongs to the running loop."""
        if self._board is None:
            self._board = Board(self._upstreams)
        return self._board

    def routes(self) -> list[Route | Mount]:
        """Return every path."""
        job = "/api/jobs/{service}/{id}"
        return [
            *(Route(path, self._page) for path in PAGES),
            Route("/api/session", self._session),
            Route("/api/board", self._board_stream),
            Route("/api/jobs", self._jobs),
            Route(job, self._job),
            Route(f"{job}/metrics", self._metrics),
            Route(f"{job}/history", self._past),
            Route(f"{job}/checkpoints", self._checkpoints),
            Route(f"{job}/events", self._events),
            Route(f"{job}/logs", self._logs),
            Route(f"{job}/{{verb}}", self._steer, methods=["POST"]),
            Route("/api/resources", self._resources),
            Route("/api/models", self._models),
            Route("/api/models/{name}", self._model),
            Route("/api/agents", self._agents),
            Route("/api/agents/{name}", self._agent),
            Route("/api/compare/{kind}", self._compare),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/api/{path:path}", self._nowhere),
            Route("/{path:path}", self._lost),
        ]

    async def _page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def _lost(self, request: Request) -> Response:
        """The same file: it says that there is no such page, beside the way to those that there are."""
        return FileResponse(STATIC / "index.html", status_code=404, headers={"cache-control": "no-cache"})

    async def _nowhere(self, request: Request) -> Response:
        raise HTTPException(404, f"there is no {request.url.path}")

    async def _session(self, request: Request) -> Response:
        token = self._guard.token if self._guard.allowed else ""
        return _json({"version": version("cognateforge"), "actions": self._guard.allowed, "token": token})

    async def _board_stream(self, request: Request) -> Response:
        async def follow() -> AsyncGenerator[Any, None]:
            async for seen in self.board.follow():
                yield streams.told("board", seen)

        return self._streamed(follow())

    # --- jobs

    def _job_of(self, request: Request) -> tuple[Upstream, str]:
        upstream = self._upstreams.of(request.path_params["service"])
        if upstream is None:
            raise HTTPException(404, "there are two services: cognate and agent")
        return upstream, f"jobs/{request.path_params['id']}"

    async def _jobs(self, request: Request) -> Response:
        query = request.query_params
        upstream = self._upstreams.of(query.get("service", "cognate"))
        if upstream is None:
            raise HTTPException(404, "there are two services: cognate and agent")
        known = job_pb2.JobState.keys()
        states = [f"JOB_STATE_{word}" for word in query.getlist("state")]
        if unknown := [state for state in states if state not in known]:
            raise HTTPException(400, f"state: {unknown[0].removeprefix('JOB_STATE_')} is no state of a job")
        numbers = [job_pb2.JobState.Value(state) for state in states]
        jobs, token = await upstream.page(numbers, JOBS_PAGE, query.get("token", ""))
        return _json({"items": [row_json(upstream.name, item) for item in jobs], "next_page_token": token})

    async def _job(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        return _json(job_json(upstream.name, await upstream.job(name)))

    async def _metrics(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        return _json({"series": series_json(await upstream.metrics(name, POINTS))})

    async def _past(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        job = (await upstream.job(name)).job
        until = min(_number(request, "until", job.last_sequence), job.last_sequence)
        return _json(await self._history.of(upstream, name, job.first_sequence, until))

    async def _checkpoints(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        return _json({"items": [to_plain(one) for one in await upstream.checkpoints(name)]})

    async def _events(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        place = request.headers.get("last-event-id", "")
        after = int(place) if re.fullmatch(r"\d{1,18}", place) else _number(request, "after", 0)
        return self._streamed(streams.job_events(upstream, name, after))

    async def _logs(self, request: Request) -> Response:
        upstream, name = self._job_of(request)
        place = re.fullmatch(r"(\d{1,9}):(\d{1,18})", request.headers.get("last-event-id", ""))
        begin = (
            (int(place[1]), int(place[2]))
            if place
            else (_number(request, "attempt", 0, _MOST_ATTEMPTS), _number(request, "position", 0))
        )
        return self._streamed(streams.job_logs(upstream, name, begin))

    async def _steer(self, request: Request) -> Response:
        if refusal := self._guard.refusal(request):
            raise HTTPException(403, refusal)
        upstream, name = self._job_of(request)
        verb = _VERBS.get(request.path_params["verb"])
        if verb is None:
            raise HTTPException(404, f"a job can be asked to {', '.join(_VERBS)}")
        try:
            request_id = str((await request.json())["request_id"])
        except (ValueError, KeyError, TypeError):
            raise HTTPException(400, "request_id: give a UUID, new for every new wish") from None
        return _json(job_json(upstream.name, await upstream.steer(verb, name, request_id)))

    # --- the rest

    async def _resources(self, request: Request) -> Response:
        client = self._upstreams.cognate_client
        available = await client.resources.GetAvailability(resource_pb2.GetAvailabilityRequest())
        ended = request.query_params.get("ended") == "1"
        reservations = await client.pretraining.ListReservations(
            pretraining_pb2.ListReservationsRequest(
                page_size=JOBS_PAGE, page_token=request.query_params.get("token", ""), include_ended=ended
            )
        )
        return _json({**to_plain(available), **to_plain(reservations)})

    async def _models(self, request: Request) -> Response:
        return _json(await self._artifacts.models(request.query_params.get("token", "")))

    async def _model(self, request: Request) -> Response:
        return _json(await self._artifacts.model(request.path_params["name"]))

    async def _agents(self, request: Request) -> Response:
        return _json(await self._artifacts.agents(request.query_params.get("token", "")))

    async def _agent(self, request: Request) -> Response:
        return _json(await self._artifacts.agent(request.path_params["name"]))

    async def _compare(self, request: Request) -> Response:
        kind, query = request.path_params["kind"], request.query_params
        if kind not in ("models", "agents"):
            raise HTTPException(404, "models or agents can be compared")
        return _json(await self._artifacts.compare(kind, query.get("a", ""), query.get("b", "")))


class _Streamed(EventSourceResponse):
    """A stream that tells when it is over, however it ends, also before it has begun."""

    def __init__(self, frames: AsyncIterator[Any], ended: Callable[[], None]) -> None:
        super().__init__(frames)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def _number(request: Request, name: str, default: int, most: int = 10**18) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > most:
        raise HTTPException(400, f"{name}: {text[:40]!r} is no number from 0")
    return int(text)


def _json(value: Any) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json", headers={"cache-control": "no-store"})
