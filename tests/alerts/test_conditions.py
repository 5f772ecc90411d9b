"""What a service tells becomes the right alerts: from messages, and from real servers over the generated clients."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent_server.recovery import Detector as AgentDetector
from agent_server.rl.recovery import Detector as TeamDetector
from cognate_server.detectors import Detector as CognateDetector
from cognateforge.alerts import KINDS, Alert, Evaluator, Limits, Severity, evaluate
from cognateforge.alerts.conditions import conditions
from cognateforge.alerts.model import DETECTORS
from cognateforge.alerts.notifier import MISSED_LOOKS, Notifier
from cognateforge.alerts.observe import JobNews, Observed, Recovery
from cognateforge.alerts.receivers import Webhook
from cognateforge.alerts.settings import NotifySettings, WebhookSettings
from cognateforge.client import AsyncAgentClient, AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import ForbiddenError
from cognateforge.job.v1 import job_pb2
from tests.support.listeners import webhook_server
from tests.support.servers import running_agent, running_cognate
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobStore, note_of
from training_common.rpc.server import RunningServer
from training_common.store.database import Database

NOW = datetime(2026, 12, 24, 18, 0, tzinfo=UTC)
JOB = f"jobs/{uuid.uuid4()}"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def job(state: job_pb2.JobState.ValueType = job_pb2.JOB_STATE_RUNNING, **values: object) -> job_pb2.Job:
    return job_pb2.Job(name=JOB, state=state, **{"observed": True, "create_time": ago(60), **values})  # type: ignore[arg-type]


def seen(*jobs: job_pb2.Job, news: JobNews | None = None, **values: object) -> Observed:
    told = {JOB: news} if news else {}
    return Observed(**{"service": "cognate", "time": NOW, "health": "SERVING", "jobs": jobs, "news": told, **values})  # type: ignore[arg-type]


def names(alerts: Iterable[Alert]) -> list[str]:
    return [alert.name for alert in alerts]


HEALTHY = JobNews(sequence=3, time=ago(5))
FAILED = job_pb2.JOB_STATE_FAILED
QUEUED = job_pb2.JOB_STATE_QUEUED


@pytest.mark.parametrize(
    ("wrong", "right", "name"),
    [
        (seen(trouble="connection refused"), seen(), "ForgeServiceDown"),
        (seen(health="NOT_SERVING"), seen(), "ForgeNotServing"),
        (
            seen(info=job_pb2.ServerInfo(damaged_artifacts=2)),
            seen(info=job_pb2.ServerInfo(damaged_artifacts=0)),
            "ForgeArtifactsDamaged",
        ),
        (
            seen(info=job_pb2.ServerInfo(peers=[job_pb2.Peer(name="cognate", circuit=job_pb2.CIRCUIT_OPEN)])),
            seen(info=job_pb2.ServerInfo(peers=[job_pb2.Peer(name="cognate", circuit=job_pb2.CIRCUIT_CLOSED)])),
            "ForgeCircuitOpen",
        ),
        (
            seen(job(FAILED, end_time=ago(10), failure=job_pb2.Failure(reason="TRAINING_DIVERGED"))),
            seen(job(job_pb2.JOB_STATE_CANCELLED, end_time=ago(10))),
            "ForgeTrainingDiverged",
        ),
        (
            seen(job(FAILED, end_time=ago(10), failure=job_pb2.Failure(reason="RETRY_BUDGET_SPENT"))),
            seen(job(FAILED, end_time=ago(3601), failure=job_pb2.Failure(reason="RETRY_BUDGET_SPENT"))),
            "ForgeRetryBudgetSpent",
        ),
        (
            seen(job(FAILED, end_time=ago(10), failure=job_pb2.Failure(reason="DATA_UNAVAILABLE"))),
            seen(job(job_pb2.JOB_STATE_SUCCEEDED, end_time=ago(10))),
            "ForgeJobFailed",
        ),
        (seen(job(observed=False), news=HEALTHY), seen(job(), news=HEALTHY), "ForgeJobsUnobserved"),
        (seen(job(), news=JobNews(time=ago(901))), seen(job(), news=JobNews(time=ago(899))), "ForgeJobStalled"),
        (seen(job(QUEUED, create_time=ago(1801))), seen(job(QUEUED, create_time=ago(1799))), "ForgeQueueWait"),
        (
            seen(job(QUEUED, create_time=ago(1801))),
            seen(job(QUEUED, create_time=ago(9999), wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_RESERVED))),
            "ForgeQueueWait",
        ),
        (
            seen(job(QUEUED, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_LAUNCH))),
            seen(job(QUEUED, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_SLOT))),
            "ForgeWorkersDoNotStart",
        ),
        (
            seen(job(job_pb2.JOB_STATE_RECOVERING, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_LENT))),
            seen(job(job_pb2.JOB_STATE_RECOVERING, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_TURN))),
            "ForgeCapacityNotReturned",
        ),
    ],
)
def test_a_condition_is_told_and_its_absence_is_not(wrong: Observed, right: Observed, name: str) -> None:
    """Every kind of condition, on both sides of its limit."""
    assert [name] == names(conditions(wrong, Limits()))
    assert [] == names(conditions(right, Limits()))


def test_a_failure_since_the_last_look_is_told_however_old_it_is() -> None:
    """A notifier that was down for a night tells of the night's failures."""
    failed = seen(job(FAILED, end_time=ago(7200), failure=job_pb2.Failure(reason="DATA_UNAVAILABLE")))
    assert [] == list(conditions(failed, Limits(), failed_since=ago(7199)))
    assert ["ForgeJobFailed"] == names(conditions(failed, Limits(), failed_since=ago(7201)))


def test_every_detector_of_both_services_has_an_alert() -> None:
    """A new detector cannot be forgotten here."""
    assert {*CognateDetector, *AgentDetector, *TeamDetector} == set(DETECTORS)
    assert set(DETECTORS.values()) <= set(KINDS)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_recovery_is_told_while_it_is_news(detector: str) -> None:
    """From the action on, for as long as the limit says."""

    def at(seconds: float) -> Observed:
        found = Recovery(detector=detector, action="roll_back", time=ago(seconds), message=f"step 7: {detector}")
        return seen(job(), news=JobNews(time=ago(5), recoveries={detector: found}))

    [alert] = conditions(at(899), Limits())
    assert (DETECTORS[detector], Severity.WARNING, ago(899)) == (alert.name, alert.severity, alert.since)
    assert {"job": JOB, "detector": detector} == alert.labels
    assert [] == list(conditions(at(901), Limits()))


@dataclass
class World:
    """A Cognate whose jobs are moved by hand, as a worker would."""

    server: RunningServer
    client: AsyncCognateClient
    store: JobStore

    async def submit(self) -> str:
        request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=100))
        return (await self.client.pretraining.StartPretraining(request)).job.job.name

    async def attempt(self) -> AttemptStore:
        await self.submit()
        row = self.store.begin_attempt("here", "elsewhere")
        assert row is not None
        attempt = self.store.attempt(row.name, row.attempt, row.fencing_token)
        attempt.move(JobState.RUNNING)
        attempt.progress(step=1, payload={"step": 1, "total_steps": 100, "metrics": {"loss": 9.0}})
        return attempt

    def recover(self, attempt: AttemptStore, detector: str) -> None:
        facts = {"detector": detector, "action": "roll_back" if detector else "return", "evidence": json.dumps({})}
        attempt.append("note", note_of("recovery", f"step 1: {detector or 'stable again'}", facts))

    async def alerts(self) -> list[Alert]:
        return await evaluate(self.client)


@pytest.fixture
async def world(tmp_path: Path, no_drain_notice: None) -> AsyncIterator[World]:
    async with running_cognate(tmp_path) as server, AsyncCognateClient(server.address) as client:
        database = Database(f"sqlite:///{tmp_path / 'store.db'}")
        try:
            yield World(server, client, JobStore(database))
        finally:
            database.close()


async def test_a_recovery_of_a_real_job_is_read_from_its_events(world: World) -> None:
    """It fires with the detector's name, and is over when the run is found stable, without waiting for the limit."""
    attempt = await world.attempt()
    assert [] == await world.alerts()
    world.recover(attempt, "loss_trend")
    [alert] = await world.alerts()
    assert ("ForgeLossTrend", attempt.job.name) == (alert.name, alert.labels["job"])
    assert abs((datetime.now(UTC) - alert.since).total_seconds()) < 60
    world.recover(attempt, "")
    assert [] == await world.alerts()


async def test_a_recovery_of_a_real_job_is_told_and_so_is_its_end(world: World, tmp_path: Path) -> None:
    """The whole way without a Prometheus: from a worker's event to a webhook, and back to quiet."""
    attempt = await world.attempt()
    with webhook_server() as hook:
        settings = NotifySettings(state_file=tmp_path / "notify" / "state.json")
        receivers = [Webhook(WebhookSettings(name="chat", url=hook.url))]
        notifier = Notifier(Evaluator(world.client), receivers, settings)
        assert [] == await notifier.once()
        world.recover(attempt, "not_finite")
        await notifier.once()
        world.recover(attempt, "")
        for _ in range(MISSED_LOOKS):
            await notifier.once()
        told = ("ForgeNotFinite", attempt.job.name)
        assert [(told[0], "firing", told[1]), (told[0], "resolved", told[1])] == hook.told()


async def test_an_evaluator_reads_each_event_once_and_knows_since_when(world: World) -> None:
    """Later looks begin where the last one ended, and still know what was read before."""
    attempt = await world.attempt()
    world.recover(attempt, "not_finite")
    evaluator = Evaluator(world.client)
    [first] = (await evaluator.look()).alerts
    attempt.progress(step=2, payload={"step": 2, "total_steps": 100, "metrics": {"loss": 8.0}})
    [second] = (await evaluator.look()).alerts
    assert first == second
    news = evaluator._observers[0]._news[attempt.job.name]
    assert (
        news.sequence
        == (await world.client.pretraining.GetJob(pb.GetJobRequest(name=attempt.job.name))).job.job.last_sequence
    )


async def test_a_job_that_fails_is_told_with_its_reason(world: World) -> None:
    """By the list of failures, and by name for a job that was open at the look before."""
    attempt = await world.attempt()
    evaluator = Evaluator(world.client)
    assert () == (await evaluator.look()).alerts
    attempt.move(JobState.FAILED, failure_reason="TRAINING_DIVERGED", failure_message="loss_trend at step 1")
    [alert] = (await evaluator.look()).alerts
    assert ("ForgeTrainingDiverged", Severity.CRITICAL) == (alert.name, alert.severity)
    assert "loss_trend at step 1" in alert.summary
    assert [alert.key] == [one.key for one in await world.alerts()]


async def test_a_service_that_is_down_is_an_alert_and_its_jobs_are_unknown(
    tmp_path: Path, no_drain_notice: None
) -> None:
    """Nothing is raised, the other service is still looked at, and what was wrong before is not said to be over."""
    async with (
        running_cognate(tmp_path / "c") as cognate,
        running_agent(tmp_path / "a") as agent,
        AsyncCognateClient(cognate.address) as one,
        AsyncAgentClient(agent.address) as other,
    ):
        evaluator = Evaluator(one, other)
        assert () == (await evaluator.look()).alerts
        await agent.stop()
        look = await evaluator.look()
    assert [("ForgeServiceDown", "agent")] == [(alert.name, alert.service) for alert in look.alerts]
    assert {"agent"} == look.unknown


async def test_a_caller_who_may_not_read_is_told_so(tmp_path: Path, no_drain_notice: None) -> None:
    """A caller without a role is no service that is down."""
    settings = {"security": {"local_roles": ["agent_service"]}}
    async with running_cognate(tmp_path, **settings) as server, AsyncCognateClient(server.address) as client:
        with pytest.raises(ForbiddenError):
            await evaluate(client)
