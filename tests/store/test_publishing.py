"""Publications that something comes between: a signal, a collector, a cancel, a store that is away."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cognate_server import migrations
from cognateforge.exceptions import ArtifactCorruptError
from tests.support.postgres import PostgresServer
from tests.support.publish_killed import Service
from tests.support.s3 import S3Server
from tests.support.stored import Stored
from training_common import worker
from training_common.artifacts import publish
from training_common.artifacts.blobs import StoreAwayError, StoredFile
from training_common.artifacts.registry import BytesGoneError
from training_common.attempt import AttemptStopped, StopKind
from training_common.engines.processes import EX_TEMPFAIL
from training_common.jobs.states import JobState
from training_common.store.database import Turn
from training_common.worker import WorkerAttempt

CONTENTS = {"config.json": b"{}", "weights.bin": b"weights"}
# The statement of how they were made is one more.
FILES = len(CONTENTS) + 1


@pytest.fixture(params=["folder", "bucket"])
def service(request: pytest.FixtureRequest, tmp_path: Path, store_url: str) -> Iterator[Service]:
    """Yield a service over an empty store of each kind, and an empty database of each kind."""
    stored = Stored(files_dir=tmp_path)
    if request.param == "bucket":
        s3: S3Server = request.getfixturevalue("s3")
        stored = Stored(files_dir=tmp_path, url=s3.new_url(), options=s3.options)
    service = Service(stored, store_url)
    service.database.upgrade(Path(migrations.__file__).parent)
    service.submit()
    yield service
    service.database.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder to publish."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def state_of(service: Service, attempt: WorkerAttempt) -> JobState:
    return service.jobs.get(attempt.job).state


def test_bytes_that_a_collector_took_are_put_again(
    service: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the last file and the version's turn: what it took is noticed in the turn, before the row."""
    blobs, database = service.registry.blobs, service.database
    attempt = service.attempt(tmp_path)
    put_manifest, taken = blobs.put_manifest, list[str]()
    in_turn = database.in_turn

    def collected_before(connection: object, turn: Turn) -> None:
        in_turn(connection, turn)  # type: ignore[arg-type]
        if not taken:
            taken.extend(blob.digest for blob in blobs.blobs())
            blobs.delete(taken[0])

    def told(*args: object) -> None:
        assert all(blobs.has(digest) for digest in taken)
        put_manifest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "in_turn", collected_before)
    monkeypatch.setattr(blobs, "put_manifest", told)
    row = service.publish(attempt, model)
    assert FILES == len(taken)
    for file in row.files:
        blobs.check(file)
    assert (JobState.SUCCEEDED, 1, 1) == (state_of(service, attempt), row.version, len(list(blobs.manifests())))


def test_a_version_is_never_published_without_its_bytes(service: Service) -> None:
    """Whoever publishes: the registry itself asks, and writes nothing."""
    file = StoredFile(path="weights.bin", size_bytes=1, digest=f"sha256:{'a' * 64}")
    with pytest.raises(BytesGoneError, match=r"weights\.bin"), service.database.write() as connection:
        service.registry.publish(connection, family="router", state="READY", job="jobs/x", files=[file], body={})
    assert ([], []) == (service.registry.page(limit=9), list(service.registry.blobs.manifests()))


def test_a_cancel_that_comes_in_between_leaves_no_manifest(service: Service, model: Path, tmp_path: Path) -> None:
    """The transaction fails before its commit: nothing is there of the version, and its number is given to the next."""
    attempt = service.attempt(tmp_path)
    with service.database.write() as connection:
        service.jobs.cancel(connection, attempt.job)
    with pytest.raises(AttemptStopped) as stopped:
        service.publish(attempt, model)
    assert StopKind.CANCEL is stopped.value.kind
    assert ([], []) == (service.registry.page(limit=9), list(service.registry.blobs.manifests()))
    service.submit()
    assert 1 == service.publish(service.attempt(tmp_path), model).version


def test_a_store_that_is_away_is_waited_for(
    service: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of transactions, and until the job's owner wishes otherwise; it costs the job nothing."""
    monkeypatch.setattr(publish, "_WAIT_S", 0.0)
    blobs, attempt = service.registry.blobs, service.attempt(tmp_path)
    put, put_manifest, calls = blobs.put, blobs.put_manifest, list[str]()

    def away_once(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls.append(name)
            if 1 == calls.count(name):
                raise StoreAwayError
            return work(*args)

        return call

    monkeypatch.setattr(blobs, "put", away_once("put", put))
    monkeypatch.setattr(blobs, "put_manifest", away_once("manifest", put_manifest))
    assert 1 == service.publish(attempt, model).version
    assert ["put"] * (1 + FILES) + ["manifest"] * 2 == calls
    service.submit()
    attempt = service.attempt(tmp_path)
    monkeypatch.setattr(attempt, "stop_requested", lambda: StopKind.PAUSE)
    calls.clear()
    with pytest.raises(AttemptStopped):
        service.publish(attempt, model)


def test_a_store_that_does_not_come_back_ends_the_attempt_and_not_the_job(
    service: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job has no part in it: another attempt publishes. Damaged bytes do fail it."""
    monkeypatch.setattr(publish, "_PATIENCE_S", 0.0)
    attempt = service.attempt(tmp_path)

    def away(*_: object) -> None:
        raise StoreAwayError

    with monkeypatch.context() as patch:
        patch.setattr(service.registry.blobs, "put", away)
        with pytest.raises(SystemExit) as ended, worker._ending(attempt.store, leads=True):
            service.publish(attempt, model)
    assert (EX_TEMPFAIL, JobState.VALIDATING) == (ended.value.code, state_of(service, attempt))
    with worker._ending(attempt.store, leads=True):
        raise ArtifactCorruptError
    assert JobState.FAILED is state_of(service, attempt)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["folder and SQLite", "bucket and PostgreSQL"])
def test_a_publication_that_is_killed_anywhere_is_complete_or_not_there(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """No step of it leaves a version in part, and its job goes on to publish."""
    if kind.startswith("folder"):
        stored, store_url = Stored(files_dir=tmp_path), f"sqlite:///{tmp_path / 'store.db'}"
        expected = {"os.link", "os.write", "os.fsync"}
    else:
        s3: S3Server = request.getfixturevalue("s3")
        postgres: PostgresServer = request.getfixturevalue("postgres")
        stored = Stored(files_dir=tmp_path, url=s3.new_url(), options=s3.options)
        store_url = postgres.new_database()
        expected = {"obstore.put", "obstore.head", "obstore.get_range", "part of obstore.put"}
    given = {**dataclasses.asdict(stored), "files_dir": str(tmp_path)}
    order = json.dumps({"stored": given, "store_url": store_url, "scratch": str(tmp_path / "scratch")})
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.publish_killed", order], capture_output=True, check=False, timeout=280
    )
    assert 0 == run.returncode, run.stderr.decode()[-3000:]
    result = json.loads(run.stdout)
    assert {"steps": result["steps"], "wrong": [], "status": 0} == result
    assert {*expected, "commit", "INSERT INTO artifacts", "INSERT INTO artifact_events", "end"} <= set(result["steps"])
