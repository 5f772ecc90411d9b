"""The whole way: real servers, a real Prometheus with the shipped rules, a real Alertmanager, and whom they tell."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent_server import trainer
from agent_server.architectures.model import AgentModel
from agent_server.data.examples import texts_of
from agent_server.objectives.base import Batch, Loss
from agent_server.objectives.classification import ClassificationObjective
from agent_server.trainer import train_agent
from cognate_server.trainer import pretrain
from cognateforge.agent.v1 import training_pb2
from cognateforge.alerts.message import fingerprint
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import JobNotFoundError
from deploy.monitoring import dashboards
from tests.agent._support import factory, write_foundation
from tests.agent.test_recovery import CONFIG as AGENT_CONFIG
from tests.agent.test_recovery import DATA
from tests.cognate._support import CountingStream
from tests.cognate.test_recovery import RUN as COGNATE_CONFIG
from tests.support.listeners import WebhookServer, webhook_server
from tests.support.prometheus import MONITORING, Prometheus, alertmanager, prometheus
from tests.support.published import publish_agent, publish_model
from tests.support.servers import running_agent, running_cognate
from tests.support.waiting import until
from training_common.attempt import Json
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.store.database import Database
from training_common.worker import WorkerAttempt

# A step takes so long that several scrapes see its run.
STEP_S = 0.05
NOBODY = f"jobs/{uuid.uuid4()}"


class UnhurriedAttempt(WorkerAttempt):
    """A worker's attempt over the store, at a pace that a scraper can follow."""

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        super().progress(step=step, total_steps=total_steps, metrics=metrics)
        time.sleep(STEP_S)


def attempt_of(folder: Path) -> UnhurriedAttempt:
    """Take the next job of a service's queue, as its scheduler would for a worker."""
    store = JobStore(Database(f"sqlite:///{folder / 'store.db'}"))
    row = store.begin_attempt("here", "elsewhere")
    assert row is not None
    attempt = UnhurriedAttempt(store.attempt(row.name, row.attempt, row.fencing_token), workdir=folder / "work")
    attempt.store.move(JobState.RUNNING)
    return attempt


class Diverging(ClassificationObjective):
    """A loss that jumps by 8 nats at ten steps of a real run, as a broken batch of data would do."""

    taken = 0

    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        self.taken += 1
        loss = super().loss(model, batch)
        return dataclasses.replace(loss, mean=loss.mean + 8 * (16 <= self.taken <= 26))


def pretraining_request() -> pretraining_pb2.StartPretrainingRequest:
    plan = pretraining_pb2.PretrainingPlan(total_steps=100)
    return pretraining_pb2.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)


def training_request() -> training_pb2.StartTrainingRequest:
    plan = training_pb2.TrainingPlan(
        agent="toy-router",
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name="cognate-25m"),
        classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=5)),
        adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
        total_steps=40,
    )
    return training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)


async def keep_busy(cognate: AsyncCognateClient, agents: AsyncAgentClient) -> None:
    """Read, write, and ask for what is not there, until cancelled."""
    while True:
        await cognate.pretraining.StartPretraining(pretraining_request())
        await agents.training.StartTraining(training_request())
        with suppress(JobNotFoundError):
            await cognate.pretraining.GetJob(pretraining_pb2.GetJobRequest(name=NOBODY))
        with suppress(JobNotFoundError):
            await agents.training.GetJob(training_pb2.GetJobRequest(name=NOBODY))
        await asyncio.sleep(0.2)


@asynccontextmanager
async def services(folder: Path) -> AsyncIterator[tuple[Any, Any]]:
    """Yield both services, each with a published version and an admin listener."""
    # Nobody gives signs of life for the attempts of this test.
    workers = {"slots": 0, "lost_after_s": 3600}
    told: dict[str, Any] = {"telemetry": {"address": "127.0.0.1:0"}, "workers": workers}
    async with running_cognate(folder / "c"), running_agent(folder / "a"):
        publish_model(folder / "c")
        publish_agent(folder / "a")
    async with running_cognate(folder / "c", **told) as cognate, running_agent(folder / "a", **told) as agent:
        yield cognate, agent


def told(hook: WebhookServer, name: str) -> list[str]:
    """Return the states of an alert's messages, in their order."""
    return [status for alert, status, _ in hook.told() if alert == name]


def empty_panels(server: Prometheus, start: float) -> list[str]:
    """Run every query of every dashboard, and return those without a single value."""
    empty = []
    for make in dashboards.DASHBOARDS:
        for panel in (panel for row in make().rows for panel in row.panels):
            for expr, _ in panel.queries:
                text = expr.replace("$__rate_interval", "4s")
                text = re.sub(r"\$(instance|training_job)", ".*", text)
                series = server.query(text, start=start, end=time.time())
                if not any(not math.isnan(float(value)) for one in series for _, value in one["values"]):
                    empty.append(f"{make().uid}: {panel.title}: {text}")
    return empty


@pytest.mark.slow
async def test_a_divergence_reaches_a_webhook_and_is_over_when_the_run_has_recovered(
    tmp_path: Path, no_drain_notice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped rules, faster: it fires and ends, nothing else is told of training, and every panel has values."""
    monkeypatch.setattr(trainer, "objective_for", lambda config: Diverging())
    start = time.time()
    async with (
        services(tmp_path) as (one, other),
        AsyncCognateClient(one.address) as cognate,
        AsyncAgentClient(other.address) as agents,
    ):
        targets = {"forge-cognate": one.admin_address, "forge-agent": other.admin_address}
        with (
            webhook_server() as hook,
            alertmanager(tmp_path / "alertmanager", hook.url) as manager,
            prometheus(tmp_path / "prometheus", targets, manager) as server,
        ):
            busy = asyncio.create_task(keep_busy(cognate, agents))
            await until(lambda: bool(server.query("forge_jobs > 0", start=start, end=time.time())), 30)
            foundation = write_foundation(tmp_path / "foundation", list(texts_of(DATA.train)))
            healthy = asyncio.to_thread(pretrain, COGNATE_CONFIG, CountingStream(), attempt_of(tmp_path / "c"))
            diverging = asyncio.to_thread(
                train_agent, AGENT_CONFIG, foundation, DATA, attempt_of(tmp_path / "a"), factory=factory()
            )
            await asyncio.gather(healthy, diverging)
            await until(lambda: ["firing", "resolved"] == told(hook, "ForgeLossTrend"), 90)
            busy.cancel()
            # What is told of this machine's disk and speed is no matter of this test.
            training = set(re.findall(r"alert: (\w+)", (MONITORING / "prometheus/rules/training.yml").read_text()))
            assert {"ForgeLossTrend"} == training & {alert for alert, _, _ in hook.told()}
            body = next(body for body in hook.bodies if body["commonLabels"]["alertname"] == "ForgeLossTrend")
            assert ("firing", "agent") == (body["status"], body["commonLabels"]["service"])
            assert "agent: a loss rises instead of falling" == body["commonAnnotations"]["summary"]
            assert [] == await asyncio.to_thread(empty_panels, server, start)


async def test_a_service_that_is_away_silences_its_other_alerts(tmp_path: Path) -> None:
    """Of that service alone; and an alert is named by Alertmanager as by the built-in notifier."""
    away = {"alertname": "ForgeServiceAbsent", "service": "agent", "severity": "critical"}
    silenced = {"alertname": "ForgeQueueWait", "service": "agent", "severity": "warning"}
    others = {"alertname": "ForgeQueueWait", "service": "cognate", "severity": "warning"}
    with webhook_server() as hook, alertmanager(tmp_path / "alertmanager", hook.url) as manager:
        await asyncio.to_thread(manager.post, away, silenced, others)
        await until(lambda: 2 <= len(hook.bodies), 30)
        inhibited = {one["fingerprint"] for one in manager.alerts() if one["status"]["inhibitedBy"]}
    assert {fingerprint(silenced)} == inhibited
    assert {("ForgeServiceAbsent", "agent"), ("ForgeQueueWait", "cognate")} == {
        (body["commonLabels"]["alertname"], body["commonLabels"]["service"]) for body in hook.bodies
    }
