"""Every error of this project, the same class on both sides of the wire.

    ForgeError
    ├── InvalidRequestError            InvalidFieldError, UnknownFieldError, InvalidPageTokenError,
    │                                  DeadlineRequiredError
    ├── ForbiddenError                 RoleMissingError, NoPolicyError, IdentityMissingError
    ├── ConflictError                  RequestIdReusedError
    ├── NotFoundError                  JobNotFoundError, ModelNotFoundError, AgentNotFoundError, LeaseNotFoundError,
    │                                  CheckpointNotFoundError, AttemptNotFoundError, ReservationNotFoundError
    ├── OutOfRangeError                SequenceOutOfRangeError, OffsetOutOfRangeError
    ├── PreconditionError              IllegalTransitionError, ModelExperimentalError, IncompatibleError,
    │                                  ArchitectureNotFoundError, DataUnavailableError, JobFailedError,
    │                                  RetryBudgetSpentError, TrainingDivergedError, IntegrityCheckFailedError,
    │                                  FoundationNotFoundError, TooManyAliasesError, LeaseEndedError,
    │                                  CapacityTakenError, CheckpointGoneError, JobDeadlineExceededError,
    │                                  LogGoneError, VerificationOpenError, QuotaTooSmallError,
    │                                  ReservationConflictError, ArtifactInUseError, ProvenanceRefusedError
    ├── NotImplementedByServerError
    ├── ArtifactCorruptError
    ├── UnavailableError               CircuitOpenError
    ├── DeadlineExceededError
    ├── ResourceExhaustedError
    ├── InternalError
    └── LocalError                     ClientSetupError, LocalStorageError: the caller's own side, never on the wire

A reason (cognateforge.errors.v1.Reason) has one class, and the contract's table gives its status. A server raises the
class, `to_status` makes google.rpc.Status of it, and the client's `from_rpc_error` makes the same class again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cognateforge.errors.v1 import reasons_pb2
from cognateforge.errors.v1.reasons_pb2 import Reason

DOMAIN = "cognateforge"
MAX_MESSAGE_CHARS = 2000
MAX_VIOLATIONS = 20
# A status travels in trailing metadata. gRPC begins to drop what has more than 8 KiB in all, and the caller would then
# see RESOURCE_EXHAUSTED in its place. What is left is for ErrorInfo, RequestInfo and the headers' names.
_MESSAGE_BYTES = 4000
_VIOLATIONS_BYTES = 3000


@dataclass(frozen=True, kw_only=True)
class FieldViolation:
    """One field that breaks a rule."""

    field: str
    description: str


class ForgeError(Exception):
    """The root of the tree. Raise a subclass."""

    reason: ClassVar[Reason.ValueType] = Reason.REASON_UNSPECIFIED

    def __init__(
        self,
        message: str = "",
        *,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        self.message = (message or self.info().message)[:MAX_MESSAGE_CHARS]
        self.violations = tuple(violations)[:MAX_VIOLATIONS]
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        # The reason of an answer whose reason this release does not know: the class is then the nearest by status.
        self.unknown_reason = ""
        super().__init__(self.message)

    @classmethod
    def info(cls) -> reasons_pb2.ReasonInfo:
        """Return the contract's row for this class's reason."""
        return Reason.DESCRIPTOR.values_by_number[cls.reason].GetOptions().Extensions[reasons_pb2.info]

    @classmethod
    def reason_name(cls) -> str:
        """Return the reason as it travels in ErrorInfo, without its prefix."""
        return Reason.Name(cls.reason).removeprefix("REASON_")

    @classmethod
    def status_name(cls) -> str:
        """Return the gRPC status, for instance "NOT_FOUND"; "" for a class that is no server's answer."""
        if cls.reason:
            return str(code_pb2.Code.Name(cls.info().code))
        return next((code.name for code, other in _BY_CODE.items() if other is cls), "")

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without a change."""
        return self.info().retryable


class InvalidRequestError(ForgeError):
    """The request itself is wrong, whatever the server's state."""


class InvalidFieldError(InvalidRequestError):
    """A field breaks a rule of the contract; `violations` names it."""

    reason = Reason.REASON_INVALID_FIELD


class UnknownFieldError(InvalidRequestError):
    """The request holds a field that the server does not know."""

    reason = Reason.REASON_UNKNOWN_FIELD


class InvalidPageTokenError(InvalidRequestError):
    """The page token was not made for this query."""

    reason = Reason.REASON_INVALID_PAGE_TOKEN


class DeadlineRequiredError(InvalidRequestError):
    """The call needs a deadline and has none."""

    reason = Reason.REASON_DEADLINE_REQUIRED


class ForbiddenError(ForgeError):
    """The caller may not do this."""


class RoleMissingError(ForbiddenError):
    """The caller has none of the roles that may make this call."""

    reason = Reason.REASON_ROLE_MISSING


class NoPolicyError(ForbiddenError):
    """The method carries no policy, so nobody may call it."""

    reason = Reason.REASON_NO_POLICY


class IdentityMissingError(ForbiddenError):
    """The caller's certificate tells nobody's name."""

    reason = Reason.REASON_IDENTITY_MISSING


class ConflictError(ForgeError):
    """The request contradicts an earlier one."""


class RequestIdReusedError(ConflictError):
    """The same request_id came before with another payload."""

    reason = Reason.REASON_REQUEST_ID_REUSED


class NotFoundError(ForgeError):
    """What the request names does not exist."""


class JobNotFoundError(NotFoundError):
    """No such job."""

    reason = Reason.REASON_JOB_NOT_FOUND


class CheckpointNotFoundError(NotFoundError):
    """The job has no checkpoint of that step, or none with that digest."""

    reason = Reason.REASON_CHECKPOINT_NOT_FOUND


class ModelNotFoundError(NotFoundError):
    """No such foundation model version."""

    reason = Reason.REASON_MODEL_NOT_FOUND


class AgentNotFoundError(NotFoundError):
    """No such agent version or alias."""

    reason = Reason.REASON_AGENT_NOT_FOUND


class LeaseNotFoundError(NotFoundError):
    """No such lease of this caller."""

    reason = Reason.REASON_LEASE_NOT_FOUND


class OutOfRangeError(ForgeError):
    """A position lies beyond the end of what it points into."""


class SequenceOutOfRangeError(OutOfRangeError):
    """after_sequence is beyond the last event."""

    reason = Reason.REASON_SEQUENCE_OUT_OF_RANGE


class OffsetOutOfRangeError(OutOfRangeError):
    """offset_bytes is beyond the artifact's end."""

    reason = Reason.REASON_OFFSET_OUT_OF_RANGE


class PreconditionError(ForgeError):
    """The request is well-formed, but the state of things does not allow it."""


class IllegalTransitionError(PreconditionError):
    """The job's state does not allow this; the message lists the states that would."""

    reason = Reason.REASON_ILLEGAL_TRANSITION


class ModelExperimentalError(PreconditionError):
    """The model is EXPERIMENTAL and the request does not accept that."""

    reason = Reason.REASON_MODEL_EXPERIMENTAL


class IncompatibleError(PreconditionError):
    """Foundation model and agent architecture do not fit together."""

    reason = Reason.REASON_INCOMPATIBLE


class ArchitectureNotFoundError(PreconditionError):
    """No agent architecture of that name is installed."""

    reason = Reason.REASON_ARCHITECTURE_NOT_FOUND


class DataUnavailableError(PreconditionError):
    """The data that the request names is not there, or not usable."""

    reason = Reason.REASON_DATA_UNAVAILABLE


class JobFailedError(PreconditionError):
    """A job ended without success."""

    reason = Reason.REASON_JOB_FAILED


class RetryBudgetSpentError(PreconditionError):
    """The worker process died more often than the retry budget allows."""

    reason = Reason.REASON_RETRY_BUDGET_SPENT


class TrainingDivergedError(PreconditionError):
    """Loss, gradient or filter state is not finite."""

    reason = Reason.REASON_TRAINING_DIVERGED


class IntegrityCheckFailedError(PreconditionError):
    """An integrity check failed, so nothing was published."""

    reason = Reason.REASON_INTEGRITY_CHECK_FAILED


class FoundationNotFoundError(PreconditionError):
    """Cognate has no such foundation model, so no agent can be made of it."""

    reason = Reason.REASON_FOUNDATION_NOT_FOUND


class TooManyAliasesError(PreconditionError):
    """The version has as many aliases as an answer can list; one of them can be moved elsewhere."""

    reason = Reason.REASON_TOO_MANY_ALIASES


class LeaseEndedError(PreconditionError):
    """The lease has ended, or the fencing token is not its own; nothing was changed."""

    reason = Reason.REASON_LEASE_ENDED


class CapacityTakenError(PreconditionError):
    """The capacity is in use, lent already, or kept back; it may be free later."""

    reason = Reason.REASON_CAPACITY_TAKEN


class CheckpointGoneError(PreconditionError):
    """The checkpoint's files were removed by retention or found damaged."""

    reason = Reason.REASON_CHECKPOINT_GONE


class JobDeadlineExceededError(PreconditionError):
    """The job passed a deadline of its own."""

    reason = Reason.REASON_JOB_DEADLINE_EXCEEDED


class AttemptNotFoundError(NotFoundError):
    """The job has had no attempt of that number."""

    reason = Reason.REASON_ATTEMPT_NOT_FOUND


class LogGoneError(PreconditionError):
    """The attempt's log was removed by retention, or is not among the files that the server reaches."""

    reason = Reason.REASON_LOG_GONE


class VerificationOpenError(PreconditionError):
    """A verification of the job is under way."""

    reason = Reason.REASON_VERIFICATION_OPEN


class QuotaTooSmallError(PreconditionError):
    """The job alone is larger than its tenant's quota."""

    reason = Reason.REASON_QUOTA_TOO_SMALL


class ReservationNotFoundError(NotFoundError):
    """There is no such reservation, or it is over."""

    reason = Reason.REASON_RESERVATION_NOT_FOUND


class ReservationConflictError(PreconditionError):
    """The slots are reserved already for a part of that time."""

    reason = Reason.REASON_RESERVATION_CONFLICT


class ArtifactInUseError(PreconditionError):
    """Something depends on the version: it is pinned, its family's newest, has an alias, or others descend from it."""

    reason = Reason.REASON_ARTIFACT_IN_USE


class ProvenanceRefusedError(PreconditionError):
    """A version's statement or signature is missing or does not hold, and the reader's policy asks for it."""

    reason = Reason.REASON_PROVENANCE_REFUSED


class NotImplementedByServerError(ForgeError):
    """Part of the contract that this release does not serve yet."""

    reason = Reason.REASON_NOT_IMPLEMENTED


class ArtifactCorruptError(ForgeError):
    """Bytes do not have the digest that their manifest states."""

    reason = Reason.REASON_ARTIFACT_CORRUPT


class UnavailableError(ForgeError):
    """The service cannot answer now."""

    reason = Reason.REASON_UNAVAILABLE


class CircuitOpenError(UnavailableError):
    """The client's circuit breaker is open: nothing was sent."""

    reason = Reason.REASON_CIRCUIT_OPEN


class DeadlineExceededError(ForgeError):
    """The deadline passed before the answer."""

    reason = Reason.REASON_DEADLINE_EXCEEDED


class ResourceExhaustedError(ForgeError):
    """Too many calls, streams or bytes at once."""

    reason = Reason.REASON_RESOURCE_EXHAUSTED


class InternalError(ForgeError):
    """A fault inside the server; its log has the detail under the request id."""

    reason = Reason.REASON_INTERNAL


class LocalError(ForgeError):
    """Something on the caller's own side. It has no reason, because no server raises it."""


class ClientSetupError(LocalError):
    """The client is set up in a way that it refuses, for instance plaintext to another machine."""


class LocalStorageError(LocalError):
    """The caller's own disk cannot take, or does not hold, what it should."""


def _subclasses(root: type[ForgeError]) -> list[type[ForgeError]]:
    found: list[type[ForgeError]] = []
    for child in root.__subclasses__():
        found += [child, *_subclasses(child)]
    return found


BY_REASON: Mapping[str, type[ForgeError]] = {
    cls.reason_name(): cls for cls in _subclasses(ForgeError) if "reason" in vars(cls)
}

# For answers without ErrorInfo: a proxy's, or gRPC's own.
_BY_CODE: Mapping[grpc.StatusCode, type[ForgeError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.UNAUTHENTICATED: ForbiddenError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    # A call that its own caller cancels is not mapped: this is a server that let go of it.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ArtifactCorruptError,
}


def _pack(
    message: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.PreconditionFailure
    | error_details_pb2.RequestInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _printable(text: str) -> str:
    """Return a text without halves of surrogate pairs: Python has them in odd file names, UTF-8 cannot carry them."""
    return text.encode(errors="replace").decode()


def _fitting(text: str) -> str:
    """Return as much of a message as fits: it travels twice, the second time with all but plain ASCII as %XX."""
    text, left = _printable(text), _MESSAGE_BYTES
    for position, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        left -= 2 if plain else 4 * len(character.encode())
        if left < 0:
            return text[:position]
    return text


def to_status(error: ForgeError, *, request_id: str = "") -> status_pb2.Status:
    """Return the google.rpc.Status of an error: ErrorInfo always, BadRequest or PreconditionFailure for its fields.

    That is PreconditionFailure for a PreconditionError, with the field as its subject, and BadRequest for all others.
    Message and violations are cut to what a status can carry.
    """
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason_name(), domain=DOMAIN, metadata=error.metadata))]
    if error.violations:
        details.append(_pack(_preconditions(error) if isinstance(error, PreconditionError) else _bad_fields(error)))
    if request_id:
        details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    code = error.info().code or code_pb2.INTERNAL
    return status_pb2.Status(code=code, message=_fitting(error.message), details=details)


def _bad_fields(error: ForgeError) -> error_details_pb2.BadRequest:
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(field=violation.field, description=_printable(violation.description[:500]))
        if bad.ByteSize() > _VIOLATIONS_BYTES:
            del bad.field_violations[-1]
            break
    return bad


def _preconditions(error: PreconditionError) -> error_details_pb2.PreconditionFailure:
    failure = error_details_pb2.PreconditionFailure()
    for violation in error.violations:
        failure.violations.add(
            type=error.reason_name(), subject=violation.field, description=_printable(violation.description[:500])
        )
        if failure.ByteSize() > _VIOLATIONS_BYTES:
            del failure.violations[-1]
            break
    return failure


# What TLS on one side alone, or a missing client certificate, looks like from here.
_TLS_HINTS = {
    "WRONG_VERSION_NUMBER": "; the server speaks no TLS at this address",
    "Socket closed": "; a server with TLS closes a connection without TLS, or without a client certificate",
}


def from_rpc_error(error: grpc.RpcError) -> ForgeError:
    """Return the error that the server raised.

    Where the answer is not from a server of ours, or has a reason that is newer than this release, it is the nearest
    class by the gRPC status; `unknown_reason` then holds such a reason.
    """
    code, message = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.UNAVAILABLE:
        message += next((hint for sign, hint in _TLS_HINTS.items() if sign in message), "")
    cls, violations, metadata, request_id = _class_of_code(code, message), [], {}, ""
    unknown_reason = ""
    for detail in _details(error):
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
        bad, unmet = error_details_pb2.BadRequest(), error_details_pb2.PreconditionFailure()
        if detail.Unpack(info) and info.domain == DOMAIN:
            metadata = dict(info.metadata)
            cls, unknown_reason = BY_REASON.get(info.reason, cls), "" if info.reason in BY_REASON else info.reason
        elif detail.Unpack(bad):
            violations = [FieldViolation(field=v.field, description=v.description) for v in bad.field_violations]
        elif detail.Unpack(unmet):
            violations = [FieldViolation(field=v.subject, description=v.description) for v in unmet.violations]
        elif detail.Unpack(request):
            request_id = request.request_id
    made = cls(message, violations=violations, metadata=metadata, request_id=request_id)
    made.unknown_reason = unknown_reason
    return made


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))  # None where there are no rich details
    except (ValueError, DecodeError):  # the details contradict the status: something on the way rewrote one of them
        return ()
    return status.details if status else ()


def _class_of_code(code: grpc.StatusCode, message: str) -> type[ForgeError]:
    # A connection that breaks under a call is reported as INTERNAL, and is no fault inside the server.
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message:
        return UnavailableError
    return _BY_CODE.get(code, InternalError)
