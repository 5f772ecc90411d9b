"""Other versions of the contract, as classes of their own, and real servers and clients that speak them.

    released   the descriptors that the last release froze
    today      what this tree has
    older      today without some of its parts: what a release before this one may lack
    newer      today with more of every kind of part: what a release after this one may have

All numbers of `newer` are far above what is in use, so that no later change takes one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import any_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cognateforge.exceptions import DOMAIN, ForgeError, UnknownFieldError, to_status

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "protos" / "released.binpb"
TODAY = ROOT / "clients" / "cognateforge" / "contract.binpb"

# Numbers of what is added, and its value on the wire where it is an enum's.
NEW_FIELD, NEW_VALUE = 900, 99
# Enums, oneofs and requests that a newer release adds to.
GROWING_ENUMS = (
    "artifact.v1.Problem",
    "artifact.v1.Tier",
    "cognate.v1.Dataset",
    "exchange.v1.LeaseState",
    "exchange.v1.MismatchKind",
    "exchange.v1.ModelChange",
    "exchange.v1.ModelState",
    "exchange.v1.ResourceKind",
    "exchange.v1.Verdict",
    "job.v1.JobState",
)
GROWING_ONEOFS = (
    "agent.v1.FetchAgentResponse.frame",
    "agent.v1.TrainingPlan.task",
    "artifact.v1.VerifyArtifactsResponse.frame",
    "exchange.v1.FetchModelResponse.frame",
    "exchange.v1.ModelEvent.kind",
    "exchange.v1.WatchModelsResponse.frame",
    "job.v1.JobEvent.kind",
    "job.v1.WatchFrame.frame",
)
GROWING_MESSAGES = (
    "agent.v1.ListAgentsRequest",
    "agent.v1.SetAliasRequest",
    "artifact.v1.CollectArtifactsRequest",
    "artifact.v1.Storage",
    "cognate.v1.Curriculum",
    "cognate.v1.ListJobsRequest",
    "cognate.v1.PretrainingPlan",
    "exchange.v1.CheckCompatibilityRequest",
    "exchange.v1.FoundationModel",
    "exchange.v1.ReleaseLeaseRequest",
    "job.v1.Job",
)


class Contract:
    """One version of the contract. Its classes are not those that are installed."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.AddSerializedFile(file.SerializeToString())
        services = [
            self._pool.FindServiceByName(f"{file.package}.{service.name}")
            for file in files.file
            if file.package.startswith("cognateforge.")
            for service in file.service
        ]
        # By "ModelService/GetModel": no two services have the same name.
        self.methods: dict[str, MethodDescriptor] = {
            f"{service.name}/{method.name}": method for service in services for method in service.methods
        }

    def __contains__(self, method: str) -> bool:
        return method in self.methods

    def new(self, name: str, values: Mapping[str, Any] | None = None) -> Message:
        """Return a message, "job.v1.Job", out of its JSON form."""
        made = message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"cognateforge.{name}"))()
        return json_format.ParseDict(dict(values or {}), made)


def path_of(method: MethodDescriptor) -> str:
    """Return a method as it is called."""
    return f"/{method.containing_service.full_name}/{method.name}"


def request_class(method: MethodDescriptor) -> type[Message]:
    """Return the class of a method's requests, of its own version."""
    return message_factory.GetMessageClass(method.input_type)


def answer_class(method: MethodDescriptor) -> type[Message]:
    """Return the class of a method's answers, of its own version."""
    return message_factory.GetMessageClass(method.output_type)


def _load(path: Path) -> FileDescriptorSet:
    return FileDescriptorSet.FromString(path.read_bytes())


def released() -> Contract:
    """The contract of the last release."""
    return Contract(_load(RELEASED))


def today() -> Contract:
    """The contract of this tree."""
    return Contract(_load(TODAY))


def newer() -> Contract:
    """Today's contract, grown in every way that the rules of change allow."""
    edit = _Edit(_load(TODAY))
    for name in GROWING_ENUMS:
        edit.add_value(name)
    for name in GROWING_ONEOFS:
        message, _, oneof = name.rpartition(".")
        edit.add_field(message, oneof=oneof)
    for name in GROWING_MESSAGES:
        edit.add_field(name)
    edit.add_method("exchange.v1.ModelService", "RetractModel", like="GetModel")
    return Contract(edit.files)


def older() -> Contract:
    """Today's contract without some of its RPCs, fields, frames and values."""
    edit = _Edit(_load(TODAY))
    edit.remove_service("artifact.v1.StorageService")
    edit.remove_service("exchange.v1.ResourceService")
    for method in ("WatchModels", "RegisterDependents", "ReleaseDependents", "ListDependents"):
        edit.remove_method("exchange.v1.ModelService", method)
    for message, field in (
        ("cognate.v1.PretrainingPlan", "curriculum"),
        ("exchange.v1.CheckCompatibilityResponse", "compared"),
        ("exchange.v1.FoundationModel", "storage"),
        ("exchange.v1.Mismatch", "kind"),
        ("exchange.v1.ModelEvent", "changed"),
        ("exchange.v1.WatchModelsResponse", "snapshot"),
        ("job.v1.Job", "artifact"),
        ("job.v1.JobEvent", "artifact_published"),
    ):
        edit.remove_field(message, field)
    for value in ("JOB_STATE_PAUSED", "JOB_STATE_PAUSING", "JOB_STATE_CANCELLING", "JOB_STATE_RECOVERING"):
        edit.remove_value("job.v1.JobState", value)
    return Contract(edit.files)


class _Edit:
    """Changes of a set of descriptors, by names without "cognateforge."."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self.files = files
        for file in files.file:
            file.ClearField("source_code_info")  # its positions would no longer be right

    def _file(self, name: str) -> tuple[FileDescriptorProto, str]:
        package, _, short = f"cognateforge.{name}".rpartition(".")
        kinds = ("message_type", "enum_type", "service")
        file = next(
            file
            for file in self.files.file
            if file.package == package and any(short == one.name for kind in kinds for one in getattr(file, kind))
        )
        return file, short

    def _message(self, name: str) -> DescriptorProto:
        file, short = self._file(name)
        return next(one for one in file.message_type if one.name == short)

    def _enum(self, name: str) -> EnumDescriptorProto:
        file, short = self._file(name)
        return next(one for one in file.enum_type if one.name == short)

    def _service(self, name: str) -> ServiceDescriptorProto:
        file, short = self._file(name)
        return next(one for one in file.service if one.name == short)

    def add_value(self, enum: str) -> None:
        prefix = self._enum(enum).value[0].name.removesuffix("UNSPECIFIED")
        self._enum(enum).value.add(name=f"{prefix}NEW", number=NEW_VALUE)

    def remove_value(self, enum: str, value: str) -> None:
        values = self._enum(enum).value
        del values[next(index for index, one in enumerate(values) if one.name == value)]

    def add_field(self, message: str, *, oneof: str = "") -> None:
        found = self._message(message)
        field = found.field.add(
            name=f"new_{oneof}" if oneof else "new",
            number=NEW_FIELD,
            type=FieldDescriptorProto.TYPE_STRING,
            label=FieldDescriptorProto.LABEL_OPTIONAL,
        )
        if oneof:
            field.oneof_index = next(index for index, one in enumerate(found.oneof_decl) if one.name == oneof)

    def remove_field(self, message: str, field: str) -> None:
        fields = self._message(message).field
        del fields[next(index for index, one in enumerate(fields) if one.name == field)]

    def add_method(self, service: str, name: str, *, like: str) -> None:
        methods = self._service(service).method
        methods.add().CopyFrom(next(one for one in methods if one.name == like))
        methods[-1].name = name

    def remove_method(self, service: str, name: str) -> None:
        methods = self._service(service).method
        del methods[next(index for index, one in enumerate(methods) if one.name == name)]

    def remove_service(self, name: str) -> None:
        file, short = self._file(name)
        del file.service[next(index for index, one in enumerate(file.service) if one.name == short)]


class Caller:
    """Calls a server with the classes of one version, and keeps which methods it has called."""

    def __init__(self, channel: grpc.aio.Channel, contract: Contract) -> None:
        self._channel, self._contract = channel, contract
        self.methods = contract.methods
        self.called: set[str] = set()

    async def __call__(self, method: str, **request: Any) -> Any:
        """Return the answer of a unary method, out of the JSON form of its request."""
        found = self._found(method)
        call = self._channel.unary_unary(
            path_of(found), request_class(found).SerializeToString, answer_class(found).FromString
        )
        return await call(json_format.ParseDict(request, request_class(found)()), timeout=60)

    async def frames(self, method: str, count: int = 0, **request: Any) -> list[Any]:
        """Return the first frames of a stream, all of them where no count is given."""
        found = self._found(method)
        stream = self._channel.unary_stream(
            path_of(found), request_class(found).SerializeToString, answer_class(found).FromString
        )
        call = stream(json_format.ParseDict(request, request_class(found)()), timeout=20)
        read = []
        async for frame in call:
            read.append(frame)
            if len(read) == count:
                call.cancel()
                break
        return read

    def _found(self, method: str) -> MethodDescriptor:
        self.called.add(method)
        return self._contract.methods[method]


# What a server of another version answers: a message's JSON form, a stream's, or an error.
Answer: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | ForgeError | status_pb2.Status


def new_reason(code: int, reason: str = "SOMETHING_NEW", message: str = "it is not to be") -> status_pb2.Status:
    """Return an error as a newer server would put it: with a reason that is not in today's table."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"fact": "7"}))
    return status_pb2.Status(code=code, message=message, details=[detail])


class ContractServer(grpc.GenericRpcHandler):
    """Speaks one version of the contract and nothing else, from a table of answers.

    What it has no answer for it answers with a message whose every field is set. A method that its version lacks is
    UNIMPLEMENTED, by gRPC itself, and a mutation with a field that its version lacks is UNKNOWN_FIELD.
    """

    def __init__(self, contract: Contract, answers: Mapping[str, Answer]) -> None:
        self._contract = contract
        self._answers = answers
        self._by_path = {path_of(method): (name, method) for name, method in contract.methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Message, Message] | None:
        """Return the handler of a method of this version."""
        found = self._by_path.get(handler_call_details.method)
        if found is None:
            return None
        name, method = found

        def stream(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            if "request_id" in method.input_type.fields_by_name and _has_unknown(request):
                _abort(context, to_status(UnknownFieldError()))
            answer = self._answers.get(name)
            if isinstance(answer, ForgeError):
                _abort(context, to_status(answer))
            if isinstance(answer, status_pb2.Status):
                _abort(context, answer)
            if answer is None:
                yield filled(answer_class(method)())
                return
            assert isinstance(answer, Mapping | Sequence)
            for values in [answer] if isinstance(answer, Mapping) else answer:
                yield json_format.ParseDict(dict(values), answer_class(method)())

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream, request_class(method).FromString, answer_class(method).SerializeToString
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: next(stream(request, context)),
            request_class(method).FromString,
            answer_class(method).SerializeToString,
        )


@contextmanager
def serving(contract: Contract, answers: Mapping[str, Answer] | None = None) -> Iterator[str]:
    """Yield the address of a server of one version."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([ContractServer(contract, answers or {})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _abort(context: grpc.ServicerContext, status: status_pb2.Status) -> None:
    assert status.code != code_pb2.OK
    context.abort_with_status(rpc_status.to_status(status))


def _has_unknown(message: Message) -> bool:
    return len(UnknownFieldSet(message)) > 0 or any(
        _has_unknown(item)
        for field, value in message.ListFields()
        if field.message_type is not None and not field.message_type.GetOptions().map_entry
        for item in (value if field.is_repeated else (value,))
    )


def filled(message: Message, depth: int = 6) -> Message:
    """Set every field of a message and of those in it: of a oneof the last member, of an enum the last value."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            if depth:
                target = getattr(message, field.name)
                filled(target.add() if field.is_repeated else target, depth - 1)
                if not field.is_repeated:
                    target.SetInParent()
            continue
        value = _sample(field)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def _sample(field: Any) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"x" if field.type == FieldDescriptor.TYPE_BYTES else "x"
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return 1.5
    return field.cpp_type == FieldDescriptor.CPPTYPE_BOOL or 1
