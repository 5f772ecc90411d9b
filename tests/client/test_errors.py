"""Typed errors: what a server raises is what a caller catches."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from cognateforge import exceptions
from cognateforge.client import CallBreaker
from cognateforge.errors.v1.reasons_pb2 import Reason
from tests.client.fakes import Fake, driver


def test_every_reason_has_one_class() -> None:
    """The contract's table and the error tree name the same reasons."""
    names = {name.removeprefix("REASON_") for name in Reason.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"}
    assert names == set(exceptions.BY_REASON)


@pytest.mark.parametrize("reason", sorted(exceptions.BY_REASON))
async def test_every_reason_crosses_the_wire_as_its_class(kind: str, reason: str, fake: Fake) -> None:
    """Class, message, violations, metadata and request id survive, for unary calls and streams."""
    cls = exceptions.BY_REASON[reason]
    violation = exceptions.FieldViolation(field="plan.total_steps", description="must be at least 1")
    fake.script.always = cls("a value and its remedy", violations=[violation], metadata={"job": "jobs/7"})
    async with driver(kind, fake.address, breaker=CallBreaker(fail_max=100)) as client:
        for call in (client.get_job, client.stream):
            with pytest.raises(exceptions.ForgeError) as caught:
                await call()
            assert cls is type(caught.value)
            assert caught.value.message == "a value and its remedy"
            assert (violation,) == caught.value.violations
            assert caught.value.metadata == {"job": "jobs/7"}
            assert caught.value.request_id == "request-7"


def test_an_unmet_precondition_names_its_field_as_google_rpc_does() -> None:
    """FAILED_PRECONDITION has PreconditionFailure with the reason as type, and no BadRequest; other errors reversed."""
    violation = exceptions.FieldViolation(field="plan.architecture", description="not installed")
    failure, bad = error_details_pb2.PreconditionFailure(), error_details_pb2.BadRequest()
    unmet = exceptions.to_status(exceptions.ArchitectureNotFoundError("x", violations=[violation])).details
    assert (True, False) == (unmet[1].Unpack(failure), unmet[1].Unpack(bad))
    told = failure.violations[0]
    assert ("ARCHITECTURE_NOT_FOUND", "plan.architecture", "not installed") == (
        told.type,
        told.subject,
        told.description,
    )
    wrong = exceptions.to_status(exceptions.InvalidFieldError("x", violations=[violation])).details
    assert (False, True) == (wrong[1].Unpack(failure), wrong[1].Unpack(bad))


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, exceptions.ForbiddenError),
        (grpc.StatusCode.NOT_FOUND, exceptions.NotFoundError),
        (grpc.StatusCode.UNKNOWN, exceptions.InternalError),
        (grpc.StatusCode.CANCELLED, exceptions.UnavailableError),
        (grpc.StatusCode.ABORTED, exceptions.ConflictError),
    ],
)
async def test_a_status_without_details_gets_the_nearest_class(
    kind: str, code: grpc.StatusCode, cls: type[exceptions.ForgeError], fake: Fake
) -> None:
    """An answer of a proxy is a ForgeError too."""
    fake.script.always = code
    async with driver(kind, fake.address) as client:
        for call in (client.get_job, client.stream):
            with pytest.raises(exceptions.ForgeError) as caught:
                await call()
            assert cls is type(caught.value)


async def test_a_server_that_is_not_there_is_unavailable(kind: str, fake: Fake) -> None:
    """Nobody listens: UnavailableError, with what gRPC knows about it."""
    fake.stop()
    async with driver(kind, fake.address) as client:
        with pytest.raises(exceptions.UnavailableError, match=r"refused|connect"):
            await client.get_job()
