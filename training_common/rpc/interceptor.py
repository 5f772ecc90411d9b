"""What every call passes before its servicer: one interceptor that runs the steps in their order.

    exception firewall -> request id -> caller -> policy -> the caller's limits -> deadline -> unknown fields
    -> field rules -> servicer -> audit -> log

They are one interceptor and not seven, because each one that gRPC calls costs more than all of these checks together.
A call is checked when its request has arrived; every RPC of the contract takes exactly one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import protovalidate
import sqlalchemy.exc
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import code_pb2
from grpc_status import rpc_status

from cognateforge._vendor.buf.validate import validate_pb2
from cognateforge.exceptions import (
    DeadlineExceededError,
    DeadlineRequiredError,
    FieldViolation,
    ForgeError,
    InternalError,
    InvalidFieldError,
    NoPolicyError,
    ResourceExhaustedError,
    RoleMissingError,
    UnavailableError,
    UnknownFieldError,
    to_status,
)
from training_common.rpc.audit import AuditLog
from training_common.rpc.identity import Caller, Callers, set_caller
from training_common.rpc.limits import CallerLimits
from training_common.rpc.patterns import in_words
from training_common.rpc.policy import OPEN, STANDARD_SERVICES, MethodPolicy
from training_common.telemetry import traces
from training_common.telemetry.calls import CallTelemetry

log = structlog.get_logger(__name__)

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DESCRIPTION_CHARS = 300
# From a call's headers to its request. Requests are small: even a poor line brings one in this time.
_ARRIVAL_S = 10.0
Requests = AsyncIterator[Message | None]
# For lists without a bound of their own, of which the contract has none.
MAX_ITEMS = 10_000
_LISTED_BYTES = 4096


@dataclass(kw_only=True)
class _Call:
    """One call's facts, as the steps find them."""

    method: str
    policy: MethodPolicy
    known: bool
    request_id: str
    started: float
    caller: str = ""
    peer: str = ""
    # The mutation's own id and what it is about, for the audit log.
    wish: str = ""
    name: str = ""
    # The servicer has been asked: what happens from here on is no refusal.
    admitted: bool = False
    unary: bool = True
    # Its place in a trace: the caller's word, what came of it, and the span where this server makes any.
    traceparent: str = ""
    trace: traces.TraceContext | None = None
    span: Any = None


class ContractInterceptor(grpc.aio.ServerInterceptor):
    """Holds every call to the contract and keeps what happens inside the server inside."""

    def __init__(
        self,
        table: Mapping[str, MethodPolicy],
        *,
        callers: Callers,
        limits: CallerLimits,
        audit: AuditLog,
        max_streams: int = 1000,
        telemetry: CallTelemetry | None = None,
    ) -> None:
        self._table = table
        self._callers = callers
        self._limits = limits
        self._audit = audit
        self._max_streams = max_streams
        self._streams = 0
        self._telemetry = telemetry

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        service = method[1:].partition("/")[0]
        if service in STANDARD_SERVICES:
            return self._bound_standard(handler, method)
        metadata: dict[str, Any] = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get(REQUEST_ID_KEY, "")
        request_id = str(given) if _REQUEST_ID.fullmatch(str(given)) else f"{random.getrandbits(128):032x}"
        call = _Call(
            method=method,
            policy=self._table.get(method, OPEN),
            known=method in self._table,
            request_id=request_id,
            started=time.monotonic(),
            unary=not handler.response_streaming,
            traceparent=str(metadata.get(traces.TRACEPARENT, "")),
        )
        return self._wrap(handler, call)

    def _wrap(self, handler: Any, call: _Call) -> grpc.RpcMethodHandler[Any, Any]:
        # As streams of requests, though there is one: a handler of a single request is not asked before that is there,
        # and somebody who sends none would hold the call without having been looked at.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.unary_stream, call),
                request_deserializer=_decoder(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.stream_unary_rpc_method_handler(
            self._unary(handler.unary_unary, call),
            request_deserializer=_decoder(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    @contextmanager
    def _stream_slot(self, method: str) -> Iterator[None]:
        """Count a stream as long as it is open. Errors: ResourceExhaustedError, when there are too many."""
        if self._streams >= self._max_streams:
            raise ResourceExhaustedError(
                f"{self._max_streams} streams are open, and the other calls are kept for short ones: end a stream, or "
                f"call {method} later"
            )
        self._streams += 1
        closed = self._telemetry.stream_opened(method) if self._telemetry is not None else None
        try:
            yield
        finally:
            self._streams -= 1
            if closed is not None:
                closed()

    def _bound_standard(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        """Bound the streams of health and reflection, which pass none of the other steps."""
        if not handler.response_streaming:
            return handler  # type: ignore[no-any-return]
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

        # Written with context.write, which serves behaviours of both kinds.
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            try:
                with self._limits.taking(self._callers.any(context)), self._stream_slot(method):
                    if inspect.iscoroutinefunction(behavior):
                        await behavior(request, context)
                        return
                    async for frame in behavior(request, context):
                        await context.write(frame)
            except ResourceExhaustedError as error:
                await context.abort_with_status(rpc_status.to_status(to_status(error)))

        wrap = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return wrap(
            serve,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behavior: Any, call: _Call) -> Any:
        async def serve(requests: Requests, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                with self._limits.taking(self._identify(context, call)):
                    request = await _only(requests, call)
                    answer = await behavior(self._admit(request, context, call), context)
            except asyncio.CancelledError:
                self._end(call, "CANCELLED")
                raise
            except Exception as error:
                return await self._refuse(error, context, call)
            self._end(call, "OK")
            return answer

        return serve

    def _stream(self, behavior: Any, call: _Call) -> Any:
        async def serve(requests: Requests, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                with self._limits.taking(self._identify(context, call)):
                    request = await _only(requests, call)
                    admitted = self._admit(request, context, call)
                    with self._stream_slot(call.method):
                        async for frame in behavior(admitted, context):
                            yield frame
            except Exception as error:
                await self._refuse(error, context, call)
                return
            except BaseException:  # the caller has let go
                self._end(call, "CANCELLED")
                raise
            self._end(call, "OK")

        return serve

    def _identify(self, context: grpc.aio.ServicerContext[Any, Any], call: _Call) -> Caller:
        """Bind the call's identity, and return a caller who may make it."""
        structlog.contextvars.bind_contextvars(request_id=call.request_id, **self._trace(call))
        call.peer = context.peer()
        caller = self._callers.of(context)
        call.caller = caller.name
        set_caller(caller)
        if not call.known:
            raise NoPolicyError(f"{call.method} carries no policy, so nobody may call it")
        if not (call.policy.roles & caller.roles):
            wanted = ", ".join(sorted(call.policy.roles))
            raise RoleMissingError(f"{call.method} is for {wanted}; caller {caller.name[:255]} has no such role")
        return caller

    def _trace(self, call: _Call) -> dict[str, str]:
        """Find the call's place in a trace, make it current, and return it as fields of log lines."""
        place = traces.parse(call.traceparent) if call.traceparent else None
        if self._telemetry is not None:
            call.span, place = self._telemetry.begin(call.method, place)
        call.trace = place
        traces.set_current(place)
        if place is None:
            return {}
        # Without a span of its own the call has the caller's, which is none of this server's.
        return {"trace_id": place.trace_id} | ({"span_id": place.span_id} if call.span is not None else {})

    def _admit(self, request: Message | None, context: grpc.aio.ServicerContext[Any, Any], call: _Call) -> Message:
        """Return the call's request, or raise the first thing that speaks against it."""
        if call.policy.deadline_required and context.time_remaining() is None:
            raise DeadlineRequiredError(f"{call.method} needs a deadline: set one in the client")
        if request is None:
            raise InvalidFieldError(f"the request's bytes are no message that {call.method} takes")
        if call.policy.mutation:
            call.wish, call.name = _text(request, "request_id"), _text(request, "name")
        _refuse_what_no_rule_allows(request)
        if call.policy.mutation:
            _refuse_unknown_fields(request)
        _check_rules(request)
        call.admitted = True
        if (name := call.name or _text(request, "name")).startswith("jobs/"):
            structlog.contextvars.bind_contextvars(job=name)
        return request

    async def _refuse(self, error: Exception, context: grpc.aio.ServicerContext[Any, Any], call: _Call) -> None:
        """End the call with the error's status. What is no ForgeError is told as INTERNAL, its detail in the log."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, ForgeError):
            answer = error
        elif isinstance(error, sqlalchemy.exc.OperationalError):
            log.error("store unavailable", method=call.method, detail=str(error.orig))
            answer = UnavailableError("the service's store does not answer: try again")
        else:
            log.exception("internal error", method=call.method)
            answer = InternalError()
        self._end(call, answer.reason_name(), status=answer.info().code or code_pb2.INTERNAL)
        await context.abort_with_status(rpc_status.to_status(to_status(answer, request_id=call.request_id)))

    def _end(self, call: _Call, outcome: str, *, status: int | None = None) -> None:
        """Tell the audit log of a mutation or a refusal, and the service's log and its telemetry of every call.

        status: the number of its gRPC status, where the outcome is a reason.
        """
        seconds = time.monotonic() - call.started
        milliseconds = round(seconds * 1000, 2)
        if self._telemetry is not None:
            self._telemetry.ended(
                call.method, outcome, status, seconds, call.span, call.trace, unary=call.unary, known=call.known
            )
        if call.policy.mutation or not call.admitted:
            self._audit.write(
                caller=call.caller,
                peer=call.peer,
                method=call.method,
                outcome=outcome,
                request_id=call.request_id,
                wish=call.wish,
                name=call.name,
                milliseconds=milliseconds,
            )
        log.info("rpc", method=call.method, outcome=outcome, caller=call.caller, milliseconds=milliseconds)


def _text(request: Message, field: str) -> str:
    value = getattr(request, field, "")
    return value if isinstance(value, str) else ""


async def _only(requests: Requests, call: _Call) -> Message | None:
    """Return the call's request. Errors: DeadlineExceededError, when it does not arrive; InvalidFieldError."""
    task, late = asyncio.current_task(), False

    def give_up() -> None:
        nonlocal late
        late = task.cancel() if task is not None else False

    # Not asyncio.timeout, which takes as long as the checks of the request.
    timer = asyncio.get_running_loop().call_later(_ARRIVAL_S, give_up)
    try:
        return await anext(requests)
    except asyncio.CancelledError:
        if task is None or not late or task.uncancel():
            raise
        raise DeadlineExceededError(
            f"no request of {call.method} arrived within {_ARRIVAL_S:g} s: send it with the call's headers"
        ) from None
    except StopAsyncIteration:
        raise InvalidFieldError(f"the call of {call.method} ended without a request: send one message") from None
    finally:
        timer.cancel()


def _decoder(decode: Callable[[bytes], Message] | None) -> Callable[[bytes], Message | None] | None:
    """Return a deserializer that gives None for bytes that are no message: gRPC would answer with the exception."""
    if decode is None:
        return None

    def decode_or_none(data: bytes) -> Message | None:
        try:
            return decode(data)
        except DecodeError:
            return None

    return decode_or_none


@functools.cache
def _list_bounds(descriptor: Descriptor) -> Mapping[str, int]:
    """Return the longest list that each repeated field of a message may hold, where its rules say so."""
    bounds = {}
    for field in descriptor.fields:
        rules = field.GetOptions().Extensions[validate_pb2.field].repeated
        if field.is_repeated and rules.HasField("max_items"):
            bounds[field.name] = rules.max_items
    return bounds


def _refuse_what_no_rule_allows(message: Message, path: str = "") -> None:
    """Refuse a list that is too long before anything looks at its items: the rules would be checked for each of them.

    A request of 1 MiB can hold a million items, whose checks would keep the event loop for half a minute.
    Refuse as well a text with a NUL character, for which PostgreSQL has no value.
    """
    bounds = _list_bounds(message.DESCRIPTOR)
    for field, value in message.ListFields():
        inner = f"{path}.{field.name}" if path else field.name
        if field.is_repeated and len(value) > bounds.get(field.name, MAX_ITEMS):
            description = f"must have at most {bounds.get(field.name, MAX_ITEMS)} items, got {len(value)}"
            raise InvalidFieldError(
                f"{inner}: {description}", violations=[FieldViolation(field=inner, description=description)]
            )
        if field.type == field.TYPE_STRING:
            _refuse_nul(value if field.is_repeated else (value,), inner)
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            texts = (text for entry in value.items() for text in entry if isinstance(text, str))
            _refuse_nul(texts, inner)
            continue
        for item in value if field.is_repeated else (value,):
            _refuse_what_no_rule_allows(cast("Message", item), inner)


def _refuse_nul(texts: Iterable[str], path: str) -> None:
    if any("\0" in text for text in texts):
        description = "must not hold a NUL character"
        raise InvalidFieldError(
            f"{path}: {description}", violations=[FieldViolation(field=path, description=description)]
        )


def _check_rules(request: Message) -> None:
    try:
        found = protovalidate.collect_violations(request)
    except protovalidate.EvaluationError as error:
        raise InvalidFieldError(f"the request's rules could not be evaluated: {error}") from error
    if not found:
        return
    violations = [
        FieldViolation(
            field=_path(item.proto),
            description=_described(item, request)[:_DESCRIPTION_CHARS],
        )
        for item in found
    ]
    text = "; ".join(f"{v.field or 'request'}: {v.description}" for v in violations)
    raise InvalidFieldError(text, violations=violations)


def _described(item: Any, request: Message) -> str:
    """Return what is asked for in words."""
    if item.proto.rule_id == "string.pattern":
        return in_words(str(item.rule_value))
    if item.proto.rule_id == "required" and (choices := _choices(item.proto.field, request.DESCRIPTOR)):
        return f"must be given: one of {', '.join(choices)}"
    return str(item.proto.message or item.proto.rule_id)


def _choices(path: Any, message: Any) -> list[str]:
    """Return what can stand where nothing does: the members of the oneof at a path, or of the message there."""
    for element in path.elements:
        if element.field_name in message.oneofs_by_name:
            return [field.name for field in message.oneofs_by_name[element.field_name].fields]
        field = message.fields_by_name.get(element.field_name)
        if field is None or field.message_type is None or field.message_type.GetOptions().map_entry:
            return []
        message = field.message_type
    # An optional field is a oneof of its own, under a name with an underscore.
    return [field.name for oneof in message.oneofs[:1] if not oneof.name.startswith("_") for field in oneof.fields]


def _path(violation: Any) -> str:
    """Return "plan.datasets[2].weight" for a violation's field path, nothing for one of the whole request."""
    parts = []
    if violation.field is None:
        return ""
    for element in violation.field.elements:
        subscript = "" if element.subscript is None else f"[{element.subscript.value!r}]"
        parts.append(f"{element.field_name}{subscript}")
    return ".".join(parts)


def _refuse_unknown_fields(request: Message) -> None:
    """Refuse a request that holds fields which this server does not know, and name the first."""
    known = type(request)()
    known.CopyFrom(request)
    known.DiscardUnknownFields()
    unknown_bytes = request.ByteSize() - known.ByteSize()
    # Listing fields takes some microseconds for each, and a request can hold half a million of them.
    if unknown_bytes > _LISTED_BYTES:
        raise UnknownFieldError(
            f"the request holds {unknown_bytes} bytes in fields that this server does not know: leave them out"
        )
    if unknown_bytes:
        _refuse_first_unknown(request)


def _refuse_first_unknown(message: Message, path: str = "") -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        where = path or "request"
        raise UnknownFieldError(
            f"{where} holds field number {number}, which this server does not know: leave it out, or use a server "
            "whose contract has it",
            violations=[FieldViolation(field=f"{path}{'.' if path else ''}#{number}", description="unknown field")],
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = f"{path}.{field.name}" if path else field.name
        for item in value if field.is_repeated else (value,):
            _refuse_first_unknown(cast("Message", item), inner)
