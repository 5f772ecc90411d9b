"""What every call of a client passes through: request id, deadline, circuit breaker, typed errors.

One guard, in this order, for sync and asyncio, unary calls and streams. Every failure leaves as a ForgeError.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import grpc.aio

from cognateforge.client.breaker import Admission, CallBreaker
from cognateforge.client.deadline import call_timeout_s
from cognateforge.exceptions import from_rpc_error

if TYPE_CHECKING:
    from grpc import _CallFuture, _CallIterator

REQUEST_ID_KEY = "x-request-id"

Req = TypeVar("Req")
Res = TypeVar("Res")


@dataclass(frozen=True, kw_only=True)
class CallGuard:
    """The rules that the calls of one client share."""

    breaker: CallBreaker
    timeout_s: float

    def timeout(self, asked_s: float | None, *, stream: bool) -> float | None:
        """Return the deadline to send. A stream lives as long as its job, so it has no default."""
        return call_timeout_s(asked_s, None if stream else self.timeout_s)


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class SyncGuard(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Guards the calls of a grpc.Channel. A call's `future()` returns only when the call has ended."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard

    def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Req], _CallFuture[Res]],
        client_call_details: grpc.ClientCallDetails,
        request: Req,
    ) -> _CallFuture[Res]:
        details = self._outgoing(client_call_details, stream=False)
        admission = self._guard.breaker.admit()
        try:
            outcome = continuation(details, request)
            error = outcome.exception()
        except BaseException:  # KeyboardInterrupt, for one
            admission.abandoned()
            raise
        if isinstance(error, grpc.RpcError):
            admission.failed(error)
            raise from_rpc_error(error) from error
        admission.answered() if error is None else admission.abandoned()
        return outcome

    def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Req], _CallIterator[Res]],
        client_call_details: grpc.ClientCallDetails,
        request: Req,
    ) -> _CallIterator[Res]:
        details = self._outgoing(client_call_details, stream=True)
        admission = self._guard.breaker.admit()
        try:
            call = continuation(details, request)
        except BaseException:
            admission.abandoned()
            raise
        return cast("_CallIterator[Res]", _GuardedStream(call, admission))

    def _outgoing(self, details: grpc.ClientCallDetails, *, stream: bool) -> grpc.ClientCallDetails:
        metadata = tuple(details.metadata or ())
        if all(key != REQUEST_ID_KEY for key, _ in metadata):
            metadata = (*metadata, (REQUEST_ID_KEY, str(uuid.uuid4())))
        return _Details(
            details.method,
            self._guard.timeout(details.timeout, stream=stream),
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


class _GuardedStream(Iterator[Res]):
    """A stream whose first frame settles the breaker, and whose failure is a ForgeError."""

    def __init__(self, call: _CallIterator[Res], admission: Admission) -> None:
        self._call = call
        self._admission = admission
        self._cancelled = False

    def __next__(self) -> Res:
        try:
            frame = next(self._call)
        except grpc.RpcError as error:
            self._admission.abandoned() if self._cancelled else self._admission.failed(error)
            raise from_rpc_error(error) from error
        except StopIteration:
            self._admission.answered()
            raise
        except BaseException:
            self.cancel()
            raise
        self._admission.answered()
        return frame

    def cancel(self) -> bool:
        """End the stream from this side."""
        self._cancelled = True
        self._admission.abandoned()
        return self._call.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __del__(self) -> None:
        self.cancel()


def _outgoing_aio(guard: CallGuard, details: grpc.aio.ClientCallDetails, *, stream: bool) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    if metadata.get(REQUEST_ID_KEY) is None:
        metadata.add(REQUEST_ID_KEY, str(uuid.uuid4()))
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=guard.timeout(details.timeout, stream=stream),
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


class AioUnaryGuard(grpc.aio.UnaryUnaryClientInterceptor):
    """Guards the unary calls of a grpc.aio.Channel, which takes one kind of call per interceptor."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Req], Awaitable[grpc.aio.UnaryUnaryCall[Req, Res]]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Req,
    ) -> grpc.aio.UnaryUnaryCall[Req, Res]:
        details = _outgoing_aio(self._guard, client_call_details, stream=False)
        admission = self._guard.breaker.admit()
        try:
            call = await continuation(details, request)
            await call
        except grpc.RpcError as error:
            admission.failed(error)
            raise from_rpc_error(error) from error
        except BaseException:
            admission.abandoned()
            raise
        admission.answered()
        return call


class AioStreamGuard(grpc.aio.UnaryStreamClientInterceptor):
    """Guards the streams of a grpc.aio.Channel."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard

    async def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Req], Awaitable[grpc.aio.UnaryStreamCall[Req, Res]]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Req,
    ) -> AsyncIterator[Res]:
        details = _outgoing_aio(self._guard, client_call_details, stream=True)
        admission = self._guard.breaker.admit()
        try:
            call = await continuation(details, request)
        except BaseException:
            admission.abandoned()
            raise
        # However the call ends, unread or cancelled, the breaker hears of it. After a settlement this does nothing.
        call.add_done_callback(lambda _: admission.abandoned() if call.cancelled() else None)
        return _drain(call, admission)


async def _drain(call: grpc.aio.UnaryStreamCall[Req, Res], admission: Admission) -> AsyncIterator[Res]:
    try:
        async for frame in call:
            admission.answered()
            yield frame
    except grpc.RpcError as error:
        admission.failed(error)
        raise from_rpc_error(error) from error
    except (asyncio.CancelledError, GeneratorExit):
        admission.abandoned()
        call.cancel()
        raise
    admission.answered()
