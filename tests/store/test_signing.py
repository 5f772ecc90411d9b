"""Versions are signed as they are published, and carry a statement that is about exactly their files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from google.protobuf import json_format

import cognate_server.migrations
from cognateforge.artifact.v1.artifact_pb2 import Provenance
from cognateforge.client.provenance import verify_provenance
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import IntegrityCheckFailedError
from cognateforge.layout import MANIFEST_NAME, SIGNATURE_NAME, STATEMENT_NAME
from cognateforge.signatures import KeyPair, make_keys
from training_common import worker
from training_common.artifacts import statement
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.publish import publish_and_succeed
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import Damage, Scrubber
from training_common.artifacts.signing import ArtifactSigner, SigningKeyError
from training_common.digests import sha256_bytes, sha256_file
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.settings import ArtifactSettings
from training_common.store import tables
from training_common.store.database import Database
from training_common.worker import WorkerAttempt

PLAN = pretraining_pb2.PretrainingPlan(total_steps=3, seed=2**63 - 1)
BODY = {
    "kind": "foundation",
    "data": [{"name": "gsm8k", "kind": "folder", "rows": 7, "digest": f"sha256:{'d' * 64}"}],
    "checks": [{"name": "loss_is_finite", "passed": True}],
    "training": {"steps": 3},
    "recovery": [{"kind": "loss_spike"}],
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def database(tmp_path: Path, store_url: str) -> Iterator[Database]:
    made = Database(store_url or f"sqlite:///{tmp_path / 'store.db'}")
    made.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield made
    made.close()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What a trainer leaves."""
    folder = tmp_path / "trained"
    (folder / "parts").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "parts" / "config.json").write_bytes(b"{}")
    (folder / "data.json").write_bytes(b'{"sources": []}')
    return folder


def begin(database: Database, folder: Path) -> WorkerAttempt:
    """Return the attempt of a job that has come as far as its publication."""
    jobs = JobStore(database)
    with database.write() as connection:
        jobs.submit(connection, plan=PLAN.SerializeToString(), total_steps=3, caller="local")
    job = jobs.begin_attempt("here")
    assert job is not None
    attempt = WorkerAttempt(jobs.attempt(job.name, job.attempt, job.fencing_token), workdir=folder / "job")
    attempt.store.register("pid:1")
    attempt.move(JobState.RUNNING)
    attempt.save_checkpoint(step=2, write=lambda place: (place / "state").touch()).result()
    attempt.trained()
    return attempt


def publish(registry: ArtifactRegistry, attempt: WorkerAttempt, folder: Path) -> ArtifactRow:
    made_of = [statement.Ancestor(role="agent", name="router@1", digest="sha256:a", statement="sha256:b")]
    return publish_and_succeed(
        registry,
        attempt,
        folder=folder,
        family="cognate-25m",
        state="READY",
        body=BODY,
        service="cognate",
        code=("training_common",),
        plan=PLAN,
        made_of=made_of,
    )


def test_what_a_job_publishes_is_stated_and_signed(
    database: Database, trained: Path, tmp_path: Path, keys: KeyPair
) -> None:
    """The row has the signature and the key's fingerprint; all of it agrees, in the store that is read later."""
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"), ArtifactSigner(keys.private))
    row = publish(registry, begin(database, tmp_path), trained)
    assert row == registry.find("cognate-25m", 1)
    assert keys.fingerprint == row.key
    provenance = Provenance(
        manifest=row.manifest, statement=(trained / STATEMENT_NAME).read_bytes(), signature=row.signature or b""
    )
    found = verify_provenance(provenance, name=row.name, digest=row.digest, public_keys=[keys.public])
    assert (keys.fingerprint, sha256_file(trained / STATEMENT_NAME)) == (found.key, found.statement_digest)


def test_a_scrub_tells_a_signature_that_does_not_hold(
    database: Database, trained: Path, tmp_path: Path, keys: KeyPair
) -> None:
    """One of the service's own key. What another key has signed is for those to verify who have it."""
    signer = ArtifactSigner(keys.private)
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"), signer)
    row = publish(registry, begin(database, tmp_path), trained)
    assert [] == scrubbed(registry)
    swap_signature(registry, signer.sign(row.name, b"{}", row.files).bundle)
    [damage] = scrubbed(registry)
    assert ("SIGNATURE", SIGNATURE_NAME) == (damage.problem, damage.path)
    assert MANIFEST_NAME in damage.detail
    other = ArtifactSigner(make_keys(tmp_path / "others").private)
    assert [] == scrubbed(ArtifactRegistry(database, registry.blobs, other))
    swap_signature(registry, row.signature)
    assert [] == scrubbed(registry)
    kinds = [event.kind for event in registry.events_after(0, 9)]
    assert ["published", "damaged", "mended"] == kinds


def scrubbed(registry: ArtifactRegistry) -> list[Damage]:
    row = registry.find("cognate-25m", 1)
    assert row is not None
    return Scrubber(registry, ArtifactSettings()).verify(row, threading.Event())


def swap_signature(registry: ArtifactRegistry, signature: bytes | None) -> None:
    with registry.database.write() as connection:
        connection.execute(sa.update(tables.artifacts).values(signature=signature))


def test_a_statement_tells_all_that_a_version_was_made_of(database: Database, trained: Path, tmp_path: Path) -> None:
    """Data, code, plan, checkpoints, recoveries, results and ancestors, each with its digest."""
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"))
    attempt = begin(database, tmp_path)
    [checkpoint] = attempt.store.checkpoints()
    row = publish(registry, attempt, trained)
    assert (None, "") == (row.signature, row.key)
    document = json.loads((trained / STATEMENT_NAME).read_bytes())
    assert {"data.json", "model.safetensors", "parts/config.json"} == {item["name"] for item in document["subject"]}
    told = document["predicate"]
    assert {"path": "data.json", "digest": sha256_file(trained / "data.json")} == told["data"]["report"]
    assert (BODY["data"], BODY["recovery"]) == (told["data"]["sources"], told["recovery"])
    assert {"checks": BODY["checks"]} == told["results"]
    assert [{"step": 2, "attempt": 1, "digest": checkpoint.digest}] == told["checkpoints"]
    assert [{"role": "agent", "name": "router@1", "digest": "sha256:a", "statement": "sha256:b"}] == told["made_of"]
    assert row.body["code"] == told["code"]
    assert {"name": attempt.job, "attempt": 1} == told["job"]
    assert sha256_bytes(PLAN.SerializeToString()) == told["plan"]["digest"]
    assert PLAN == json_format.ParseDict(told["plan"]["fields"], pretraining_pb2.PretrainingPlan())


def test_a_second_try_states_anew(database: Database, trained: Path, tmp_path: Path) -> None:
    """An attempt that died before its commit has left a statement: it is no subject of the next one."""
    (trained / STATEMENT_NAME).write_text("of an attempt before")
    row = publish(ArtifactRegistry(database, BlobStore(tmp_path / "artifacts")), begin(database, tmp_path), trained)
    assert [STATEMENT_NAME] == [file.path for file in row.files if file.path == STATEMENT_NAME]
    document = json.loads((trained / STATEMENT_NAME).read_bytes())
    assert STATEMENT_NAME not in {item["name"] for item in document["subject"]}


@pytest.mark.parametrize("name", ["manifest.json", "Model.sig"])
def test_a_file_in_the_place_of_another_is_refused(
    database: Database, trained: Path, tmp_path: Path, name: str
) -> None:
    """A reader's folder holds the manifest and the signature there."""
    (trained / name).write_bytes(b"x")
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"))
    with pytest.raises(IntegrityCheckFailedError, match=name):
        publish(registry, begin(database, tmp_path), trained)
    assert registry.find("cognate-25m", None) is None


def test_without_its_key_nothing_is_published(database: Database, trained: Path, tmp_path: Path, keys: KeyPair) -> None:
    """Not unsigned either; the job stays, and a fault of the machine is what its attempt ends with."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(keys.private.read_bytes())
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"), ArtifactSigner(key))
    attempt = begin(database, tmp_path)
    key.chmod(0o644)
    with pytest.raises(SigningKeyError, match=r"artifacts\.signing_key_file: .*chmod 600") as refused:
        publish(registry, attempt, trained)
    assert "cannot be signed" in worker._platform_fault(refused.value)
    assert registry.find("cognate-25m", None) is None
    assert JobState.VALIDATING is JobStore(database).get(attempt.job).state
    key.chmod(0o600)
    assert keys.fingerprint == publish(registry, attempt, trained).key


def test_a_key_that_goes_in_the_middle_leaves_no_manifest(database: Database, tmp_path: Path, keys: KeyPair) -> None:
    """Its number stays free."""
    key = tmp_path / "key"
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"), ArtifactSigner(key))
    (tmp_path / "weights").write_bytes(b"weights")
    file = registry.blobs.put(tmp_path / "weights", "weights.bin")

    def publish_one() -> ArtifactRow:
        with database.write() as connection:
            return registry.publish(connection, family="x", state="READY", job="jobs/x", files=[file], body={})

    with pytest.raises(SigningKeyError, match="No such file"):
        publish_one()
    assert [] == list((tmp_path / "artifacts").rglob("*.json"))
    key.touch(0o600)
    key.write_bytes(keys.private.read_bytes())
    assert (1, keys.fingerprint) == (publish_one().version, registry.page(limit=1)[0].key)


def test_a_statement_that_no_message_holds_is_refused(
    database: Database, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published, it could never be told."""
    monkeypatch.setattr(statement, "MAX_STATEMENT_BYTES", 500)
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"))
    with pytest.raises(IntegrityCheckFailedError, match="at most 500 can be told"):
        publish(registry, begin(database, tmp_path), trained)
