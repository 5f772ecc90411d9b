"""Lists of versions: from a request's filter and order to the search, and a page of what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cognateforge.artifact.v1 import artifact_pb2, storage_pb2
from cognateforge.exceptions import FieldViolation, InvalidFieldError
from training_common.artifacts import search
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.search import Asked, Bound, Order, OrderBy, Place, Way
from training_common.rpc import paging
from training_common.rpc.convert import moment_us

if TYPE_CHECKING:
    from cognateforge.agent.v1.agent_pb2 import ListAgentsRequest
    from cognateforge.exchange.v1.model_pb2 import ListModelsRequest

_FROM, _BEFORE = "create_time_from", "create_time_before"


async def page(
    registry: ArtifactRegistry,
    request: ListModelsRequest | ListAgentsRequest,
    *,
    states: Sequence[str] = (),
    ways: Sequence[Way] = (),
) -> tuple[Sequence[ArtifactRow], str]:
    """Return the page that a request asks for, and the token of the next one, empty on the last.

    states, ways: restrictions of the service's own. Errors: InvalidFieldError, InvalidPageTokenError.
    """
    wanted = _asked(request, states, ways)
    valued = wanted.order.by is not OrderBy.PUBLICATION
    place = paging.read_place(request, request.page_token, valued=valued)
    after = None if place is None else Place(*place)
    size = paging.page_size(request.page_size)
    found = await registry.database.run(lambda: search.page(registry, wanted, limit=size, after=after))
    return found.rows, "" if found.end is None else paging.make_token(request, found.end.id, found.end.value)


def _asked(request: ListModelsRequest | ListAgentsRequest, states: Sequence[str], ways: Sequence[Way]) -> Asked:
    restrictions = request.filter
    given = {field.name for field, _ in restrictions.ListFields()}
    first, before = (
        moment_us(restrictions, field, within="filter.") if field in given else None for field in (_FROM, _BEFORE)
    )
    if first is not None and before is not None and first >= before:
        raise _refused(f"filter.{_FROM}", f"must be earlier than {_BEFORE}: nothing lies between the two")
    return Asked(
        states=states,
        from_us=first,
        before_us=before,
        bounds=[_bound(one, f"filter.results[{index}]") for index, one in enumerate(restrictions.results)],
        ways=[*ways, *([search.of_family(request.family)] if request.family else []), *_ways(restrictions)],
        order=_order(request.order),
    )


def _bound(wanted: artifact_pb2.ResultFilter, field: str) -> Bound:
    low = wanted.at_least if wanted.HasField("at_least") else None
    high = wanted.at_most if wanted.HasField("at_most") else None
    if low is None and high is None:
        raise _refused(field, "needs a bound: set at_least, at_most or both")
    if low is not None and high is not None and low > high:
        raise _refused(f"{field}.at_least", f"must not be above at_most, which is {high:g}: nothing lies between them")
    return Bound(metric=wanted.metric, dataset=wanted.dataset, at_least=low, at_most=high)


def _ways(restrictions: artifact_pb2.ArtifactFilter) -> list[Way]:
    found = []
    if restrictions.data:
        found.append(search.trained_on(name=restrictions.data))
    if restrictions.data_digest:
        found.append(search.trained_on(digest=restrictions.data_digest))
    if restrictions.tiers:
        tiers = [storage_pb2.Tier.Name(tier).removeprefix("TIER_") for tier in restrictions.tiers]
        found.append(search.kept_in(tiers))
    if restrictions.pinned:
        found.append(search.pinned())
    if restrictions.damaged:
        found.append(search.damaged())
    return found


def _order(wanted: artifact_pb2.ArtifactOrder) -> Order:
    named = {"metric": wanted.metric, "dataset": wanted.dataset}
    by_result = wanted.key == artifact_pb2.ORDER_KEY_RESULT
    for field, value in named.items():
        if by_result and not value:
            raise _refused(f"order.{field}", "must be set for ORDER_KEY_RESULT: it tells which result counts")
        if value and not by_result:
            raise _refused(f"order.{field}", "is only for ORDER_KEY_RESULT: set key to that, or leave this empty")
    if by_result:
        return Order(by=OrderBy.RESULT, ascending=wanted.ascending, **named)
    by = OrderBy.SIZE if wanted.key == artifact_pb2.ORDER_KEY_SIZE else OrderBy.PUBLICATION
    return Order(by=by, ascending=wanted.ascending)


def _refused(field: str, rule: str) -> InvalidFieldError:
    return InvalidFieldError(f"{field} {rule}", violations=[FieldViolation(field=field, description=rule)])
