"""One trace from the client to Cognate's FetchModel, through the agent service and its worker: real processes."""

import json
import uuid
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from opentelemetry import trace

from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.support.otlp_sink import OtlpSink, SeenSpan, otlp_sink
from tests.support.published import open_registry
from tests.support.tiny_cognate import publish_tiny_cognate
from training_common.jobs.folders import log_name
from training_common.settings import TelemetrySettings
from training_common.telemetry.spans import Tracer, resource

FETCH = "cognateforge.exchange.v1.ModelService/FetchModel"
START = "cognateforge.agent.v1.AgentForgeTrainingService/StartTraining"
SERVER, CLIENT, INTERNAL = 2, 3, 1


def one(spans: list[SeenSpan], service: str, name: str, kind: int) -> SeenSpan:
    """Return the first such span."""
    found = sorted((s for s in spans if (s.service, s.name, s.kind) == (service, name, kind)), key=lambda s: s.start_ns)
    assert found, [(s.service, s.name, s.kind) for s in spans]
    return found[0]


def has_all(sink: OtlpSink, trace_id: str) -> bool:
    seen = {(span.service, span.name) for span in sink.spans if span.trace_id == trace_id}
    return {("client", START), ("cognate", FETCH), ("agent-worker", "attempt")} <= seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_trace_spans_client_services_and_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker, launched later, goes on with the client's trace, and Cognate's span of the fetch stands below it."""
    monkeypatch.delenv("FORGE_DATA", raising=False)
    services = Services(tmp_path)
    with otlp_sink() as sink:
        for service in ("COGNATE", "AGENT"):
            monkeypatch.setenv(f"{service}_SERVER_TELEMETRY__OTLP_ENDPOINT", sink.endpoint)
        tracer = Tracer(
            TelemetrySettings(otlp_endpoint=sink.endpoint, trace_ratio=1), service="client", instance="test"
        )
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", tracer.provider)
        try:
            _, second = services.start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
            registry = open_registry(tmp_path / "cognate")
            model = publish_tiny_cognate(registry, tmp_path / "model").name
            registry.database.close()
            with AgentClient(second.address) as agents:
                with tracer.span("make an agent") as root:
                    job = train(agents, model)
                trace_id = f"{root.get_span_context().trace_id:032x}"
                assert agents.training.GetJob(agent_v1.GetJobRequest(name=job)).job.job.trace_id == trace_id
        finally:
            services.stop()
            tracer.close()
        sink.until(lambda seen: has_all(seen, trace_id))
        spans = sink.trace(trace_id)
    by_id = {span.span_id: span for span in spans}
    called = one(spans, "client", START, CLIENT)
    served = one(spans, "agent", START, SERVER)
    attempt = one(spans, "agent-worker", "attempt", INTERNAL)
    prepare = one(spans, "agent-worker", "prepare", INTERNAL)
    asked = one(spans, "agent-worker", FETCH, CLIENT)
    fetched = one(spans, "cognate", FETCH, SERVER)
    chain = [called, served, attempt, prepare, asked, fetched]
    assert [by_id[later.parent_id].name for later in chain[1:]] == [earlier.name for earlier in chain[:-1]]
    assert attempt.attributes["forge.job"] == job
    assert {"train", "validate"} <= {span.name for span in spans if span.parent_id == attempt.span_id}
    # The service itself asks Cognate whether the foundation fits, before it takes the job in.
    asks = [span for span in spans if span.service == "agent" and span.kind == CLIENT]
    assert asks
    assert {by_id[span.parent_id].name for span in asks} == {START}
    assert not [span for span in spans if span.failed]
    lines = [json.loads(line) for line in (tmp_path / "agent" / "server.log").read_text().splitlines() if "{" in line]
    told = next(line for line in lines if line["event"] == "rpc" and line["method"] == f"/{START}")
    assert (trace_id, served.span_id, job) == (told["trace_id"], told["span_id"], told["job"])
    log = tmp_path / "agent" / "jobs" / log_name(job, 1)
    ended = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")][-1]
    assert (job, 1, trace_id, attempt.span_id) == tuple(ended[key] for key in ("job", "attempt", "trace_id", "span_id"))


def test_a_workers_spans_are_of_its_services_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each service has a version of its own."""
    versions = {"cognateforge-cognate": "0.2.7", "cognateforge-common": "0.2.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("training_common.release.version", version)
    told = [resource(name, "here").attributes["service.version"] for name in ("cognate", "cognate-worker")]
    assert ["0.2.7", "0.2.7"] == told


def train(agents: AgentClient, model: str) -> str:
    plan = agent_v1.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=agent_v1.FoundationBase(name=model, accept_experimental=True),
        classification=agent_v1.ClassificationTask(generated=agent_v1.GeneratedSource(seed=1), max_rows_per_label=2),
        adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW()),
        total_steps=2,
        batch_size=4,
    )
    started = agents.training.StartTraining(agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan))
    job = started.job.job.name
    end = list(agents.watch_job(job))[-1].end
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
    return job
