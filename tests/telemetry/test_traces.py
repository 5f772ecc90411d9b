"""Trace ids without and with OpenTelemetry: what callers bring is kept, and a dead collector costs nothing."""

import asyncio
import contextlib
import contextvars
import io
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from cognateforge.client import AsyncCognateClient, CognateClient, tracing
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import JobNotFoundError
from tests.support.otlp_sink import OtlpSink, otlp_sink
from tests.support.servers import running_cognate
from tests.support.waiting import until
from tests.telemetry.scraping import samples
from training_common import logs
from training_common.settings import TelemetrySettings
from training_common.telemetry import traces
from training_common.telemetry.catalog import CATALOG
from training_common.telemetry.spans import Tracer

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
START = "/cognateforge.cognate.v1.CognatePretrainingService/StartPretraining"


def started() -> pb.StartPretrainingRequest:
    return pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TRACEPARENT, traces.TraceContext(TRACE, SPAN, True)),
        (TRACEPARENT[:-2] + "00", traces.TraceContext(TRACE, SPAN, False)),
        (f"cc-{TRACE}-{SPAN}-01-later", traces.TraceContext(TRACE, SPAN, True)),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (TRACEPARENT.upper(), None),
        ("", None),
        ("x" * 5000, None),
    ],
)
def test_a_traceparent_is_read_as_w3c_has_it(text: str, found: traces.TraceContext | None) -> None:
    """What is none is nothing, and what was read is written as it was."""
    assert traces.parse(text) == found
    if found is not None and text.startswith("00"):
        assert str(found) == text


async def test_a_job_keeps_its_callers_trace_where_nothing_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id is answered, and stands in the log beside the request's and the job's."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure()
    async with running_cognate(tmp_path) as server, AsyncCognateClient(server.address) as client:
        stub = client.pretraining
        answer = await stub.StartPretraining(started(), metadata=(("traceparent", TRACEPARENT),))
        name = answer.job.job.name
        assert answer.job.job.trace_id == TRACE
        assert (await stub.GetJob(pb.GetJobRequest(name=name))).job.job.trace_id == TRACE
        assert (await stub.StartPretraining(started())).job.job.trace_id == ""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [line for line in lines if line["event"] == "rpc"]
    assert [line.get("trace_id", "") for line in told] == [TRACE, "", ""]
    assert [line["job"] for line in told[:2]] == [name, name]
    assert all(line["request_id"] and "span_id" not in line for line in told)


def test_a_client_whose_program_has_no_opentelemetry_pays_nothing_for_it() -> None:
    """Neither does the library import it, nor is anything sent."""
    code = (
        "import sys\n"
        "from cognateforge.client import CognateClient, tracing\n"
        "assert tracing.begin('/a/B') is None\n"
        "import cognate_server.server, agent_server.server\n"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


async def test_spans_and_metrics_reach_a_collector(tmp_path: Path) -> None:
    """A refused call is no error of the server; metrics are those of the exposition; the last spans come at the end."""
    with otlp_sink() as sink:
        told = {"otlp_endpoint": sink.endpoint, "otlp_interval_s": 1, "address": "127.0.0.1:0"}
        async with running_cognate(tmp_path, telemetry=told) as server, AsyncCognateClient(server.address) as client:
            with pytest.raises(JobNotFoundError):
                await client.pretraining.GetJob(
                    pb.GetJobRequest(name=f"jobs/{uuid.uuid4()}"), metadata=(("traceparent", TRACEPARENT),)
                )
            exposed = {sample.name for sample in await samples(server)} & {metric.name for metric in CATALOG}
            # The first of what is sent may be from before the scheduler's first look.
            wanted = exposed | {"forge_rpc_duration_seconds"}
            await asyncio.to_thread(sink.until, lambda seen: wanted <= set(seen.metrics))
        [span] = sink.trace(TRACE)
    assert (span.service, span.kind, span.parent_id, span.failed) == ("cognate", 2, SPAN, False)
    assert span.name == "cognateforge.cognate.v1.CognatePretrainingService/GetJob"
    assert span.attributes["rpc.grpc.status_code"] == 5
    assert span.attributes["forge.reason"] == "JOB_NOT_FOUND"
    kinds = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}
    declared = {metric.name: kinds[metric.kind.value] for metric in CATALOG}
    assert {name: metric.WhichOneof("data") for name, metric in sink.metrics.items()}.items() <= declared.items()
    [point] = sink.metrics["forge_rpc_duration_seconds"].histogram.data_points
    assert (point.count, sum(point.bucket_counts)) == (1, 1)
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    assert not point.HasField("min")
    assert sink.metrics["forge_rpc_calls_total"].sum.is_monotonic


async def test_a_dead_collector_slows_neither_calls_nor_the_end(tmp_path: Path) -> None:
    """What it does not take is dropped."""
    told = {"otlp_endpoint": "http://127.0.0.1:9", "otlp_interval_s": 1}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_cognate(tmp_path, telemetry=told))
        async with AsyncCognateClient(server.address) as client:
            began = time.monotonic()
            for _ in range(20):
                await client.pretraining.ListJobs(pb.ListJobsRequest(), timeout=5)
            assert time.monotonic() - began < 10
        began = time.monotonic()
    assert time.monotonic() - began < 12


async def test_a_collector_that_comes_back_is_told_again(tmp_path: Path) -> None:
    """Spans of after, and the counters with what they have counted meanwhile."""
    async with contextlib.AsyncExitStack() as stack:
        with otlp_sink() as sink:
            told = {"otlp_endpoint": sink.endpoint, "otlp_interval_s": 1, "trace_ratio": 1}
            server = await stack.enter_async_context(running_cognate(tmp_path, telemetry=told))
            client = await stack.enter_async_context(AsyncCognateClient(server.address))
            await client.pretraining.ListJobs(pb.ListJobsRequest())
            await asyncio.to_thread(sink.until, lambda seen: bool(seen.spans) and COUNTED in seen.metrics)
        with structlog.testing.capture_logs() as told_of:
            for _ in range(3):
                await client.pretraining.ListJobs(pb.ListJobsRequest())
            await until(lambda: "metrics not sent" in [line["event"] for line in told_of], timeout_s=30)
        with otlp_sink(int(sink.endpoint.rpartition(":")[2])) as again:
            await client.pretraining.ListJobs(pb.ListJobsRequest())
            await asyncio.to_thread(again.until, lambda seen: bool(seen.spans) and calls_counted(seen) == 5)


COUNTED = "forge_rpc_calls_total"


def calls_counted(sink: OtlpSink) -> int:
    points = sink.metrics[COUNTED].sum.data_points if COUNTED in sink.metrics else []
    return sum(int(point.as_double) for point in points)


async def test_a_client_of_a_traced_program_sends_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of all four kinds of client code, and a place that the caller has given himself is left as it is."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    async with running_cognate(tmp_path) as server:

        def synchronous() -> str:
            with CognateClient(server.address) as client:
                job = client.pretraining.StartPretraining(started()).job.job
                client.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=job.name))
                list(client.watch_job(job.name))
                with pytest.raises(JobNotFoundError):
                    client.pretraining.GetJob(pb.GetJobRequest(name=f"jobs/{uuid.uuid4()}"))
            return job.trace_id

        traced = await asyncio.to_thread(synchronous)
        spans = [(s.name.rsplit("/")[-1], s.attributes["rpc.grpc.status_code"]) for s in finished(kept)]
        # A watch lets go of its stream when it has had the job's end.
        assert spans == [("StartPretraining", 0), ("CancelJob", 0), ("WatchJob", 1), ("GetJob", 5)]
        assert traced == f"{finished(kept)[0].context.trace_id:032x}"
        kept.clear()
        async with AsyncCognateClient(server.address) as client:
            stub = client.pretraining
            job = (await stub.StartPretraining(started(), metadata=(("traceparent", TRACEPARENT),))).job.job
            assert job.trace_id == TRACE
            await stub.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=job.name))
            async for _ in client.watch_job(job.name):
                pass
        assert [span.name.rsplit("/")[-1] for span in finished(kept)] == ["StartPretraining", "CancelJob", "WatchJob"]


def finished(kept: Any) -> Any:
    """Return the spans that have ended."""
    return kept.get_finished_spans()


async def test_the_share_of_traced_calls_is_a_setting(tmp_path: Path) -> None:
    """A call that starts a job is always traced, and so is one whose caller has decided so."""
    with otlp_sink() as sink:
        told = {"otlp_endpoint": sink.endpoint, "trace_ratio": 0}
        async with (
            running_cognate(tmp_path, telemetry=told) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            start: Any = channel.unary_unary(START)
            listing: Any = channel.unary_unary(START.replace("StartPretraining", "ListJobs"))
            await listing(b"", timeout=5)
            await listing(b"", timeout=5, metadata=(("traceparent", TRACEPARENT),))
            await start(started().SerializeToString(), timeout=5)
        names = sorted(span.name.rsplit("/")[-1] for span in sink.spans)
    assert names == ["ListJobs", "StartPretraining"]


def test_calls_of_a_call_that_is_not_traced_are_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not drawn anew; the next call is again, as are calls of a program that serves nobody."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    settings = TelemetrySettings(trace_ratio=0)
    tracer = Tracer(settings, service="agent", instance="test", exporter=kept)
    monkeypatch.setattr(trace, "get_tracer", tracer.provider.get_tracer)

    def calls_of(parent: traces.TraceContext | None) -> tuple[bool, bool]:
        span, place = tracer.begin_call("Service/Get", parent)
        calling = tracing.begin("/Other/Get")
        return span is not None, calling is not None and bool(calling.headers()) and place == parent

    def alone() -> bool:
        return tracing.begin("/Other/Get") is not None

    place = traces.TraceContext("1" * 32, "2" * 16, sampled=False)
    assert contextvars.copy_context().run(calls_of, None) == (False, False)
    # What its caller does not keep goes on under his trace, for the logs of those behind.
    assert contextvars.copy_context().run(calls_of, place) == (False, True)
    assert contextvars.copy_context().run(alone)
    tracer.close()
    assert finished(kept) == ()
