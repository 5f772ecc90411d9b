"""What descends from foundation models: told by the agent service, kept by Cognate, which then collects none."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

import agent_server.migrations
from agent_server import descents, tables, telling
from agent_server.agents import record_agent
from agent_server.foundation import CognateLink, Descent
from agent_server.settings import CognateEndpoint
from cognateforge.agent.v1 import training_pb2
from cognateforge.artifact.v1 import storage_pb2
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.exceptions import (
    AgentNotFoundError,
    ArtifactInUseError,
    InvalidPageTokenError,
    ModelNotFoundError,
)
from cognateforge.exchange.v1 import model_pb2 as pb
from tests.support import contracts
from tests.support.contracts import serving
from tests.support.published import open_registry, publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts.registry import ArtifactRegistry
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.rpc.server import RunningServer
from training_common.store import tables as common

JOB = "jobs/00000000-0000-4000-8000-000000000001"


def new_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """Yield a Cognate that has two models."""
    async with running_cognate(tmp_path / "cognate", artifacts={"keep_newest": 1}) as server:
        publish_model(tmp_path / "cognate")
        publish_model(tmp_path / "cognate")
        yield server


@pytest.fixture
async def cognate(up: RunningServer) -> AsyncIterator[AsyncCognateClient]:
    async with AsyncCognateClient(up.address) as client:
        yield client


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ArtifactRegistry]:
    """Yield the registry of an agent service that is not up."""
    (tmp_path / "agent").mkdir()
    found = open_registry(tmp_path / "agent")
    found.database.upgrade(Path(agent_server.migrations.__file__ or "").parent)
    yield found
    found.database.close()


@pytest.fixture
def teller(up: RunningServer, registry: ArtifactRegistry) -> Iterator[telling.Teller]:
    link = CognateLink(CognateEndpoint(address=up.address))
    yield telling.Teller(registry.database, link)
    link.close()


async def register(client: AsyncCognateClient, *told: tuple[str, str]) -> None:
    dependents = [pb.Dependent(model=model, name=name) for model, name in told]
    await client.models.RegisterDependents(pb.RegisterDependentsRequest(request_id=new_id(), dependents=dependents))


async def release(client: AsyncCognateClient, *told: tuple[str, str]) -> None:
    dependents = [pb.Dependent(model=model, name=name) for model, name in told]
    await client.models.ReleaseDependents(pb.ReleaseDependentsRequest(request_id=new_id(), dependents=dependents))


async def listed(client: AsyncCognateClient, name: str = "cognate-25m@1") -> list[str]:
    answer = await client.models.ListDependents(pb.ListDependentsRequest(name=name))
    return [one.name for one in answer.dependents]


async def collect(client: AsyncCognateClient | AsyncAgentClient, name: str) -> None:
    await client.storage.CollectArtifacts(storage_pb2.CollectArtifactsRequest(request_id=new_id(), names=[name]))


# --- Cognate's side


async def test_a_model_is_not_collected_while_anything_descends_from_it(cognate: AsyncCognateClient) -> None:
    """The refusal names what does. When it is released, the model goes."""
    await register(cognate, ("cognate-25m@1", "intent-router@3"), ("cognate-25m@1", JOB))
    await register(cognate, ("cognate-25m@1", JOB))
    model = (await cognate.models.GetModel(pb.GetModelRequest(name="cognate-25m@1"))).model
    assert 2 == model.storage.dependents, "what was told twice counts once"
    with pytest.raises(ArtifactInUseError, match=f"2 agents and jobs descend from it, the newest of them {JOB}"):
        await collect(cognate, "cognate-25m@1")
    await release(cognate, ("cognate-25m@1", JOB), ("cognate-25m@7", JOB))
    with pytest.raises(ArtifactInUseError, match="intent-router@3 of local descends from it"):
        await collect(cognate, "cognate-25m@1")
    await release(cognate, ("cognate-25m@1", "intent-router@3"))
    await collect(cognate, "cognate-25m@1")
    with pytest.raises(ModelNotFoundError):
        await register(cognate, ("cognate-25m@2", "intent-router@4"), ("cognate-25m@1", "intent-router@4"))
    assert [] == await listed(cognate, "cognate-25m@2"), "all of a request, or nothing"


async def test_dependents_are_listed_by_pages(cognate: AsyncCognateClient) -> None:
    """Newest first, each once; a token is bound to its query."""
    names = [f"intent-router@{n}" for n in range(1, 6)]
    await register(cognate, *(("cognate-25m@1", name) for name in names))
    request = pb.ListDependentsRequest(name="cognate-25m@1", page_size=2)
    seen: list[str] = []
    while True:
        answer = await cognate.models.ListDependents(request)
        seen += [one.name for one in answer.dependents]
        assert all(("cognate-25m@1", "local") == (one.model, one.owner) for one in answer.dependents)
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert names[::-1] == seen
    with pytest.raises(InvalidPageTokenError):
        await cognate.models.ListDependents(
            pb.ListDependentsRequest(name="cognate-25m@2", page_token=request.page_token)
        )


async def test_a_watch_tells_what_becomes_of_a_model(cognate: AsyncCognateClient) -> None:
    """Its collection is an event, which the published ones are followed by."""
    await collect(cognate, "cognate-25m@1")
    news = cognate.watch_models()
    events = [await anext(news) for _ in range(3)]
    await news.aclose()
    assert all(isinstance(one, pb.ModelEvent) for one in events)
    assert ["published", "published", "changed"] == [one.WhichOneof("kind") for one in events]  # type: ignore[union-attr]
    changed = events[2].changed  # type: ignore[union-attr]
    assert (pb.MODEL_CHANGE_COLLECTED, "cognate-25m@1") == (changed.change, changed.model.name)


# --- the agent service's side


async def test_agents_and_jobs_are_told_until_cognate_knows(
    cognate: AsyncCognateClient, teller: telling.Teller, registry: ArtifactRegistry, tmp_path: Path
) -> None:
    """An agent for as long as it is there, a job until it has ended."""
    job = queued(registry)
    with registry.database.write() as connection:
        descents.hold_model(connection, "cognate-25m@1", job)
        descents.hold_model(connection, "cognate-25m@1", job)
    publish_agent(tmp_path / "agent")
    await run(teller)
    assert ["intent-router@1", job] == await listed(cognate)
    end(registry, job)
    await run(teller)
    assert ["intent-router@1"] == await listed(cognate)
    with registry.database.write() as connection:
        descents.let_go(connection, ["intent-router@1"])
    await run(teller)
    assert [] == await listed(cognate)
    assert [] == rows(registry), "nothing is left to be told"


async def test_a_cognate_that_has_forgotten_is_told_again(
    cognate: AsyncCognateClient, teller: telling.Teller, registry: ArtifactRegistry, tmp_path: Path
) -> None:
    """As one that was restored from an earlier backup: when the agent service starts, and once a day."""
    publish_agent(tmp_path / "agent")
    await run(teller)
    await release(cognate, ("cognate-25m@1", "intent-router@1"))
    await run(teller)
    assert [] == await listed(cognate)
    teller._all_again_s -= 86_400.0
    await run(teller)
    assert ["intent-router@1"] == await listed(cognate)


async def run(teller: telling.Teller) -> None:
    import asyncio

    await asyncio.to_thread(teller.tick)


def queued(registry: ArtifactRegistry) -> str:
    store = JobStore(registry.database)
    with registry.database.write() as connection:
        return store.submit(connection, plan=b"", total_steps=1, caller="x").name


def end(registry: ArtifactRegistry, job: str) -> None:
    with registry.database.write() as connection:
        connection.execute(sa.update(common.jobs).filter_by(name=job).values(state=JobState.SUCCEEDED.value))


def rows(registry: ArtifactRegistry) -> list[tuple[str, str, bool, bool]]:
    d = tables.descents.c
    with registry.database.read() as connection:
        return [tuple(row) for row in connection.execute(sa.select(d.model, d.name, d.holds, d.told))]


async def test_a_model_that_is_gone_keeps_nobody_waiting(
    cognate: AsyncCognateClient, teller: telling.Teller, registry: ArtifactRegistry
) -> None:
    """Of several that are told at once, those whose model is there are known afterwards."""
    with registry.database.write() as connection:
        descents.hold_model(connection, "cognate-25m@9", "intent-router@1")
        descents.hold_model(connection, "cognate-25m@1", "intent-router@2")
    await run(teller)
    assert ["intent-router@2"] == await listed(cognate)
    assert [] == descents.untold(registry.database, holds=True)


def test_what_changes_while_it_is_told_is_told_again(registry: ArtifactRegistry) -> None:
    """A row that was let go of, or held again, since it was read is not taken for told."""
    with registry.database.write() as connection:
        descents.hold_model(connection, "cognate-25m@1", JOB)
    held = descents.untold(registry.database, holds=True)
    with registry.database.write() as connection:
        descents.let_go(connection, [JOB])
    descents.set_told(registry.database, held)
    released = descents.untold(registry.database, holds=False)
    assert [Descent(model="cognate-25m@1", name=JOB)] == [one.descent for one in released]
    with registry.database.write() as connection:
        descents.hold_model(connection, "cognate-25m@1", JOB)
    descents.set_told(registry.database, released)
    assert [("cognate-25m@1", JOB, True, False)] == rows(registry)


def test_a_cognate_that_knows_no_dependents_is_told_of_once(
    registry: ArtifactRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release of before does not serve the call: it is logged, and asked again much later."""
    with registry.database.write() as connection:
        descents.hold_model(connection, "cognate-25m@1", JOB)
    with serving(contracts.released()) as address:
        link = CognateLink(CognateEndpoint(address=address))
        teller = telling.Teller(registry.database, link)
        teller.tick()
        teller.tick()
        link.close()
    assert 1 == capsys.readouterr().out.count("this Cognate knows no dependents")
    assert 1 == len(descents.untold(registry.database, holds=True))


def test_agents_of_an_earlier_release_are_adopted(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Their rows are written when the server starts, once."""
    publish_agent(tmp_path / "agent")
    with registry.database.write() as connection:
        connection.execute(sa.delete(tables.descents))
    descents.adopt_descents(registry)
    assert [("cognate-25m@1", "intent-router@1", True, False)] == rows(registry)
    descents.adopt_descents(registry)
    assert 1 == len(rows(registry))


# --- agents that agents go on with


async def test_agents_hold_what_they_go_on_with(tmp_path: Path) -> None:
    """So do open jobs, aliases and lifecycles that are under way. Each refusal says what to do."""
    folder = tmp_path / "agent"
    async with (
        running_agent(folder, artifacts={"keep_newest": 1}) as server,
        AsyncAgentClient(server.address) as client,
    ):
        first = publish_agent(folder)
        publish_agent(folder)
        plan = training_pb2.TrainingPlan(
            agent="intent-router",
            architecture="cognate",
            agent_version=training_pb2.AgentBase(name=first.name),
            classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=5)),
            adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
            optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
            total_steps=40,
        )
        start = training_pb2.StartTrainingRequest(request_id=new_id(), plan=plan)
        job = (await client.training.StartTraining(start)).job.job.name
        with pytest.raises(ArtifactInUseError, match=f"{job} goes on with it"):
            await collect(client, first.name)
        await client.training.CancelJob(training_pb2.CancelJobRequest(request_id=new_id(), name=job))
        registry = open_registry(folder)
        assert 1 == descents.let_go_of_ended_jobs(registry.database)
        child = made_of(registry, first.name)
        with pytest.raises(ArtifactInUseError, match=f"{child} goes on with it"):
            await collect(client, first.name)
        await collect_pushed(client, folder, registry, child)
        await collect(client, first.name)
        job_name = queued(registry)
        with pytest.raises(AgentNotFoundError, match="was collected"), registry.database.write() as connection:
            descents.hold_agent(connection, registry, first, job_name)
        registry.database.close()


def made_of(registry: ArtifactRegistry, parent: str) -> str:
    """Publish an agent that goes on with another one."""
    body = {
        "architecture": "cognate",
        "task": "classification",
        "labels": [],
        "parent": {"name": "", "digest": ""},
        "made_of": {"kind": "agent_version", "name": parent, "digest": ""},
        "parameters": {"trainable": 1, "total": 1},
        "evaluations": [],
    }
    with registry.database.write() as connection:
        row = registry.publish(connection, family="child", state="PUBLISHED", job="jobs/x", files=[], body=body)
        record_agent(connection, row)
    return row.name


async def collect_pushed(client: AsyncAgentClient, folder: Path, registry: ArtifactRegistry, child: str) -> None:
    """Publish a newer version of the child, and collect the child."""
    made_of(registry, "intent-router@2")
    await collect(client, child)


@pytest.mark.parametrize("how", ["alias", "lifecycle"])
async def test_agents_in_service_are_not_collected(tmp_path: Path, how: str) -> None:
    """By whichever of the two a version is in service."""
    from cognateforge.agent.v1 import agent_pb2

    folder = tmp_path / "agent"
    async with (
        running_agent(folder, artifacts={"keep_newest": 1}) as server,
        AsyncAgentClient(server.address) as client,
    ):
        first, second = publish_agent(folder), publish_agent(folder)
        stub = client.agents
        if how == "alias":
            for row in (first, second):
                alias = agent_pb2.SetAliasRequest(request_id=new_id(), name=row.name, alias="production")
                await stub.SetAlias(alias)
                if row is first:
                    with pytest.raises(ArtifactInUseError, match="the alias production points at it"):
                        await collect(client, first.name)
        else:
            for lifecycle in (agent_pb2.LIFECYCLE_CANDIDATE, agent_pb2.LIFECYCLE_RETIRED):
                if lifecycle == agent_pb2.LIFECYCLE_RETIRED:
                    with pytest.raises(ArtifactInUseError, match="it is CANDIDATE"):
                        await collect(client, first.name)
                move = agent_pb2.SetLifecycleRequest(request_id=new_id(), name=first.name, lifecycle=lifecycle)
                await stub.SetLifecycle(move)
        await collect(client, first.name)
        with pytest.raises(AgentNotFoundError):
            await stub.SetAlias(agent_pb2.SetAliasRequest(request_id=new_id(), name=first.name, alias="old"))


async def test_the_connection_outlives_the_calls_of_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that is told to end may have a call under way: nobody tells it twice, and the link closes after it."""
    link, order, started = CognateLink(CognateEndpoint(address="127.0.0.1:1")), [], asyncio.Event()
    monkeypatch.setattr(link, "close", lambda: order.append("closed"))
    called = asyncio.get_running_loop().create_future()

    async def user() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await called
            order.append("ended")

    kept = asyncio.create_task(link.keep(user))
    await started.wait()
    kept.cancel()
    await asyncio.sleep(0)  # the cancellation arrives
    await asyncio.sleep(0)
    called.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await kept
    assert ["ended", "closed"] == order


async def test_a_user_of_the_connection_that_fails_is_heard_of() -> None:
    """Its service would go on without it otherwise."""
    link = CognateLink(CognateEndpoint(address="127.0.0.1:1"))

    async def user() -> None:
        raise RuntimeError("the teller is gone")

    with pytest.raises(RuntimeError, match="the teller is gone"):
        await asyncio.wait_for(link.keep(user), 10)
