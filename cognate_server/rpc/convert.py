"""From rows and manifests to the messages of cognate/v1 and exchange/v1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf import duration_pb2

from cognate_server.dependents import Dependent, DependentRow
from cognate_server.leases import LeaseRow, Resource
from cognate_server.models import Comparison
from cognate_server.reservations import ReservationRow
from cognate_server.resources import Amounts
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2, resource_pb2
from training_common.artifacts.registry import ArtifactEvent, ArtifactRow, SnapshotPage
from training_common.artifacts.search import results_of
from training_common.jobs.store import JobRow
from training_common.rpc import convert
from training_common.store.database import now_us

_STATE = "MODEL_STATE_"
_RESOURCE = "RESOURCE_KIND_"
# The contract's bound on the values of a mismatch.
_VALUE_CHARS = 255


def job(row: JobRow) -> pretraining_pb2.PretrainingJob:
    """Return a pretraining job."""
    plan = pretraining_pb2.PretrainingPlan.FromString(row.plan)
    return pretraining_pb2.PretrainingJob(job=convert.job(row), plan=plan)


def reservation(row: ReservationRow) -> pretraining_pb2.Reservation:
    """Return a reservation."""
    return pretraining_pb2.Reservation(
        name=row.name,
        slots=row.slots,
        start_time=convert.timestamp(row.start_us),
        end_time=convert.timestamp(row.end_us),
        purpose=row.purpose,
        caller=row.caller,
        create_time=convert.timestamp(row.create_us),
        cancel_time=convert.timestamp(row.cancel_us),
    )


def model_states(values: list[model_pb2.ModelState.ValueType]) -> list[str]:
    """Return the states of a filter as they are stored."""
    return [model_pb2.ModelState.Name(value).removeprefix(_STATE) for value in values]


def architecture(row: ArtifactRow) -> model_pb2.Architecture:
    """Return the forward pass that a model is for."""
    return model_pb2.Architecture(**row.body["architecture"])


def model(row: ArtifactRow, dependents: int = 0) -> model_pb2.FoundationModel:
    """Return a published model, out of its manifest. dependents: how much descends from it."""
    body = row.body
    return model_pb2.FoundationModel(
        name=row.name,
        state=model_pb2.ModelState.Value(f"{_STATE}{row.state}"),
        digest=row.digest,
        architecture=architecture(row),
        tokenizer_digest=body["tokenizer_digest"],
        files=convert.files(row),
        size_bytes=row.size_bytes,
        create_time=convert.timestamp(row.create_us),
        job=row.job,
        data=convert.data_sources(row),
        checks=[artifact_pb2.Check(**check) for check in body["checks"]],
        steps=body["training"]["steps"],
        tokens=body["training"]["tokens"],
        storage=convert.storage(row, dependents),
        results=[artifact_pb2.Result(**result) for result in results_of(row)],
    )


def compatibility(row: ArtifactRow, comparisons: list[Comparison]) -> model_pb2.CheckCompatibilityResponse:
    """Return the verdict over a model, with every mismatch."""
    mismatches = [
        model_pb2.Mismatch(
            kind=one.kind,
            field=one.field,
            model_value=one.model_value[:_VALUE_CHARS],
            wanted_value=one.wanted_value[:_VALUE_CHARS],
        )
        for one in comparisons
        if not one.fits
    ]
    verdict = model_pb2.VERDICT_INCOMPATIBLE if mismatches else model_pb2.VERDICT_COMPATIBLE
    compared = [one.kind for one in comparisons]
    return model_pb2.CheckCompatibilityResponse(
        verdict=verdict, mismatches=mismatches, model_digest=row.digest, compared=compared
    )


def resource(kind: resource_pb2.ResourceKind.ValueType) -> Resource:
    """Return a resource as it is stored."""
    return Resource(resource_pb2.ResourceKind.Name(kind).removeprefix(_RESOURCE))


def capacity(amounts: Amounts) -> resource_pb2.Capacity:
    """Return what there is of one resource."""
    return resource_pb2.Capacity(
        kind=resource_pb2.ResourceKind.Value(f"{_RESOURCE}{amounts.kind}"),
        total=amounts.total,
        held=amounts.held,
        lent=amounts.lent,
        available=amounts.available,
    )


def lease(row: LeaseRow) -> resource_pb2.Lease:
    """Return a lease, and what is left of it now."""
    remaining = duration_pb2.Duration()
    remaining.FromMicroseconds(row.remaining_us(now_us()))
    return resource_pb2.Lease(
        name=row.name,
        state=resource_pb2.LeaseState.Value(f"LEASE_STATE_{row.state}"),
        fencing_token=row.fencing_token,
        expire_time=convert.timestamp(row.expire_us),
        revoke_time=None if row.revoke_us is None else convert.timestamp(row.revoke_us),
        remaining=remaining,
        kind=resource_pb2.ResourceKind.Value(f"{_RESOURCE}{row.kind}"),
        amount=row.amount,
    )


def event_frame(event: ArtifactEvent, dependents: int = 0) -> model_pb2.WatchModelsResponse:
    """Return one entry of the outbox as a frame. dependents: how much descends from its model."""
    message = model_pb2.ModelEvent(sequence=event.sequence, time=convert.timestamp(event.time_us))
    told = model(event.artifact, dependents)
    if event.kind == "published":
        message.published.CopyFrom(told)
    else:
        change = model_pb2.ModelChange.Value(f"MODEL_CHANGE_{event.kind.upper()}")
        message.changed.CopyFrom(model_pb2.ModelChanged(model=told, change=change))
    return model_pb2.WatchModelsResponse(event=message)


def snapshot_frame(page: SnapshotPage, dependents: Mapping[int, int]) -> model_pb2.WatchModelsResponse:
    """Return a page of a snapshot as a frame. dependents: by id, how much descends from models."""
    models = [model(row, dependents.get(row.id, 0)) for row in page.rows]
    snapshot = model_pb2.ModelSnapshot(models=models, last_sequence=page.sequence, more=page.more)
    return model_pb2.WatchModelsResponse(snapshot=snapshot)


def to_dependents(messages: Iterable[model_pb2.Dependent]) -> list[Dependent]:
    """Return what descends from models, as a request names it."""
    return [Dependent(model=one.model, name=one.name, digest=one.digest) for one in messages]


def dependent(row: DependentRow, model_name: str) -> model_pb2.Dependent:
    """Return what descends from a model."""
    return model_pb2.Dependent(
        model=model_name,
        name=row.name,
        digest=row.digest,
        owner=row.owner,
        create_time=convert.timestamp(row.create_us),
    )
