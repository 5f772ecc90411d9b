"""Priorities, deadlines, dry runs and estimates over real connections, of both services alike."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from agent_server import estimates as agent_estimates
from agent_server.architectures.cognate import CognateArchitecture
from agent_server.settings import AgentSettings
from cognate_server import estimates as cognate_estimates
from cognate_server.settings import CognateSettings
from cognateforge.agent.v1 import training_pb2
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import ArchitectureNotFoundError, DataUnavailableError, ForgeError, InvalidFieldError
from cognateforge.job.v1 import job_pb2
from tests.support.servers import running_agent, running_cognate
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database, now_us

HOUR_S = 3600


def pretraining_plan(**changes: Any) -> pretraining_pb2.PretrainingPlan:
    return pretraining_pb2.PretrainingPlan(**{"total_steps": 40, **changes})


def training_plan(**changes: Any) -> training_pb2.TrainingPlan:
    values = {
        "agent": "intent-router",
        "architecture": "cognate",
        "foundation": training_pb2.FoundationBase(name="cognate-25m"),
        "classification": training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=5)),
        "adaptation": training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        "optimization": training_pb2.Optimization(adamw=training_pb2.AdamW()),
        "total_steps": 40,
        **changes,
    }
    return training_pb2.TrainingPlan(**values)


@dataclass(frozen=True)
class Side:
    """One service, and how its job calls are spelt."""

    name: str
    stub: Any
    contract: Any
    plan: Callable[..., Any]
    folder: Path

    def request(self, *, request_id: str = "", validate_only: bool = False, **scheduling: Any) -> Any:
        kind = "Pretraining" if self.name == "cognate" else "Training"
        return getattr(self.contract, f"Start{kind}Request")(
            request_id=request_id or str(uuid.uuid4()),
            plan=self.plan(),
            scheduling=job_pb2.Scheduling(**scheduling) if scheduling else None,
            validate_only=validate_only,
        )

    async def start(self, request: Any | None = None, **values: Any) -> Any:
        call = self.stub.StartPretraining if self.name == "cognate" else self.stub.StartTraining
        return await call(request or self.request(**values))

    async def get(self, name: str) -> Any:
        return (await self.stub.GetJob(self.contract.GetJobRequest(name=name))).job

    async def list(self) -> list[Any]:
        return list((await self.stub.ListJobs(self.contract.ListJobsRequest())).jobs)

    def rows(self) -> dict[str, int]:
        """Count what is stored."""
        database = Database(f"sqlite:///{self.folder / 'store.db'}")
        with database.read() as connection:
            tables = (t.jobs, t.events, t.requests)
            counts = {
                x.name: connection.execute(sa.select(sa.func.count()).select_from(x)).scalar_one() for x in tables
            }
        database.close()
        return counts


@asynccontextmanager
async def side(name: str, folder: Path, **settings: Any) -> AsyncIterator[Side]:
    if name == "cognate":
        async with running_cognate(folder, **settings) as server, AsyncCognateClient(server.address) as cognate:
            yield Side(name, cognate.pretraining, pretraining_pb2, pretraining_plan, folder)
    else:
        async with running_agent(folder, **settings) as server, AsyncAgentClient(server.address) as agents:
            yield Side(name, agents.training, training_pb2, training_plan, folder)


@pytest.fixture(params=["cognate", "agent"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def service(name: str, tmp_path: Path) -> AsyncIterator[Side]:
    async with side(name, tmp_path) as one:
        yield one


def ahead(seconds: float) -> Timestamp:
    result = Timestamp()
    result.FromMicroseconds(now_us() + round(seconds * 1e6))
    return result


# --- priorities and waits


async def test_priority_and_deadlines_are_told_again(service: Side) -> None:
    """In the answer, and by GetJob and ListJobs; a job that was given none has priority 0 and no deadline."""
    asked = job_pb2.Scheduling(priority=7, start_by=ahead(HOUR_S), finish_by=ahead(2 * HOUR_S))
    request = service.request()
    request.scheduling.CopyFrom(asked)
    job = (await service.start(request)).job
    assert asked == job.job.scheduling
    assert job == await service.get(job.job.name)
    assert [job] == await service.list()
    usual = (await service.start()).job.job.scheduling
    assert (0, False, False) == (usual.priority, usual.HasField("start_by"), usual.HasField("finish_by"))


@pytest.mark.parametrize("priority", [-101, 101])
async def test_a_priority_beyond_its_bounds_is_refused(service: Side, priority: int) -> None:
    """By its name, with nothing written."""
    with pytest.raises(InvalidFieldError) as caught:
        await service.start(priority=priority)
    assert ["scheduling.priority"] == [violation.field for violation in caught.value.violations]
    assert {"jobs": 0, "events": 0, "requests": 0} == service.rows()


@pytest.mark.parametrize(
    ("scheduling", "field"),
    [
        ({"start_by": ahead(-60)}, "scheduling.start_by"),
        ({"finish_by": ahead(-60)}, "scheduling.finish_by"),
        ({"finish_by": Timestamp()}, "scheduling.finish_by"),
        ({"finish_by": Timestamp(seconds=4_102_444_800)}, "scheduling.finish_by"),
        ({"start_by": Timestamp(seconds=1 << 60)}, "scheduling.start_by"),
        ({"start_by": Timestamp(seconds=1, nanos=-5)}, "scheduling.start_by"),
        ({"start_by": ahead(2 * HOUR_S), "finish_by": ahead(HOUR_S)}, "scheduling.start_by"),
    ],
)
@pytest.mark.parametrize("validate_only", [False, True])
async def test_a_deadline_that_cannot_be_kept_is_refused(
    service: Side, scheduling: dict[str, Timestamp], field: str, validate_only: bool
) -> None:
    """By its name, with nothing written, in a dry run too."""
    with pytest.raises(InvalidFieldError) as caught:
        await service.start(validate_only=validate_only, **scheduling)
    assert [field] == [violation.field for violation in caught.value.violations]
    assert {"jobs": 0, "events": 0, "requests": 0} == service.rows()


async def test_a_repeated_start_is_answered_after_its_deadline(service: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer comes again, though the same deadline would be refused by now."""
    request = service.request(start_by=ahead(HOUR_S))
    first = await service.start(request)
    monkeypatch.setattr("training_common.rpc.convert.now_us", lambda: now_us() + 2 * HOUR_S * 1_000_000)
    assert first == await service.start(request)
    with pytest.raises(InvalidFieldError):
        await service.start(start_by=ahead(HOUR_S))


async def test_waiting_jobs_tell_their_place(service: Side) -> None:
    """A server without slots says so; the places follow the priority; a paused job waits for nothing."""
    names = [(await service.start(priority=priority)).job.job.name for priority in (0, 5, 0)]
    waits = {job.job.name: job.job.wait for job in await service.list()}
    assert [2, 1, 3] == [waits[one].queue_position for one in names]
    assert {job_pb2.WAIT_REASON_SLOT} == {wait.reason for wait in waits.values()}
    assert "this server has no slots (workers.slots): it only takes jobs in" == waits[names[0]].message
    pause = service.contract.PauseJobRequest(request_id=str(uuid.uuid4()), name=names[1])
    assert not (await service.stub.PauseJob(pause)).job.job.HasField("wait")
    assert 1 == (await service.get(names[0])).job.wait.queue_position
    assert not (await service.get(names[1])).job.HasField("wait")


async def test_a_deadline_ends_a_waiting_job(service: Side) -> None:
    """The server's own scheduler sees to it; the watch ends with the reason."""
    name = (await service.start(start_by=ahead(0.7))).job.job.name
    async with asyncio.timeout(20):
        async for answer in service.stub.WatchJob(service.contract.WatchJobRequest(name=name)):
            if answer.frame.HasField("end"):
                break
    assert job_pb2.JOB_STATE_FAILED == answer.frame.end.state
    assert "JOB_DEADLINE_EXCEEDED" == answer.frame.end.failure.reason


# --- dry runs


async def test_a_dry_run_makes_nothing_and_tells_what_would_be(service: Side) -> None:
    """The plan with its defaults and the estimate, as the real start gives them; the request id stays free."""
    request = service.request(validate_only=True, priority=3)
    dry = await service.start(request)
    assert {"jobs": 0, "events": 0, "requests": 0} == service.rows()
    assert not dry.job.HasField("job")
    request.validate_only = False
    real = await service.start(request)
    assert real.job.plan == dry.job.plan
    assert real.estimate == dry.estimate
    assert dry.job.plan.batch_size
    assert dry.estimate.memory_bytes > 500 * 2**20
    assert dry.estimate.memory_bytes == sum(part.size_bytes for part in dry.estimate.memory)
    assert {"jobs": 1, "requests": 1} == {key: n for key, n in service.rows().items() if key != "events"}


async def test_a_dry_run_refuses_what_a_start_refuses(name: str, tmp_path: Path) -> None:
    """Rules of the contract, and what this server lacks."""
    async with side(name, tmp_path) as service:
        for field, request in (
            ("request_id", service.request(request_id="no-uuid", validate_only=True)),
            ("plan.total_steps", service.request(validate_only=True)),
        ):
            if field == "plan.total_steps":
                request.plan.total_steps = 0
            with pytest.raises(InvalidFieldError) as caught:
                await service.start(request)
            assert [field] == [violation.field for violation in caught.value.violations]
        request = service.request(validate_only=True)
        expected: type[ForgeError]
        if name == "cognate":
            request.plan.datasets.add(dataset=pretraining_pb2.DATASET_GSM8K, weight=1)
            expected = DataUnavailableError
        else:
            request.plan.architecture = "resnet"
            expected = ArchitectureNotFoundError
        with pytest.raises(expected):
            await service.start(request)
        assert {"jobs": 0, "events": 0, "requests": 0} == service.rows()


# --- estimates


def end_an_attempt(folder: Path, seconds: float, *, lease: str = "", server: str = "") -> None:
    """Let a worker of this process train the next job to its end, in so many seconds by its own reports."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    store = JobStore(database)
    job = store.begin_attempt("here", server or CognateSettings(data_dir=folder).server_name)
    assert job is not None
    attempt = store.attempt(job.name, job.attempt, job.fencing_token)
    attempt.move(JobState.RUNNING)
    for step in (1, 20, 40):
        attempt.progress(step=step, payload={"step": step, "total_steps": 40, "metrics": {}})
    with database.write() as connection:
        connection.execute(sa.update(t.jobs).filter_by(id=job.id).values(lease=lease))
        reports = sa.select(t.events).filter_by(job_id=job.id, kind="progress").order_by(t.events.c.id)
        first, _, last = connection.execute(reports).all()
        ended_us = first.time_us + round(seconds * 1e6)
        connection.execute(sa.update(t.events).filter_by(id=last.id).values(time_us=ended_us))
    attempt.move(JobState.VALIDATING)
    attempt.move(JobState.FAILED)
    database.close()


async def test_time_is_told_only_where_it_was_measured(service: Side) -> None:
    """The median of earlier attempts of the same configuration on this server; nothing before, and nothing invented."""
    first = (await service.start()).estimate
    assert (False, 0, False, False) == (
        first.HasField("steps_per_s"),
        first.measured_attempts,
        first.HasField("run_time"),
        first.HasField("cost"),
    )
    await asyncio.to_thread(end_an_attempt, service.folder, 78.0)
    for seconds in (39.0, 19.5):
        await service.start()
        await asyncio.to_thread(end_an_attempt, service.folder, seconds)
    known = (await service.start(validate_only=True)).estimate
    assert (1.0, 3, 40.0) == (known.steps_per_s, known.measured_attempts, known.run_time.ToSeconds())
    assert not known.HasField("cost")
    alike = service.request(validate_only=True)
    alike.plan.seed, alike.plan.total_steps = 9, 400
    assert 400 == (await service.start(alike)).estimate.run_time.ToSeconds()
    other = service.request(validate_only=True)
    other.plan.batch_size = 64
    assert not (await service.start(other)).estimate.HasField("steps_per_s")


def test_what_is_parted_is_estimated_in_parts(name: str) -> None:
    """And what is whole for a while in whole. Where nothing is parted, nothing is gathered."""

    def parts(strategy: job_pb2.ComputeStrategy.ValueType, checkpoints: str) -> Mapping[str, int]:
        compute = job_pb2.Compute(processes=4, strategy=strategy)
        workers = {"checkpoints": checkpoints}
        if name == "cognate":
            settings = CognateSettings.model_validate({"workers": workers})
            return cognate_estimates.memory(pretraining_plan(batch_size=8, compute=compute), settings)
        agent_settings = AgentSettings.model_validate({"workers": workers})
        plan = training_plan(batch_size=8, compute=compute)
        return agent_estimates.memory(plan, CognateArchitecture(), agent_settings)

    for checkpoints in ("async", "sync"):
        all_, part = (
            parts(kind, checkpoints) for kind in (job_pb2.COMPUTE_STRATEGY_DDP, job_pb2.COMPUTE_STRATEGY_FSDP2)
        )
        for key in {"weights", "gradients", "optimizer", "filter"} & all_.keys():
            assert all_[key] == pytest.approx(4 * part[key], abs=4), key
        assert (all_["runtime"], all_["activations"]) == (part["runtime"], part["activations"])
        assert 2 * all_["weights"] == part["gathered"]
        assert "gathered" not in all_
        state = sum(all_.get(key, 0) for key in ("optimizer", "filter"))
        state += all_["weights"] if name == "cognate" else all_["gradients"]
        copies = (state, state) if checkpoints == "async" else (0, state)
        assert copies == (all_.get("checkpoint_copy", 0), part["checkpoint_copy"])


async def test_other_machines_and_borrowed_cores_measure_nothing_here(service: Side) -> None:
    """An attempt on either is no measure of what this server takes."""
    await service.start()
    await asyncio.to_thread(end_an_attempt, service.folder, 10.0, server="elsewhere")
    await service.start()
    await asyncio.to_thread(end_an_attempt, service.folder, 10.0, lease="leases/1")
    assert not (await service.start(validate_only=True)).estimate.HasField("steps_per_s")


async def test_a_cost_is_told_where_a_price_is_set(name: str, tmp_path: Path) -> None:
    """The measured time at the price of an hour; without a measured time there is no cost either."""
    async with side(name, tmp_path, price={"worker_hour": 3.6, "currency": "EUR"}) as service:
        assert not (await service.start()).estimate.HasField("cost")
        await asyncio.to_thread(end_an_attempt, service.folder, 39.0)
        cost = (await service.start(validate_only=True)).estimate.cost
        assert (pytest.approx(0.04), "EUR") == (cost.amount, cost.currency)


def test_a_price_without_a_currency_is_refused() -> None:
    """Nobody could tell what it means."""
    with pytest.raises(ValidationError, match="prices have no currency"):
        CognateSettings.model_validate({"price": {"worker_hour": 1.0}})
