"""The Cognate service over a real connection: jobs, idempotency, paging, watching, models."""

import asyncio
import base64
import json
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import (
    DataUnavailableError,
    ForgeError,
    IllegalTransitionError,
    IncompatibleError,
    InvalidFieldError,
    InvalidPageTokenError,
    JobNotFoundError,
    ModelNotFoundError,
    OffsetOutOfRangeError,
    RequestIdReusedError,
    SequenceOutOfRangeError,
    UnknownFieldError,
)
from cognateforge.exchange.v1 import model_pb2, resource_pb2
from cognateforge.job.v1 import job_pb2
from tests.support.published import publish_model
from tests.support.servers import running_cognate
from tests.support.stage import seeded_series
from training_common.jobs.store import JobStore
from training_common.rpc.paging import make_token
from training_common.rpc.server import RunningServer
from training_common.store import tables as t
from training_common.store.database import Database


def start(**plan: Any) -> pb.StartPretrainingRequest:
    return pb.StartPretrainingRequest(
        request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(**{"total_steps": 9, **plan})
    )


async def jobs_stored(cognate: AsyncCognateClient) -> int:
    return len((await cognate.pretraining.ListJobs(pb.ListJobsRequest())).jobs)


async def test_a_started_job_is_queued_with_its_defaults(cognate: AsyncCognateClient) -> None:
    """The answer holds the plan as it will run."""
    job = (await cognate.pretraining.StartPretraining(start(seed=3))).job
    assert job_pb2.JOB_STATE_QUEUED == job.job.state
    assert (9, 3, 4, 128, 1) == (
        job.plan.total_steps,
        job.plan.seed,
        job.plan.batch_size,
        job.plan.sequence_length,
        job.plan.warmup_steps,
    )
    assert job == (await cognate.pretraining.GetJob(pb.GetJobRequest(name=job.job.name))).job


async def test_a_curriculum_is_stored_with_its_defaults(cognate: AsyncCognateClient) -> None:
    """Half of the steps and a tenth of the documents; a plan without one has none."""
    job = (await cognate.pretraining.StartPretraining(start(curriculum=pb.Curriculum()))).job
    assert (4, 0.1) == (job.plan.curriculum.steps, job.plan.curriculum.initial_competence)
    assert not (await cognate.pretraining.StartPretraining(start())).job.plan.HasField("curriculum")


async def test_the_same_request_returns_the_same_job(cognate: AsyncCognateClient) -> None:
    """Repeating a start makes no second job; another plan under the same id is refused."""
    request = start()
    first = await cognate.pretraining.StartPretraining(request)
    assert first == await cognate.pretraining.StartPretraining(request)
    request.plan.seed = 1
    with pytest.raises(RequestIdReusedError):
        await cognate.pretraining.StartPretraining(request)
    assert 1 == await jobs_stored(cognate)


async def test_racing_repeats_make_one_job(cognate: AsyncCognateClient) -> None:
    """Sixteen copies of one request at the same time have one effect."""
    request = start()
    answers = await asyncio.gather(*(cognate.pretraining.StartPretraining(request) for _ in range(16)))
    assert 1 == len({answer.job.job.name for answer in answers})
    assert 1 == await jobs_stored(cognate)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (start(total_steps=-1), "plan.total_steps"),
        (start(total_steps=0), "plan.total_steps"),
        (start(seed=-1), "plan.seed"),
        (start(sequence_length=100), "plan.sequence_length"),
        (start(peak_learning_rate=float("nan")), "plan.peak_learning_rate"),
        (start(warmup_steps=10), "plan"),
        (start(curriculum=pb.Curriculum(steps=10)), "plan"),
        (start(curriculum=pb.Curriculum(steps=-1)), "plan.curriculum.steps"),
        (start(curriculum=pb.Curriculum(initial_competence=1.1)), "plan.curriculum.initial_competence"),
        (start(curriculum=pb.Curriculum(initial_competence=float("nan"))), "plan.curriculum.initial_competence"),
        (start(datasets=[pb.DatasetShare(dataset=99, weight=1)]), "plan.datasets[0].dataset"),  # type: ignore[arg-type]
        (start(datasets=[pb.DatasetShare(dataset=pb.DATASET_GSM8K, weight=-1)]), "plan.datasets[0].weight"),
        (start(datasets=[pb.DatasetShare(dataset=pb.DATASET_GSM8K, weight=1)] * 2), "plan.datasets"),
        (start(compute=job_pb2.Compute(processes=65)), "plan.compute.processes"),
        (start(compute=job_pb2.Compute(processes=5)), "plan"),  # the default batch has 4 rows
        (start(batch_size=2, compute=job_pb2.Compute(processes=3)), "plan"),
        (start(compute=job_pb2.Compute(processes=2, nodes=3)), "plan.compute"),
        (pb.StartPretrainingRequest(plan=pb.PretrainingPlan(total_steps=1)), "request_id"),
        (pb.StartPretrainingRequest(request_id="7", plan=pb.PretrainingPlan(total_steps=1)), "request_id"),
        (pb.StartPretrainingRequest(request_id=str(uuid.uuid4())), "plan"),
    ],
)
async def test_bad_input_is_refused_by_field_and_writes_nothing(
    cognate: AsyncCognateClient, request_: pb.StartPretrainingRequest, field: str
) -> None:
    """INVALID_ARGUMENT names the field, and no row is written."""
    with pytest.raises(InvalidFieldError) as caught:
        await cognate.pretraining.StartPretraining(request_)
    assert field in [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(cognate)


async def test_several_processes_are_part_of_the_plan(cognate: AsyncCognateClient) -> None:
    """Defaults are filled in where the plan speaks of processes, and the answer has them."""
    plan = (await cognate.pretraining.StartPretraining(start(compute=job_pb2.Compute(processes=4)))).job.plan
    assert (plan.compute.processes, plan.compute.strategy) == (4, job_pb2.COMPUTE_STRATEGY_DDP)
    plan = (await cognate.pretraining.StartPretraining(start())).job.plan
    assert not plan.HasField("compute")


@pytest.mark.parametrize("curriculum", [None, pb.Curriculum()])
async def test_what_was_left_out_is_not_blamed(cognate: AsyncCognateClient, curriculum: pb.Curriculum | None) -> None:
    """Negative steps are below no warm-up and no curriculum that were given."""
    with pytest.raises(InvalidFieldError) as caught:
        await cognate.pretraining.StartPretraining(start(total_steps=-4, curriculum=curriculum))
    assert ["plan.total_steps"] == [violation.field for violation in caught.value.violations]


async def test_a_set_that_is_not_here_is_refused_at_the_start(cognate: AsyncCognateClient) -> None:
    """GSM8K by name means GSM8K: generated problems never take its place."""
    shares = [
        pb.DatasetShare(dataset=number, weight=1)
        for number in (pb.DATASET_GSM8K, pb.DATASET_FORGE_TWOHOP, pb.DATASET_HOTPOTQA)
    ]
    with pytest.raises(DataUnavailableError, match="gsm8k") as caught:
        await cognate.pretraining.StartPretraining(start(datasets=shares))
    named = [violation.field for violation in caught.value.violations]
    assert ["plan.datasets[0].dataset", "plan.datasets[2].dataset"] == named
    assert 0 == await jobs_stored(cognate)


async def test_a_field_of_another_contract_is_refused(cognate: AsyncCognateClient) -> None:
    """A server that ignored an unknown field would train something other than was asked."""
    request = start()
    request.plan.MergeFromString(b"\xa0\x06\x01")  # field 100, varint 1
    with pytest.raises(UnknownFieldError, match="field number 100"):
        await cognate.pretraining.StartPretraining(request)
    assert 0 == await jobs_stored(cognate)


async def test_jobs_are_paged_newest_first_and_tokens_are_bound(cognate: AsyncCognateClient) -> None:
    """Pages neither lose nor repeat a job, and a token is good for its own query only."""
    names = [(await cognate.pretraining.StartPretraining(start(seed=n))).job.job.name for n in range(5)]
    seen: list[str] = []
    request = pb.ListJobsRequest(page_size=2)
    while True:
        page = await cognate.pretraining.ListJobs(request)
        seen += [job.job.name for job in page.jobs]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert names[::-1] == seen
    for token, states in ((request.page_token, [job_pb2.JOB_STATE_FAILED]), ("garbage", []), ("AAAA", [])):
        with pytest.raises(InvalidPageTokenError) as caught:
            await cognate.pretraining.ListJobs(pb.ListJobsRequest(page_token=token, states=states))
        assert ["page_token"] == [violation.field for violation in caught.value.violations]


async def test_jobs_are_filtered_by_state(cognate: AsyncCognateClient) -> None:
    """Only the asked states come back."""
    kept = (await cognate.pretraining.StartPretraining(start())).job.job.name
    gone = (await cognate.pretraining.StartPretraining(start())).job.job.name
    await cognate.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=gone))
    queued = await cognate.pretraining.ListJobs(pb.ListJobsRequest(states=[job_pb2.JOB_STATE_QUEUED]))
    assert [kept] == [job.job.name for job in queued.jobs]


async def test_a_watch_tells_everything_once_and_ends(cognate: AsyncCognateClient) -> None:
    """Events come in order from any position, live ones too, and the end frame is last."""
    name = (await cognate.pretraining.StartPretraining(start())).job.job.name
    frames: list[job_pb2.WatchFrame] = []

    async def watch() -> None:
        frames.extend([frame async for frame in cognate.watch_job(name) if not frame.HasField("heartbeat")])

    task = asyncio.create_task(watch())
    await cognate.pretraining.PauseJob(pb.PauseJobRequest(request_id=str(uuid.uuid4()), name=name))
    await cognate.pretraining.ResumeJob(pb.ResumeJobRequest(request_id=str(uuid.uuid4()), name=name))
    await cognate.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=name))
    async with asyncio.timeout(10):
        await task
    assert [1, 2, 3, 4] == [frame.event.sequence for frame in frames[:-1]]
    assert (job_pb2.JOB_STATE_CANCELLED, 4) == (frames[-1].end.state, frames[-1].end.last_sequence)
    late = [frame async for frame in cognate.watch_job(name, after_sequence=3)]
    assert frames[3:] == late


async def test_a_watch_can_leave_most_progress_out(tmp_path: Path) -> None:
    """Of progress every 100th sequence comes, of anything else every event, and the end though its last is left out."""
    store = JobStore(Database(f"sqlite:///{tmp_path / 'store.db'}"))
    async with (
        running_cognate(tmp_path, workers={"slots": 0, "lost_after_s": 3600}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        name = (await client.pretraining.StartPretraining(start())).job.job.name
        seeded_series(store, name, 1_000)
        await client.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=name))
        seeded_series(store, name, 50)
        frames = [frame async for frame in client.watch_job(name, progress_every=100)]
        resumed = [frame async for frame in client.watch_job(name, frames[3].event.sequence, progress_every=100)]
        every = [frame async for frame in client.watch_job(name)]
    store.database.close()
    assert 1_053 == len(every)
    assert [1, *range(100, 1_001, 100), 1_002] == [frame.event.sequence for frame in frames[:-1]]
    assert (job_pb2.JOB_STATE_CANCELLED, 1_052) == (frames[-1].end.state, frames[-1].end.last_sequence)
    assert frames[4:] == resumed


async def test_a_watch_of_little_progress_is_refused_what_retention_removed(tmp_path: Path) -> None:
    """A hole that was asked for is not taken for one that retention made, nor the other way round."""
    store = JobStore(Database(f"sqlite:///{tmp_path / 'store.db'}"))
    async with (
        running_cognate(tmp_path, workers={"slots": 0, "lost_after_s": 3600}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        name = (await client.pretraining.StartPretraining(start())).job.job.name
        seeded_series(store, name, 500)
        with store.database.write() as connection:
            connection.execute(sa.delete(t.events).where(t.events.c.sequence < 50))
            connection.execute(sa.update(t.jobs).values(first_sequence=50))
        with pytest.raises(SequenceOutOfRangeError) as caught:
            await anext(aiter(client.watch_job(name, 10, progress_every=100)))
        found = await anext(aiter(client.watch_job(name, 49, progress_every=100)))
    store.database.close()
    assert ("50", 100) == (caught.value.metadata["oldest_sequence"], found.event.sequence)


async def test_a_quiet_watch_gets_heartbeats(tmp_path: Path) -> None:
    """Silence is told apart from a dead connection."""
    async with running_cognate(tmp_path, heartbeat_frame_s=0.1) as server, AsyncCognateClient(server.address) as client:
        name = (await client.pretraining.StartPretraining(start())).job.job.name
        call = client.pretraining.WatchJob(pb.WatchJobRequest(name=name, after_sequence=1), timeout=10)
        async for answer in call:
            assert 1 == answer.frame.heartbeat.last_sequence
            break


async def test_a_quiet_watch_gets_heartbeats_while_other_jobs_are_busy(tmp_path: Path) -> None:
    """Their events wake the watch, and must not put its heartbeat off for ever."""
    async with running_cognate(tmp_path, heartbeat_frame_s=0.3) as server, AsyncCognateClient(server.address) as client:
        name = (await client.pretraining.StartPretraining(start())).job.job.name
        call = client.pretraining.WatchJob(pb.WatchJobRequest(name=name, after_sequence=1), timeout=30)

        async def keep_busy() -> None:
            while True:  # a change well within each heartbeat's silence
                await client.pretraining.StartPretraining(start())
                await asyncio.sleep(0.05)

        busy = asyncio.create_task(keep_busy())
        async for answer in call:
            assert 1 == answer.frame.heartbeat.last_sequence
            break
        busy.cancel()


async def test_lists_beyond_their_bound_are_refused_unread(cognate: AsyncCognateClient) -> None:
    """One request of 900,000 items kept the event loop for half a minute; the bound is looked at first."""
    with pytest.raises(InvalidFieldError, match="states: must have at most 16 items, got 900000"):
        await cognate.pretraining.ListJobs(pb.ListJobsRequest(states=[job_pb2.JOB_STATE_QUEUED] * 900_000))
    request = start(datasets=[pb.DatasetShare()] * 200_000)
    with pytest.raises(InvalidFieldError, match="must have at most 8 items") as caught:
        await cognate.pretraining.StartPretraining(request)
    assert ["plan.datasets"] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(cognate)


@pytest.mark.parametrize("row", [0, -1, True, 2**63, 10**30, "1"])
async def test_a_page_token_with_a_made_up_row_is_refused(cognate: AsyncCognateClient, row: Any) -> None:
    """INVALID_ARGUMENT, never an error of the database."""
    bound = json.loads(base64.urlsafe_b64decode(make_token(pb.ListJobsRequest(), 1)))[0]
    token = base64.urlsafe_b64encode(json.dumps([bound, row]).encode()).decode()
    with pytest.raises(InvalidPageTokenError):
        await cognate.pretraining.ListJobs(pb.ListJobsRequest(page_token=token))


async def test_a_request_id_in_capitals_is_the_same(cognate: AsyncCognateClient) -> None:
    """A UUID's letters have no case."""
    request = start()
    first = await cognate.pretraining.StartPretraining(request)
    request.request_id = request.request_id.upper()
    assert first.job.job.name == (await cognate.pretraining.StartPretraining(request)).job.job.name


async def test_a_position_beyond_the_last_event_is_refused(cognate: AsyncCognateClient) -> None:
    """OUT_OF_RANGE, not an endless silence."""
    name = (await cognate.pretraining.StartPretraining(start())).job.job.name
    with pytest.raises(SequenceOutOfRangeError, match="last event 1"):
        [frame async for frame in cognate.watch_job(name, after_sequence=5)]


async def test_metrics_are_read_in_pieces(
    cognate: AsyncCognateClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is lost or doubled where one piece ends and the next begins."""
    monkeypatch.setattr("training_common.rpc.jobs._METRICS_BATCH", 2)
    name = (await cognate.pretraining.StartPretraining(start())).job.job.name
    database = Database(f"sqlite:///{tmp_path / 'cognate' / 'store.db'}")
    store = JobStore(database)
    begun = store.begin_attempt("test")
    assert begun is not None
    attempt = store.attempt(name, begun.attempt, begun.fencing_token)
    for step in range(1, 6):
        attempt.append("progress", {"step": step, "total_steps": 9, "metrics": {"loss": step / 2}}, step=step)
    database.close()
    [series] = (await cognate.pretraining.GetMetrics(pb.GetMetricsRequest(name=name))).series
    assert ("loss", [1, 2, 3, 4, 5], [0.5, 1.0, 1.5, 2.0, 2.5]) == (
        series.name,
        list(series.steps),
        list(series.values),
    )


async def test_unknown_names_are_told(cognate: AsyncCognateClient) -> None:
    """NOT_FOUND repeats the name."""
    name = f"jobs/{uuid.uuid4()}"
    with pytest.raises(JobNotFoundError, match=name):
        await cognate.pretraining.GetJob(pb.GetJobRequest(name=name))
    with pytest.raises(ModelNotFoundError, match="cognate-25m@7"):
        await cognate.models.GetModel(model_pb2.GetModelRequest(name="cognate-25m@7"))


async def test_an_illegal_move_names_the_legal_ones(cognate: AsyncCognateClient) -> None:
    """FAILED_PRECONDITION lists what the state allows."""
    name = (await cognate.pretraining.StartPretraining(start())).job.job.name
    with pytest.raises(IllegalTransitionError) as caught:
        await cognate.pretraining.ResumeJob(pb.ResumeJobRequest(request_id=str(uuid.uuid4()), name=name))
    assert "CANCELLED, FAILED, PAUSED, PREPARING" == caught.value.metadata["allowed"]
    assert ["name"] == [violation.field for violation in caught.value.violations]


async def test_a_model_is_validated_by_a_process_of_its_own(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """What that finds wrong comes back as its error; a version that is not there needs none."""
    publish_model(tmp_path / "cognate")
    request = pb.ValidateModelRequest(request_id=str(uuid.uuid4()), name="cognate-25m@1")
    with pytest.raises(IncompatibleError, match="cognate-25m@1 has no statement of how it was made"):
        await cognate.pretraining.ValidateModel(request, timeout=60)
    request = pb.ValidateModelRequest(request_id=str(uuid.uuid4()), name="cognate-25m@2")
    with pytest.raises(ModelNotFoundError):
        await cognate.pretraining.ValidateModel(request)


async def test_availability_is_measured(cognate: AsyncCognateClient) -> None:
    """Cores and memory of this host; a queued job is counted."""
    await cognate.pretraining.StartPretraining(start())
    now = await cognate.resources.GetAvailability(resource_pb2.GetAvailabilityRequest())
    assert (0, 1) == (now.running_jobs, now.queued_jobs)
    assert all(capacity.total > 0 and capacity.held == 0 for capacity in now.capacities)


async def test_a_published_model_is_listed_fetched_and_watched(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """What was published comes back byte for byte, and the outbox tells of it in order."""
    rows = [
        publish_model(tmp_path / "cognate"),
        publish_model(tmp_path / "cognate", state="EXPERIMENTAL", payload=b"x" * 3_000_000),
    ]
    listed = (await cognate.models.ListModels(model_pb2.ListModelsRequest())).models
    assert ["cognate-25m@2", "cognate-25m@1"] == [model.name for model in listed]
    only = model_pb2.ListModelsRequest(states=[model_pb2.MODEL_STATE_EXPERIMENTAL])
    assert [rows[1].digest] == [model.digest for model in (await cognate.models.ListModels(only)).models]
    fetched = await cognate.fetch_model("cognate-25m", tmp_path / "out")
    assert (rows[1].digest, b"x" * 3_000_000) == (fetched.digest, (fetched.path / "model.safetensors").read_bytes())
    call = cognate.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=10)
    seen = []
    async for frame in call:
        seen.append((frame.event.sequence, frame.event.published.name))
        if len(seen) == 2:
            break
    assert [(1, "cognate-25m@1"), (2, "cognate-25m@2")] == seen


async def test_a_fetch_starts_at_any_byte_and_not_beyond_the_end(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """The end itself is a fine place: a client that has everything asks once more."""
    row = publish_model(tmp_path / "cognate", payload=bytes(range(256)) * 20_000)
    for offset in (0, 1, 1 << 20, row.size_bytes - 1, row.size_bytes):
        request = model_pb2.FetchModelRequest(name=row.name, offset_bytes=offset)
        chunks = [frame.chunk async for frame in cognate.models.FetchModel(request, timeout=10)][1:]
        assert (bytes(range(256)) * 20_000)[offset:] == b"".join(chunk.data for chunk in chunks)
        assert all(chunk.offset_bytes >= offset for chunk in chunks)
    with pytest.raises(OffsetOutOfRangeError):
        request = model_pb2.FetchModelRequest(name=row.name, offset_bytes=row.size_bytes + 1)
        [frame async for frame in cognate.models.FetchModel(request, timeout=10)]


async def test_a_handshake_names_every_mismatch(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """Fit, and each way not to fit."""
    publish_model(tmp_path / "cognate", state="EXPERIMENTAL")
    wanted = model_pb2.Architecture(name="cognate_v1", fingerprint=f"sha256:{'c' * 64}", act_version=2)
    request = model_pb2.CheckCompatibilityRequest(name="cognate-25m", architecture=wanted)
    answer = await cognate.models.CheckCompatibility(request)
    assert model_pb2.VERDICT_INCOMPATIBLE == answer.verdict
    kinds = model_pb2.MismatchKind
    expected = [
        (kinds.MISMATCH_KIND_FINGERPRINT, "architecture.fingerprint"),
        (kinds.MISMATCH_KIND_ACT_VERSION, "architecture.act_version"),
        (kinds.MISMATCH_KIND_EXPERIMENTAL, "state"),
    ]
    assert expected == [(mismatch.kind, mismatch.field) for mismatch in answer.mismatches]
    assert [kinds.MISMATCH_KIND_ARCHITECTURE_NAME, *(kind for kind, _ in expected)] == list(answer.compared)
    fine = model_pb2.CheckCompatibilityRequest(
        name="cognate-25m", architecture=model_pb2.Architecture(name="cognate_v1"), accept_experimental=True
    )
    answer = await cognate.models.CheckCompatibility(fine)
    assert model_pb2.VERDICT_COMPATIBLE == answer.verdict
    assert [kinds.MISMATCH_KIND_ARCHITECTURE_NAME] == list(answer.compared)


async def test_a_call_without_a_deadline_is_refused(cognate_server_up: RunningServer) -> None:
    """The policy asks for one, so that no server works for nobody."""
    async with grpc.aio.insecure_channel(cognate_server_up.address) as channel:
        call = channel.unary_unary(
            "/cognateforge.cognate.v1.CognatePretrainingService/GetServerInfo",
            request_serializer=pb.GetServerInfoRequest.SerializeToString,
            response_deserializer=pb.GetServerInfoResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(pb.GetServerInfoRequest())
        assert grpc.StatusCode.INVALID_ARGUMENT == caught.value.code()
        assert (await call(pb.GetServerInfoRequest(), timeout=5)).info.version


async def test_a_fault_inside_keeps_its_text_inside(
    cognate: AsyncCognateClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown exception is INTERNAL with the request id; its text stays in the log."""

    def fail(*_: object) -> None:
        raise KeyError("secret of the house")

    monkeypatch.setattr("training_common.jobs.store.JobStore.page", fail)
    with pytest.raises(ForgeError) as caught:
        await cognate.pretraining.ListJobs(pb.ListJobsRequest())
    assert "INTERNAL" == caught.value.reason_name()
    assert "secret" not in str(caught.value)
    assert caught.value.request_id
