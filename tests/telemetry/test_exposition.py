"""What servers expose, over real HTTP: the catalogue and nothing else, also when the store is away."""

import asyncio
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cognateforge.agent.v1 import training_pb2
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import JobNotFoundError, UnavailableError
from cognateforge.exchange.v1 import model_pb2
from tests.support.certificates import authority, files, server_tls, spiffe
from tests.support.logs import PlayedWorker
from tests.support.published import PAYLOAD, publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from tests.telemetry.scraping import OPENMETRICS, get, samples, until, value, value_of
from training_common.attempt import Json
from training_common.jobs.states import JobState
from training_common.rpc.policy import role_names
from training_common.rpc.server import RunningServer
from training_common.telemetry.catalog import BY_NAME, CATALOG, Kind
from training_common.telemetry.readings import Reading

parse_openmetrics: Callable[[str], Iterable[Metric]] = openmetrics.text_string_to_metric_families
LISTENING = {"address": "127.0.0.1:0"}
GET_JOB = "cognateforge.cognate.v1.CognatePretrainingService/GetJob"
LIST_JOBS = "/cognateforge.cognate.v1.CognatePretrainingService/ListJobs"
# Told once the scheduler and the scrubber have looked.
LATE = {"forge_scheduler_tick_age_seconds", "forge_artifacts_unverified_seconds"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def cognate(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_cognate(tmp_path / "cognate", telemetry=LISTENING) as server:
        yield server


def play(folder: Path) -> PlayedWorker:
    """Play a worker that trains."""
    worker = PlayedWorker(folder)
    attempt = worker.begin()
    attempt.move(JobState.RUNNING)
    attempt.progress(step=1, payload={"step": 1, "total_steps": 9, "metrics": {"loss": 2.5, "halting_histogram": [1]}})
    attempt.progress(step=2, payload={"step": 2, "total_steps": 9, "metrics": {"validation_loss": 3.0}})
    return worker


def declared(families: Iterable[Metric]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return kind and labels of what was exposed, by the catalogue's names."""
    found = {}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
        assert len(labels) <= 1, (name, labels)
        found[name] = (family.type, labels.pop() if labels else ())
    return found


def catalogued(service: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what the catalogue says of a service."""
    return {
        metric.name: (metric.kind.value, tuple(sorted(("service", *metric.labels))))
        for metric in CATALOG
        if service in metric.services
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
async def test_each_service_exposes_the_catalogue(tmp_path: Path, accept: str) -> None:
    """Every metric, with the labels and the kind that the catalogue says, and none beside them."""
    authority(tmp_path / "certs", *role_names())
    roles = {spiffe(role): (role,) for role in role_names()}
    settings = {"telemetry": LISTENING, "security": {"tls": server_tls(tmp_path / "certs"), "roles": roles}}
    tls = files(tmp_path / "certs", "operator")
    parse = parse_openmetrics if accept else parse_text
    # What is published is looked at when a server starts.
    async with running_cognate(tmp_path / "cognate"), running_agent(tmp_path / "agent"):
        publish_model(tmp_path / "cognate")
        publish_agent(tmp_path / "agent")
    async with (
        running_cognate(tmp_path / "cognate", **settings) as first,
        running_agent(tmp_path / "agent", **settings) as second,
        AsyncCognateClient(first.address, tls=tls) as cognate,
        AsyncAgentClient(second.address, tls=tls) as agents,
    ):
        # An answer and an error of each: their series are made by the first call.
        with pytest.raises(JobNotFoundError):
            await cognate.pretraining.GetJob(pb.GetJobRequest(name=f"jobs/{uuid.uuid4()}"))
        with pytest.raises(JobNotFoundError):
            await agents.training.GetJob(training_pb2.GetJobRequest(name=f"jobs/{uuid.uuid4()}"))
        for server, service in ((first, "cognate"), (second, "agent")):
            worker = play(tmp_path / service)
            await until(server, lambda found: LATE <= {sample.name for sample in found})
            page = await get(server, accept=accept)
            assert declared(parse(page.text)) == catalogued(service)
            assert {f.documentation for f in parse(page.text)} <= {metric.description for metric in CATALOG}
            assert all(s.labels["service"] == service for f in parse(page.text) for s in f.samples)
            worker.database.close()


def test_names_are_prometheus_ones() -> None:
    """Counters end in _total, and nothing else does; no name is declared twice."""
    assert len(BY_NAME) == len(CATALOG)
    for metric in CATALOG:
        assert metric.name.startswith("forge_")
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert "service" not in metric.labels
        assert "le" not in metric.labels


async def test_calls_are_counted_by_their_end(cognate: RunningServer) -> None:
    """By method and code, errors by reason, unary ones with their time; a stream while it is open, and when cut."""
    watch = "cognateforge.exchange.v1.ModelService/WatchModels"
    assert await value(cognate, "forge_rpc_calls_total", method=GET_JOB, code="OK") == 0
    async with AsyncCognateClient(cognate.address) as client:
        for _ in range(3):
            with pytest.raises(JobNotFoundError):
                await client.pretraining.GetJob(pb.GetJobRequest(name=f"jobs/{uuid.uuid4()}"))
        stream = client.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=30)
        reading = asyncio.ensure_future(anext(aiter(stream)))
        await until(cognate, lambda found: value_of(found, "forge_rpc_open_streams", method=watch) == 1)
        reading.cancel()
        found = await until(cognate, lambda found: value_of(found, "forge_rpc_open_streams", method=watch) == 0)
    assert value_of(found, "forge_rpc_calls_total", method=GET_JOB, code="NOT_FOUND") == 3
    assert value_of(found, "forge_rpc_errors_total", method=GET_JOB) == 3
    assert value_of(found, "forge_rpc_errors_total", method=GET_JOB, reason="JOB_NOT_FOUND") == 3
    assert value_of(found, "forge_rpc_duration_seconds_count", method=GET_JOB) == 3
    assert value_of(found, "forge_rpc_calls_total", method=watch, code="CANCELLED") == 1
    assert value_of(found, "forge_rpc_errors_total", method=watch) is None
    assert value_of(found, "forge_rpc_duration_seconds_count", method=watch) is None


async def test_a_slow_call_leads_to_its_trace(cognate: RunningServer) -> None:
    """In OpenMetrics a bucket has the newest sampled trace as its exemplar; the plain form has none."""
    async with grpc.aio.insecure_channel(cognate.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{GET_JOB.replace('Get', 'List')}s"
        )
        await call(b"", timeout=10, metadata=(("traceparent", TRACEPARENT),))
        await call(b"", timeout=10, metadata=(("traceparent", TRACEPARENT[:-1] + "0"),))  # not kept by anybody
    page = await get(cognate, accept=OPENMETRICS)
    exemplars = [s.exemplar for f in parse_openmetrics(page.text) for s in f.samples if s.exemplar is not None]
    assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": TRACEPARENT.split("-")[1]}]
    assert "trace_id" not in (await get(cognate)).text


async def test_fetched_bytes_and_watchers_that_lag(cognate: RunningServer, tmp_path: Path) -> None:
    """What was sent of a model's payload, and how many events the slowest watcher has yet to be sent."""
    for _ in range(2):
        publish_model(tmp_path / "cognate", payload=PAYLOAD)
    async with AsyncCognateClient(cognate.address) as client:
        fetched = await client.fetch_model("cognate-25m@1", tmp_path / "fetched")
        assert fetched.bytes_received == len(PAYLOAD)
        assert await value(cognate, "forge_outbox_lag_events") == 0
        stream = client.watch_models()
        await anext(aiter(stream))
        found = await samples(cognate)
        await stream.aclose()
    assert value_of(found, "forge_fetched_bytes_total") == len(PAYLOAD)
    assert value_of(found, "forge_outbox_events") == 2
    assert value_of(found, "forge_outbox_lag_events") in (0, 1)


async def test_training_is_told_of_the_newest_jobs_alone(tmp_path: Path) -> None:
    """The newest value of each metric, whichever event had it; ended jobs and those beyond the bound have no series."""
    async with running_cognate(tmp_path, telemetry={**LISTENING, "training_jobs": 1}) as server:
        older, newer = play(tmp_path), play(tmp_path)
        found = await samples(server)
        assert {s.labels["training_job"] for s in found if s.name.startswith("forge_training")} == {newer.job}
        assert value_of(found, "forge_training_step", training_job=newer.job) == 2
        assert value_of(found, "forge_training_total_steps", training_job=newer.job) == 9
        assert value_of(found, "forge_training_metric", metric="loss") == 2.5
        assert value_of(found, "forge_training_metric", metric="validation_loss") == 3.0
        assert value_of(found, "forge_training_metric", metric="halting_histogram") is None
        assert value_of(found, "forge_jobs", state="RUNNING") == 2
        newer.end()
        found = await samples(server)
        assert {s.labels["training_job"] for s in found if s.name.startswith("forge_training")} == {older.job}
        assert value_of(found, "forge_jobs", state="RUNNING") == 1
        older.database.close()
        newer.database.close()


async def test_what_a_job_reports_has_bounds(tmp_path: Path) -> None:
    """Hundreds of names, long ones, and such as no page can hold: the page stays valid, and counts what is absent."""
    hostile: dict[str, Json] = {
        "loss": 1.5,
        "x" * 10_000: 1.0,
        "half \ud800": 1.0,
        "much": 10**400,
        "flag": [True],
        'a"b\\c\nd é': 2.0,
    }
    async with running_cognate(tmp_path, telemetry=LISTENING) as server:
        worker = PlayedWorker(tmp_path)
        attempt = worker.begin()
        for step in range(1, 4):
            many = {f"made_up_{step}_{index}": 1.0 for index in range(200)}
            attempt.progress(step=step, payload={"step": step, "total_steps": 9, "metrics": {**hostile, **many}})
        for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
            page = await get(server, accept=accept)
            assert page.status == 200
            told = [s for f in parse(page.text) for s in f.samples if s.name == "forge_training_metric"]
            names = {sample.labels["metric"] for sample in told}
            assert len(told) == len(names) == 64
            assert {"loss", 'a"b\\c\nd é', "made_up_1_0"} <= names
        found = await samples(server)
        assert value_of(found, "forge_store_up") == 1
        assert value_of(found, "forge_training_metrics_left_out") == 2 + 600 - 62
        worker.database.close()


async def test_what_waits_is_told_by_its_reason(cognate: RunningServer, tmp_path: Path) -> None:
    """As a job's own `wait` says."""
    worker = PlayedWorker(tmp_path / "cognate")
    found = await samples(cognate)
    assert value_of(found, "forge_jobs_waiting", what="SLOT") == 1
    assert sum(s.value for s in found if s.name == "forge_jobs_waiting") == 1
    assert (value_of(found, "forge_queue_oldest_seconds") or 0) > 0
    assert value_of(found, "forge_jobs", state="QUEUED") == 1
    worker.database.close()


async def test_a_store_that_fails_takes_its_families_with_it(cognate: RunningServer, tmp_path: Path) -> None:
    """The scrape answers, says so, and tells nothing that it has not just read. /healthz says what health says."""
    before = await samples(cognate)
    assert value_of(before, "forge_store_up") == 1
    page = await get(cognate, "/healthz")
    assert (page.status, page.text) == (200, "SERVING\n")
    store = tmp_path / "cognate" / "store.db"
    store.rename(store.with_suffix(".away"))
    found = await until(cognate, lambda found: value_of(found, "forge_serving") == 0)
    assert value_of(found, "forge_store_up") == 0
    gone = {"forge_jobs", "forge_jobs_waiting", "forge_queue_oldest_seconds", "forge_leases", "forge_outbox_events"}
    assert gone <= {sample.name for sample in before}
    assert gone & {sample.name for sample in found} == set()
    assert {"forge_worker_slots", "forge_disk_free_bytes", "forge_rpc_calls_total"} <= {sample.name for sample in found}
    page = await get(cognate, "/healthz")
    assert (page.status, page.text) == (503, "NOT_SERVING\n")
    assert (await get(cognate, "/readyz")).status == 503
    # To start the process anew would not bring its store back.
    page = await get(cognate, "/livez")
    assert (page.status, page.text) == (200, "ALIVE\n")
    store.unlink(missing_ok=True)
    store.with_suffix(".away").rename(store)
    found = await until(cognate, lambda found: value_of(found, "forge_store_up") == 1)
    assert gone <= {sample.name for sample in found}


async def test_a_store_that_hangs_delays_no_scrape_and_no_call(
    cognate: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scrape waits for a bound, calls go on meanwhile, and threads do not pile up."""
    go_on = threading.Event()
    asked = []

    def hang() -> list[Reading]:
        asked.append(threading.current_thread().name)
        go_on.wait(30)
        return []

    store = cognate.telemetry.store
    assert store is not None
    await store.readings()
    monkeypatch.setattr(store, "_look", hang)
    monkeypatch.setattr(store, "_patience_s", 0.2)
    async with AsyncCognateClient(cognate.address) as client:
        scrapes = [asyncio.create_task(samples(cognate)) for _ in range(3)]
        await client.pretraining.ListJobs(pb.ListJobsRequest(), timeout=5)
        assert [value_of(found, "forge_store_up") for found in await asyncio.gather(*scrapes)] == [0, 0, 0]
        assert value_of(await samples(cognate), "forge_store_up") == 0
    assert len(asked) == 1
    go_on.set()


async def test_a_store_that_took_no_write_is_down_until_it_takes_one(cognate: RunningServer) -> None:
    """A write is tried for the next scrape: where nothing else is written, nobody would learn that it is back."""
    telemetry = cognate.telemetry
    assert await value(cognate, "forge_store_up") == 1
    assert telemetry.database is not None
    refusal = sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))

    def refuse(_connection: sa.Connection) -> None:
        raise refusal

    sa.event.listen(telemetry.database.engine, "commit", refuse)
    async with AsyncCognateClient(cognate.address) as client:
        plan = pb.PretrainingPlan(total_steps=9)
        with pytest.raises(UnavailableError):
            request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
            await client.pretraining.StartPretraining(request)
    found = await samples(cognate)
    assert value_of(found, "forge_store_up") == 0
    sa.event.remove(telemetry.database.engine, "commit", refuse)
    written = value_of(found, "forge_store_write_seconds_count") or 0
    found = await samples(cognate)
    assert value_of(found, "forge_store_up") == 1
    assert (value_of(found, "forge_store_write_seconds_count") or 0) > written
