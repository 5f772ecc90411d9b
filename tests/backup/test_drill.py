"""The drill: both services are backed up under write load, lost with everything they had, and restored."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
import sqlalchemy as sa
from obstore.store import from_url
from typer.testing import CliRunner

from agent_server.agents import record_agent
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.agent.v1.training_pb2 import TrainingPlan
from cognateforge.cli.app import app
from cognateforge.client import AgentClient, CognateClient
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2
from deploy.services import Services
from tests.backup.stores import contents, settings_of
from tests.support.postgres import PostgresServer
from tests.support.published import MODEL_BODY
from training_common.artifacts.open import open_registry
from training_common.artifacts.registry import ArtifactRow
from training_common.digests import sha256_bytes
from training_common.settings import ServiceSettings
from training_common.store import tables as t
from training_common.store.database import Database

# Weights of a version that is published under load: what a backup copies is mostly such bytes.
WEIGHTS_BYTES = 3_000_000
# State and manifest of what each service publishes.
PUBLISHED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "cognate": ("READY", MODEL_BODY),
    "agent": (
        "PUBLISHED",
        {
            "architecture": "cognate",
            "task": "classification",
            "labels": ["greeting", "farewell"],
            "parent": {"name": "cognate-25m@1", "digest": f"sha256:{'f' * 64}"},
            "parameters": {"trainable": 7, "total": 11},
            "evaluations": [{"metric": "accuracy_after", "dataset": "forge-intents/test", "value": 0.5, "rows": 4}],
            "data": [{"name": "forge-intents", "kind": "generated", "rows": 9, "digest": f"sha256:{'d' * 64}"}],
        },
    ),
}


@dataclass(kw_only=True)
class Place:
    """Where one service lives: its folder, its database, its store of artifacts."""

    service: str
    folder: Path
    store_url: str
    artifacts_url: str
    options: Mapping[str, str]

    @property
    def settings(self) -> ServiceSettings:
        artifacts = {"url": self.artifacts_url, "options": self.options}
        return settings_of(self.service, self.folder, self.store_url, artifacts=artifacts)

    def write_settings(self, path: Path) -> Path:
        """Write a settings file for `forge backup` and `forge restore`."""
        lines = [f'data_dir = "{self.folder}"', f'store_url = "{self.store_url}"']
        lines += ["[artifacts]", f'url = "{self.artifacts_url}"', "[artifacts.options]"]
        path.write_text("\n".join([*lines, *(f'{key} = "{value}"' for key, value in self.options.items())]) + "\n")
        return path

    @property
    def environment(self) -> dict[str, str]:
        """What the server is told, beside its folder."""
        told = {"STORE_URL": self.store_url, "ARTIFACTS__URL": self.artifacts_url, "WORKERS__SLOTS": "0"}
        return {**told, **{f"ARTIFACTS__OPTIONS__{key.upper()}": value for key, value in self.options.items()}}


class Writers:
    """Load: jobs that are submitted, and versions that are published as a worker publishes, until stopped.

    acknowledged: names of jobs and digests of versions that were answered, with the time of the answer.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, float] = {}
        self.versions: dict[str, tuple[str, float]] = {}
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def go_on(self, work: Callable[[int], None]) -> None:
        def run() -> None:
            number = 0
            while not self._stop.is_set():
                try:
                    work(number)
                except Exception as error:
                    self.errors.append(error)
                    return
                number += 1

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert [] == self.errors

    def submits(self, name: str) -> None:
        self.jobs[name] = time.time()

    def publishes(self, row: ArtifactRow) -> None:
        self.versions[row.name] = (row.digest, time.time())


def publisher(place: Place, family: str, scratch: Path, writers: Writers) -> Callable[[int], None]:
    """Return what publishes the next version of a family."""
    registry = open_registry(place.settings, Database(place.settings.database_url))
    scratch.mkdir()

    def publish(number: int) -> None:
        path = scratch / "weights"
        path.write_bytes(b"%08d" % number + bytes(WEIGHTS_BYTES))
        (scratch / "card.md").write_bytes(b"# the same card\n")
        files = [registry.blobs.put(scratch / name, name) for name in ("weights", "card.md")]
        state, body = PUBLISHED[place.service]
        with registry.database.write() as connection:
            row = registry.publish(connection, family=family, state=state, job="jobs/x", files=files, body=body)
            if place.service == "agent":
                record_agent(connection, row)
        writers.publishes(row)

    return publish


def submit_pretraining(client: CognateClient, writers: Writers) -> Callable[[int], None]:
    def submit(number: int) -> None:
        plan = pretraining_pb2.PretrainingPlan(total_steps=10, seed=number, batch_size=2, sequence_length=64)
        request = pretraining_pb2.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
        writers.submits(client.pretraining.StartPretraining(request).job.job.name)

    return submit


def submit_training(client: AgentClient, writers: Writers) -> Callable[[int], None]:
    def submit(number: int) -> None:
        plan = TrainingPlan(
            agent="router",
            architecture="cognate",
            foundation=training_pb2.FoundationBase(name="cognate-25m@1"),
            classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=number)),
            adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
            optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
            total_steps=3,
            batch_size=8,
        )
        request = training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
        writers.submits(client.training.StartTraining(request).job.job.name)

    return submit


@contextmanager
def both_services(folder: Path, places: dict[str, Place]) -> Iterator[tuple[CognateClient, AgentClient, Services]]:
    services = Services(folder)
    try:
        first = services.start("cognate_server", address="127.0.0.1:0", settings=places["cognate"].environment)
        # Whether a foundation fits is no part of this.
        settings = {**places["agent"].environment, "COGNATE__ADDRESS": first.address, "COGNATE__ASK_WITHIN_S": "0"}
        second = services.start("agent_server", address="127.0.0.1:0", settings=settings)
        with CognateClient(first.address) as cognate, AgentClient(second.address) as agents:
            yield cognate, agents, services
    finally:
        services.stop()


def forge(*arguments: object) -> dict[str, object]:
    """Run a command and return its one result."""
    result = CliRunner().invoke(app, [*(str(one) for one in arguments), "--json"], catch_exceptions=False)
    assert 0 == result.exit_code, result.stderr
    found: dict[str, object] = json.loads(result.stdout.splitlines()[0])
    print(" ".join(str(one) for one in arguments[:3]), json.dumps(found))
    return found


@pytest.fixture(params=["sqlite-folder", "postgresql-folder", "postgresql-s3"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Place]:
    """Return where each service lives, on each kind of stores in turn."""
    database, _, kind = request.param.partition("-")
    found = {}
    for service in ("cognate", "agent"):
        postgres = request.getfixturevalue("postgres") if database == "postgresql" else None
        store_url = postgres.new_database() if postgres else ""
        server = request.getfixturevalue("s3_server") if kind == "s3" else None
        found[service] = Place(
            service=service,
            folder=tmp_path / "live" / service,
            store_url=store_url,
            artifacts_url=server.new_url() if server else "",
            options=server.options if server else {},
        )
    return found


@pytest.fixture
def backups(places: dict[str, Place], tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return where backups go: beside services in folders to a folder, beside those in an S3 to it."""
    if places["cognate"].artifacts_url:
        url: str = request.getfixturevalue("s3_backups")
        return url
    return str(tmp_path / "backups")


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_both_services_come_back_from_their_backups(
    places: dict[str, Place],
    backups: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every version answered before the backup began is there with its digest, every job and event is as it was.

    What is there is of one moment: nothing of after, nothing half. Both services serve it, and go on.
    """
    monkeypatch.delenv("FORGE_DATA", raising=False)
    files = {name: place.write_settings(tmp_path / f"{name}.toml") for name, place in places.items()}
    with both_services(tmp_path / "live", places) as (cognate, agents, services):
        loads = {name: Writers() for name in places}
        loads["cognate"].go_on(publisher(places["cognate"], "cognate-25m", tmp_path / "models", loads["cognate"]))
        loads["cognate"].go_on(submit_pretraining(cognate, loads["cognate"]))
        loads["agent"].go_on(publisher(places["agent"], "router", tmp_path / "agents", loads["agent"]))
        loads["agent"].go_on(submit_training(agents, loads["agent"]))
        wait_for(lambda: all(len(load.versions) >= 5 and len(load.jobs) >= 20 for load in loads.values()))
        began, made = {}, {}
        for name in places:
            began[name] = time.time()
            made[name] = forge("backup", "--service", name, "--settings", files[name], "--to", backups)
        ended = time.time()
        wait_for(lambda: all(load.versions and max(load.jobs.values()) > ended for load in loads.values()))
        for load in loads.values():
            load.stop()
        for service in services.running:
            service.process.kill()
            service.process.wait()
        services.running.clear()
    lost = {name: contents(name, place.settings.database_url) for name, place in places.items()}

    for name, place in places.items():
        destroy(place, request)
        restored = forge("restore", "--service", name, "--settings", files[name], "--from", backups)
        assert made[name]["rows"] == restored["rows"]
    for name, place in places.items():
        require_of_one_moment(lost[name], contents(name, place.settings.database_url))
    with both_services(tmp_path / "live", places) as (cognate, agents, _):
        require_served(
            loads["cognate"], began["cognate"], versions_of(cognate), lambda n: fetched(cognate, n, tmp_path)
        )
        require_served(loads["agent"], began["agent"], agents_of(agents), lambda n: fetched_agent(agents, n, tmp_path))
        jobs = {job.job.name for job in pages_of_jobs(cognate)}
        assert {name for name, when in loads["cognate"].jobs.items() if when < began["cognate"]} <= jobs
        after = Writers()
        submit_pretraining(cognate, after)(1)
        publisher(places["cognate"], "cognate-25m", tmp_path / "more", after)(1)
        [(name, (digest, _))] = after.versions.items()
        assert digest == cognate.models.GetModel(model_pb2.GetModelRequest(name=name)).model.digest


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def destroy(place: Place, request: pytest.FixtureRequest) -> None:
    """Lose everything that a service had: its folder, its database, its bytes."""
    shutil.rmtree(place.folder)
    if place.artifacts_url:
        config = {name: value for name, value in place.options.items() if name != "allow_http"}
        bucket = from_url(place.artifacts_url, config=config, client_options={"allow_http": True})  # type: ignore[call-overload]
        for page in list(obstore.list(bucket)):
            obstore.delete(bucket, [found["path"] for found in page])
    if place.store_url:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        assert str(postgres.folder) in place.store_url
        engine = sa.create_engine(place.store_url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            # A server that was killed may still be at work there.
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            connection.execute(sa.text(f"{others} AND pid <> pg_backend_pid()"))
            connection.execute(sa.text("DROP SCHEMA public CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA public"))


def require_of_one_moment(lost: dict[str, list[list[str]]], restored: dict[str, list[list[str]]]) -> None:
    """Make sure that no row was changed, and that those that lack are the newest of their table."""
    for table in ("jobs", "events", "artifacts", "artifact_events", "requests"):
        old, new = {tuple(row) for row in lost[table]}, {tuple(row) for row in restored[table]}
        if table == "jobs":  # a restore moves fencing tokens on
            token = list(t.jobs.c.keys()).index("fencing_token")
            old, new = ({row[:token] + row[token + 1 :] for row in rows} for rows in (old, new))
        assert new, table
        assert new <= old, f"{table}: rows that were not there"
        if table in ("events", "artifacts", "artifact_events"):
            keys = sorted(int(row[0]) for row in new)
            assert keys == sorted(int(row[0]) for row in old)[: len(keys)], f"{table}: rows are missing"


def require_served(load: Writers, began: float, served: dict[str, str], fetch: Callable[[str], str]) -> None:
    """Make sure that versions are served under their digests, all that were answered before the backup among them."""
    before = {name: digest for name, (digest, when) in load.versions.items() if when < began}
    assert len(before) >= 5
    assert before.items() <= served.items()
    assert served.items() <= {name: digest for name, (digest, _) in load.versions.items()}.items()
    assert served == {name: fetch(name) for name in served}


def versions_of(client: CognateClient) -> dict[str, str]:
    request = model_pb2.ListModelsRequest(page_size=500)
    return {model.name: model.digest for model in client.models.ListModels(request).models}


def agents_of(client: AgentClient) -> dict[str, str]:
    request = agent_pb2.ListAgentsRequest(page_size=500)
    return {agent.name: agent.digest for agent in client.agents.ListAgents(request).agents}


def fetched(client: CognateClient, name: str, folder: Path) -> str:
    """Fetch a model, whose every file is checked on the way, and return the digest of its manifest."""
    got = client.fetch_model(name, folder / "fetched" / name)
    return sha256_bytes((got.path / MANIFEST_NAME).read_bytes())


def fetched_agent(client: AgentClient, name: str, folder: Path) -> str:
    got = client.fetch_agent(name, folder / "fetched" / name)
    return sha256_bytes((got.path / MANIFEST_NAME).read_bytes())


def pages_of_jobs(client: CognateClient) -> Iterator[pretraining_pb2.PretrainingJob]:
    token = ""
    while True:
        page = client.pretraining.ListJobs(pretraining_pb2.ListJobsRequest(page_size=500, page_token=token))
        yield from page.jobs
        token = page.next_page_token
        if not token:
            return
