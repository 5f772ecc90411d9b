"""A smoke test of one service: every kind of call that users make, none of which changes anything.

It decides whether a server that was just started may take over, so what cannot be tried is a failure, and not skipped;
only a service in which nothing was ever published has nothing to fetch.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.client import services
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.diagnostics.checks import Area, Check
from cognateforge.exceptions import (
    ClientSetupError,
    ForbiddenError,
    ForgeError,
    FoundationNotFoundError,
    LocalStorageError,
    UnavailableError,
)
from cognateforge.exchange.v1 import model_pb2

if TYPE_CHECKING:
    from cognateforge.cli.jobs import JobService
    from cognateforge.cli.session import Session
    from cognateforge.client import FetchedArtifact

_LOG = "do not let it take over; its log tells why"
_BY_CALL = "do not let it take over; its log tells why, by the call id"
_AWAY = "do not let it take over; see whether it is started, and whether this is its address"
_ROOM = "make room, or set TMPDIR"
_ROLES = "name the caller's SPIFFE id in the service's security.roles, with the role operator"
# What agents are made of unless somebody says otherwise.
_FOUNDATION = "cognate-25m"


def smoke_test(jobs: JobService, *, expect_version: str = "") -> Iterator[Check]:
    """Yield one check after the other. Each is made whatever became of those before it.

    Errors: ClientSetupError, where no call can be made: an address that is none, or a certificate that is not there.
    """
    cognate = jobs.service.value == "cognate"
    area, session = Area(f"{jobs.service.value} smoke test"), jobs.session
    for name in ("", *(one.full_name for one in (services.COGNATE if cognate else services.AGENT))):
        yield _tried(area, f"health {name}".strip(), lambda name=name: _health(jobs, name))  # type: ignore[misc]
    yield _tried(area, "release", lambda: _release(jobs, expect_version))
    yield _tried(area, "jobs", lambda: f"{sum(1 for _ in jobs.newest([], 10))} of the newest are listed")
    yield _tried(area, "dry run", lambda: _plan_pretraining(session) if cognate else _plan_training(session))
    # Last: a transfer that breaks again and again opens the circuit for every call.
    yield _tried(area, "fetch", lambda: _fetched(session, _newest_model if cognate else _newest_agent))


class _UnfitError(Exception):
    """An answer that is not what it must be."""


def _tried(area: Area, name: str, attempt: Callable[[], str]) -> Check:
    try:
        return area.ok(name, attempt())
    except _UnfitError as unfit:
        return area.fail(name, str(unfit), _LOG)
    except ClientSetupError:  # no call can be made, so nothing is known of the service
        raise
    except LocalStorageError as error:
        return area.fail(name, error.message, _ROOM)
    except ForgeError as error:
        call = f" (call {error.request_id})" if error.request_id else ""
        return area.fail(name, f"{error.reason_name()}: {error.message}{call}", _remedy(error))
    except OSError as error:  # of this machine: nothing was tried
        return area.fail(name, f"the temporary folder cannot be used: {error.strerror}", _ROOM)


def _remedy(error: ForgeError) -> str:
    if isinstance(error, ForbiddenError):
        return _ROLES
    if error.request_id:  # the service has answered
        return _BY_CALL
    return _AWAY if isinstance(error, UnavailableError) else _LOG


def _health(jobs: JobService, service: str) -> str:
    word = jobs.health(service)
    if word != "SERVING":
        raise _UnfitError(f"it says {word}")
    return word


def _release(jobs: JobService, expected: str) -> str:
    info = jobs.info()
    if expected and info.version != expected:
        raise _UnfitError(f"it is {info.version}, and {expected} was expected")
    if info.damaged_artifacts:
        raise _UnfitError(f"{info.damaged_artifacts} published versions are damaged; forge artifacts verify names them")
    return str(info.version)


def _fetched(session: Session, newest: Callable[[Session, Path], FetchedArtifact | None]) -> str:
    with tempfile.TemporaryDirectory(prefix="forge-smoke-") as folder:
        fetched = newest(session, Path(folder))
    if fetched is None:
        return "nothing is published yet"
    return f"{fetched.name}, {fetched.size_bytes} bytes, {fetched.digest}"


def _newest_model(session: Session, folder: Path) -> FetchedArtifact | None:
    client = session.cognate_client
    for model in client.models.ListModels(model_pb2.ListModelsRequest(page_size=1)).models:
        return client.fetch_model(model.name, folder / "model", give_up_after_s=session.timeout_s)
    return None


def _newest_agent(session: Session, folder: Path) -> FetchedArtifact | None:
    client = session.agent_client
    for agent in client.agents.ListAgents(agent_pb2.ListAgentsRequest(page_size=1)).agents:
        return client.fetch_agent(agent.name, folder / "agent", give_up_after_s=session.timeout_s)
    return None


def _plan_pretraining(session: Session) -> str:
    plan = pretraining_pb2.PretrainingPlan(total_steps=1)
    request = pretraining_pb2.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan, validate_only=True)
    session.cognate_client.pretraining.StartPretraining(request)
    return "a plan is taken"


def _plan_training(session: Session) -> str:
    plan = training_pb2.TrainingPlan(
        agent="smoke",
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name=_FOUNDATION, accept_experimental=True),
        classification=training_pb2.ClassificationTask(
            generated=training_pb2.GeneratedSource(seed=1), max_rows_per_label=2
        ),
        adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
        total_steps=1,
    )
    request = training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan, validate_only=True)
    try:
        session.agent_client.training.StartTraining(request)
    except FoundationNotFoundError:
        # The service has read the plan and asked Cognate, which is as new as this.
        return f"a plan is taken as far as Cognate's {_FOUNDATION}, of which no version is published yet"
    return "a plan is taken"
