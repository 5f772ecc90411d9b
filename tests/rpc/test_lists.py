"""Lists of models and agents by filter and order, and cards, over a real connection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp

from agent_server import tables
from agent_server.agents import Measured, find_agent, keep_evaluations
from cognateforge.agent.v1 import agent_pb2
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.artifact.v1.artifact_pb2 import ArtifactFilter, ArtifactOrder, ResultFilter
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.exceptions import ArtifactCorruptError, InvalidFieldError, InvalidPageTokenError
from cognateforge.exchange.v1 import model_pb2
from tests.support.published import FILES, open_registry, publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from training_common.rpc import paging
from training_common.store import tables as common

MATCH: dict[str, Any] = {"metric": "gsm8k_exact_match", "dataset": "gsm8k/validation"}
BY_MATCH = ArtifactOrder(key=artifact_pb2.ORDER_KEY_RESULT, **MATCH)
ACCURACY: dict[str, Any] = {"metric": "accuracy_after", "dataset": "forge-intents/test"}
EVALUATED: dict[str, Any] = {"caller": "local", "request_id": "00000000-0000-4000-8000-000000000001"}


def publish_measured(folder: Path, value: float, *, size_bytes: int = 7) -> None:
    data = [{"name": "gsm8k", "kind": "folder", "rows": 9, "digest": f"sha256:{'1' * 64}"}]
    publish_model(folder, payload=b"x" * size_bytes, data=data, results=[{**MATCH, "value": value, "rows": 8}])


async def models(cognate: AsyncCognateClient, **query: Any) -> list[str]:
    answer = await cognate.models.ListModels(model_pb2.ListModelsRequest(**query))
    return [model.name.removeprefix("cognate-25m@") for model in answer.models]


async def agents_of(agents: AsyncAgentClient, **query: Any) -> list[str]:
    answer = await agents.agents.ListAgents(agent_pb2.ListAgentsRequest(**query))
    return [agent.name for agent in answer.agents]


async def test_models_are_listed_by_filter_and_order(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """By what they were trained on and what was measured, which each model tells."""
    for value, size_bytes in ((0.25, 30), (0.5, 10), (0.0, 20)):
        publish_measured(tmp_path / "cognate", value, size_bytes=size_bytes)
    publish_model(tmp_path / "cognate", payload=b"")
    good = ArtifactFilter(results=[ResultFilter(metric=MATCH["metric"], at_least=0.25)])
    assert ["2", "1"] == await models(cognate, filter=good)
    assert ["3", "2", "1"] == await models(cognate, filter=ArtifactFilter(data="gsm8k"), family="cognate-25m")
    assert [] == await models(cognate, filter=ArtifactFilter(data="gsm8k"), family="other")
    assert ["2", "1", "3"] == await models(cognate, order=BY_MATCH)
    by_size = ArtifactOrder(key=artifact_pb2.ORDER_KEY_SIZE, ascending=True)
    assert ["4", "2", "3", "1"] == await models(cognate, order=by_size)
    assert ["1", "2", "3", "4"] == await models(cognate, order=ArtifactOrder(ascending=True))
    model = (await cognate.models.GetModel(model_pb2.GetModelRequest(name="cognate-25m@2"))).model
    assert [artifact_pb2.Result(**MATCH, value=0.5, rows=8)] == list(model.results)
    since = Timestamp()
    since.FromMicroseconds(model.create_time.ToMicroseconds())
    assert ["4", "3", "2"] == await models(cognate, filter=ArtifactFilter(create_time_from=since))
    assert ["1"] == await models(cognate, filter=ArtifactFilter(create_time_before=since))


async def test_pages_by_a_result_lose_and_repeat_nothing(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """Many models have the same result; a token is bound to its query and carries the value it stands at."""
    for value in (0.5, 0.0, 0.0, 0.25, 0.0):
        publish_measured(tmp_path / "cognate", value)
    seen, token = [], ""
    while True:
        request = model_pb2.ListModelsRequest(page_size=2, page_token=token, order=BY_MATCH)
        page = await cognate.models.ListModels(request)
        seen += [model.name.removeprefix("cognate-25m@") for model in page.models]
        token = page.next_page_token
        if not token:
            break
        last = token
    assert ["1", "4", "5", "3", "2"] == seen
    for query in ({}, {"order": ArtifactOrder(key=artifact_pb2.ORDER_KEY_SIZE)}, {"order": BY_MATCH, "family": "x"}):
        with pytest.raises(InvalidPageTokenError):
            await models(cognate, page_token=last, **query)
    for wrong in (None, float("nan"), 2**70):
        made = paging.make_token(model_pb2.ListModelsRequest(order=BY_MATCH), 3, wrong)
        with pytest.raises(InvalidPageTokenError):
            await models(cognate, page_token=made, order=BY_MATCH)


def moment(seconds: int) -> Timestamp:
    return Timestamp(seconds=seconds)


@pytest.mark.parametrize(
    ("query", "field", "remedy"),
    [
        ({"filter": ArtifactFilter(results=[ResultFilter(metric="m")])}, "filter.results[0]", "set at_least"),
        (
            {"filter": ArtifactFilter(results=[ResultFilter(metric="m", at_least=2, at_most=1)])},
            "filter.results[0].at_least",
            "must not be above at_most, which is 1",
        ),
        (
            {"filter": ArtifactFilter(create_time_from=moment(9), create_time_before=moment(9))},
            "filter.create_time_from",
            "must be earlier than create_time_before",
        ),
        (
            {"filter": ArtifactFilter(create_time_before=moment(-1))},
            "filter.create_time_before",
            "must lie after the year 1970",
        ),
        ({"order": ArtifactOrder(key=artifact_pb2.ORDER_KEY_RESULT)}, "order.metric", "must be set"),
        ({"order": ArtifactOrder(key=artifact_pb2.ORDER_KEY_RESULT, metric="m")}, "order.dataset", "must be set"),
        ({"order": ArtifactOrder(metric="m")}, "order.metric", "only for ORDER_KEY_RESULT"),
    ],
)
async def test_what_does_not_fit_together_is_refused_by_name(
    cognate: AsyncCognateClient, agents: AsyncAgentClient, query: dict[str, Any], field: str, remedy: str
) -> None:
    """By both services, with the field and what to do."""
    calls: list[Callable[..., Any]] = [lambda: models(cognate, **query), lambda: agents_of(agents, **query)]
    for call in calls:
        with pytest.raises(InvalidFieldError, match=remedy) as caught:
            await call()
        assert [field] == [violation.field for violation in caught.value.violations]


async def test_agents_are_found_by_what_was_measured_last(agents: AsyncAgentClient, tmp_path: Path) -> None:
    """A later evaluation takes the place of the manifest's; the foundation is a filter too."""
    folder = tmp_path / "agent"
    for _ in range(2):
        publish_agent(folder)
    publish_agent(folder, family="other", foundation="cognate-25m@2")
    good = ArtifactFilter(results=[ResultFilter(**ACCURACY, at_least=0.75)])
    assert [] == await agents_of(agents, filter=good)
    registry = open_registry(folder)
    with registry.database.write() as connection:
        row = find_agent(registry, "intent-router@1")
        keep_evaluations(connection, row, [Measured(**ACCURACY, value=0.875, rows=9)], **EVALUATED)
    registry.database.close()
    assert ["intent-router@1"] == await agents_of(agents, filter=good)
    order = ArtifactOrder(key=artifact_pb2.ORDER_KEY_RESULT, **ACCURACY)
    assert ["intent-router@1", "other@1", "intent-router@2"] == await agents_of(agents, order=order)
    assert ["other@1"] == await agents_of(agents, foundation="cognate-25m@2")
    assert ["intent-router@2", "intent-router@1"] == await agents_of(agents, foundation="cognate-25m@1")
    both: dict[str, Any] = {
        "foundation": "cognate-25m@1",
        "task": "classification",
        "lifecycles": [agent_pb2.LIFECYCLE_DRAFT],
    }
    assert ["intent-router@1"] == await agents_of(agents, **both, filter=good)


async def test_what_an_earlier_release_published_is_found_after_a_start(tmp_path: Path) -> None:
    """Results, sources and the foundation are read from manifests, later evaluations from their rows."""
    folder = tmp_path / "agent"
    async with running_agent(folder):
        publish_agent(folder, recorded=False)
        publish_agent(folder)
    registry = open_registry(folder)
    with registry.database.write() as connection:
        keep_evaluations(
            connection,
            find_agent(registry, "intent-router@2"),
            [Measured(**ACCURACY, value=0.875, rows=9)],
            **EVALUATED,
        )
        for table in (common.results, common.sources):
            connection.execute(sa.delete(table))
        connection.execute(sa.update(tables.agents).values(foundation=None))
    registry.database.close()
    async with running_agent(folder) as server, AsyncAgentClient(server.address) as agents:
        assert ["intent-router@2", "intent-router@1"] == await agents_of(agents, foundation="cognate-25m@1")
        assert 2 == len(await agents_of(agents, filter=ArtifactFilter(data="forge-intents")))
        good = ArtifactFilter(results=[ResultFilter(**ACCURACY, at_least=0.75)])
        assert ["intent-router@2"] == await agents_of(agents, filter=good)
    folder = tmp_path / "cognate"
    async with running_cognate(folder):
        publish_measured(folder, 0.5)
    registry = open_registry(folder)
    with registry.database.write() as connection:
        connection.execute(sa.delete(common.results))
        connection.execute(sa.delete(common.sources))
    registry.database.close()
    async with running_cognate(folder) as server, AsyncCognateClient(server.address) as cognate:
        assert ["1"] == await models(cognate, order=BY_MATCH, filter=ArtifactFilter(data="gsm8k"))


async def test_cards_come_from_the_published_files(
    cognate: AsyncCognateClient, agents: AsyncAgentClient, tmp_path: Path
) -> None:
    """Whole and as published, by version, alias or newest; empty for a version without one, refused when it changed."""
    publish_model(tmp_path / "cognate")
    answer = await cognate.models.GetModelCard(model_pb2.GetModelCardRequest(name="cognate-25m"))
    assert ("cognate-25m@1", "") == (answer.name, answer.markdown)
    publish_agent(tmp_path / "agent")
    card = await agents.agents.GetAgentCard(agent_pb2.GetAgentCardRequest(name="intent-router"))
    assert ("intent-router@1", FILES["README.md"].decode()) == (card.name, card.markdown)
    [blob] = [
        path
        for path in (tmp_path / "agent/artifacts/blobs").rglob("*")
        if path.is_file() and b"# card" in path.read_bytes()
    ]
    blob.chmod(0o644)
    blob.write_bytes(b"# Card\n")
    with pytest.raises(ArtifactCorruptError, match=r"README\.md"):
        await agents.agents.GetAgentCard(agent_pb2.GetAgentCardRequest(name="intent-router@1"))
