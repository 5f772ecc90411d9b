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

from cognateforge.client import tracing
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


class _Under:
    """A call that is under way: the breaker's admission and, where the program traces its calls, the call's span."""

    def __init__(self, guard: CallGuard, method: str) -> None:
        self._admission: Admission = guard.breaker.admit()
        self._span = tracing.begin(method)

    def headers(self) -> tuple[tracing.Header, ...]:
        """Return the metadata of its trace."""
        return () if self._span is None else self._span.headers()

    def answered(self) -> None:
        """The service has answered; a stream may go on."""
        self._admission.answered()

    def ended(self) -> None:
        """The call has ended well."""
        self._admission.answered()
        self._end(grpc.StatusCode.OK)

    def failed(self, error: grpc.RpcError) -> None:
        """The call has ended with a status."""
        self._admission.failed(error)
        self._end(error.code())

    def abandoned(self) -> None:
        """This side has let go of the call."""
        self._admission.abandoned()
        self._end(grpc.StatusCode.CANCELLED)

    def _end(self, status: grpc.StatusCode) -> None:
        if self._span is not None:
            self._span.end(status)


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
        under = _Under(self._guard, client_call_details.method)
        try:
            details = self._outgoing(client_call_details, under, stream=False)
            outcome = continuation(details, request)
            error = outcome.exception()
        except BaseException:  # KeyboardInterrupt, for one
            under.abandoned()
            raise
        if isinstance(error, grpc.RpcError):
            under.failed(error)
            raise from_rpc_error(error) from error
        under.ended() if error is None else under.abandoned()
        return outcome

    def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Req], _CallIterator[Res]],
        client_call_details: grpc.ClientCallDetails,
        request: Req,
    ) -> _CallIterator[Res]:
        under = _Under(self._guard, client_call_details.method)
        try:
            details = self._outgoing(client_call_details, under, stream=True)
            call = continuation(details, request)
        except BaseException:
            under.abandoned()
            raise
        return cast("_CallIterator[Res]", _GuardedStream(call, under))

    def _outgoing(self, details: grpc.ClientCallDetails, under: _Under, *, stream: bool) -> grpc.ClientCallDetails:
        metadata = tuple(details.metadata or ())
        if all(key != tracing.TRACEPARENT for key, _ in metadata):
            metadata = (*metadata, *under.headers())
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

    def __init__(self, call: _CallIterator[Res], under: _Under) -> None:
        self._call = call
        self._under = under
        self._cancelled = False

    def __next__(self) -> Res:
        try:
            frame = next(self._call)
        except grpc.RpcError as error:
            self._under.abandoned() if self._cancelled else self._under.failed(error)
            raise from_rpc_error(error) from error
        except StopIteration:
            self._under.ended()
            raise
        except BaseException:
            self.cancel()
            raise
        self._under.answered()
        return frame

    def cancel(self) -> bool:
        """End the stream from this side."""
        self._cancelled = True
        self._under.abandoned()
        return self._call.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __del__(self) -> None:
        self.cancel()


def _outgoing_aio(
    guard: CallGuard, details: grpc.aio.ClientCallDetails, under: _Under, *, stream: bool
) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    if metadata.get(tracing.TRACEPARENT) is None:
        for key, value in under.headers():
            metadata.add(key, value)
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
        under = _Under(self._guard, _name(client_call_details.method))
        try:
            details = _outgoing_aio(self._guard, client_call_details, under, stream=False)
            call = await continuation(details, request)
            await call
        except grpc.RpcError as error:
            under.failed(error)
            raise from_rpc_error(error) from error
        except BaseException:
            under.abandoned()
            raise
        under.ended()
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
        under = _Under(self._guard, _name(client_call_details.method))
        try:
            details = _outgoing_aio(self._guard, client_call_details, under, stream=True)
            call = await continuation(details, request)
        except BaseException:
            under.abandoned()
            raise
        # However the call ends, unread or cancelled, the breaker hears of it. After a settlement this does nothing.
        call.add_done_callback(lambda _: under.abandoned() if call.cancelled() else None)
        return _drain(call, under)


def _name(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method


async def _drain(call: grpc.aio.UnaryStreamCall[Req, Res], under: _Under) -> AsyncIterator[Res]:
    try:
        async for frame in call:
            under.answered()
            yield frame
    except grpc.RpcError as error:
        under.failed(error)
        raise from_rpc_error(error) from error
    except (asyncio.CancelledError, GeneratorExit):
        under.abandoned()
        call.cancel()
        raise
    under.ended()
