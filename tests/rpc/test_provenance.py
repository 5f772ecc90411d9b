"""Signed versions over real connections: told, fetched, verified by the library's own tool, and refused by policy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf import json_format
from in_toto_attestation.v1 import statement, statement_pb2

from agent_server import foundation
from agent_server.server import build as build_agent_server
from agent_server.settings import AgentSettings, CognateEndpoint, load_settings
from cognate_server.server import build as build_cognate_server
from cognate_server.settings import CognateSettings
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.client import AsyncAgentClient, AsyncCognateClient, CognateClient
from cognateforge.client.provenance import Problem, verify_folder, verify_provenance
from cognateforge.exceptions import ArtifactCorruptError, ForgeError, ProvenanceRefusedError
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from cognateforge.signatures import KeyPair, make_keys
from tests.support.published import (
    FILES,
    FOUNDATION,
    publish_agent,
    publish_model,
    publish_stated,
    publish_stated_agent,
)
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts.registry import ArtifactRow
from training_common.digests import sha256_bytes
from training_common.settings import SettingsError
from training_common.store import tables as t


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("other"))


def run_tool(folder: Path, public_key: Path) -> subprocess.CompletedProcess[str]:
    """Verify a folder with the command-line tool of OpenSSF model signing."""
    signature = str(folder / "model.sig")
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature]
    command += ["--public_key", str(public_key), "--ignore-paths", signature, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def test_a_signed_model_is_told_and_fetched_with_its_signature(
    cognate: AsyncCognateClient, keys: KeyPair, tmp_path: Path
) -> None:
    """What is told agrees; what is fetched the library's own tool accepts, until a bit of it flips."""
    row = publish_stated(tmp_path / "cognate", key=keys.private)
    told = await cognate.models.GetModelProvenance(model_pb2.GetModelProvenanceRequest(name="cognate-25m"))
    found = verify_provenance(told.provenance, name=row.name, digest=row.digest, public_keys=[keys.public])
    assert (
        (row.name, row.digest, keys.fingerprint)
        == (found.name, found.digest, found.key)
        == (
            row.name,
            row.digest,
            row.key,
        )
    )

    folder = (await cognate.fetch_model("cognate-25m", tmp_path / "fetched")).path
    assert {*FILES, "provenance.json", "manifest.json", "model.sig"} == {path.name for path in folder.iterdir()}
    assert row.signature == (folder / "model.sig").read_bytes()
    assert 0 == (await cognate.fetch_model("cognate-25m", folder)).bytes_received
    assert keys.fingerprint == verify_folder(folder, public_keys=[keys.public]).key
    accepted = await asyncio.to_thread(run_tool, folder, keys.public)
    assert (0, "Verification succeeded\n") == (accepted.returncode, accepted.stdout), accepted.stderr
    (folder / "tail.bin").write_bytes(b"tain")
    refused = await asyncio.to_thread(run_tool, folder, keys.public)
    assert 0 != refused.returncode
    assert "tail.bin" in refused.stdout + refused.stderr


async def test_a_statement_is_one_of_in_totos(cognate: AsyncCognateClient, tmp_path: Path) -> None:
    """Their own classes read it and find nothing wrong; a seed is the one of the plan to its last bit."""
    publish_stated(tmp_path / "cognate")
    answer = await cognate.models.GetModelProvenance(model_pb2.GetModelProvenanceRequest(name="cognate-25m"))
    raw = answer.provenance.statement
    message = json_format.Parse(raw, statement_pb2.Statement())
    statement.Statement.copy_from_pb(message).validate()
    assert sorted(FILES) == sorted(subject.name for subject in message.subject)
    predicate = json.loads(raw)["predicate"]
    assert str(2**62 + 1) == predicate["plan"]["fields"]["seed"]
    assert {"name": "jobs/x", "attempt": 1} == predicate["job"]
    assert ["forge-arithmetic"] == [source["name"] for source in predicate["data"]["sources"]]


async def test_what_has_neither_is_told_as_such(
    cognate: AsyncCognateClient, agents: AsyncAgentClient, tmp_path: Path
) -> None:
    """Versions of releases before have no statement and no signature, and are fetched as ever."""
    publish_model(tmp_path / "cognate")
    publish_agent(tmp_path / "agent")
    model = (
        await cognate.models.GetModelProvenance(model_pb2.GetModelProvenanceRequest(name="cognate-25m"))
    ).provenance
    agent = (
        await agents.agents.GetAgentProvenance(agent_pb2.GetAgentProvenanceRequest(name="intent-router"))
    ).provenance
    for found, name in ((model, "cognate-25m@1"), (agent, "intent-router@1")):
        assert (name, b"", b"") == (found.name, found.statement, found.signature)
        assert found.digest == sha256_bytes(found.manifest)
    fetched = await agents.fetch_agent("intent-router", tmp_path / "fetched")
    assert not (fetched.path / "model.sig").exists()


def forge_manifest(folder: Path, row: ArtifactRow) -> None:
    """Change the manifest in the database, and its digest with it, as who can write there would."""
    manifest = row.manifest.replace(b'"rows":2000', b'"rows":9000')
    assert manifest != row.manifest
    with _writing(folder) as connection:
        connection.execute(sa.update(t.artifacts).values(manifest=manifest, digest=sha256_bytes(manifest)))


def change_manifest(folder: Path, row: ArtifactRow) -> None:
    """Change the manifest in the database alone."""
    with _writing(folder) as connection:
        connection.execute(sa.update(t.artifacts).values(manifest=row.manifest + b" "))


def drop_signature(folder: Path, row: ArtifactRow) -> None:
    with _writing(folder) as connection:
        connection.execute(sa.update(t.artifacts).values(signature=None, key=""))


def promote(folder: Path, row: ArtifactRow) -> None:
    """Call the model READY where lists and messages are made from, beside its manifest."""
    with _writing(folder) as connection:
        connection.execute(sa.update(t.artifacts).values(state="READY"))


def swap_statement(folder: Path, row: ArtifactRow) -> None:
    """Put another statement in the place of the stored one."""
    digest = next(file.digest for file in row.files if file.path == "provenance.json").removeprefix("sha256:")
    path = folder / "artifacts" / "blobs" / "sha256" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"forge-arithmetic", b"gsm8k-main-full1"))


def _writing(folder: Path) -> Any:
    return sa.create_engine(f"sqlite:///{folder / 'store.db'}").begin()


Tamper = Callable[[Path, ArtifactRow], None]
REFUSALS: list[tuple[dict[str, Any], Tamper | None, type[ForgeError], str]] = [
    ({"key": None}, None, ProvenanceRefusedError, Problem.NOT_SIGNED),
    ({}, drop_signature, ProvenanceRefusedError, Problem.NOT_SIGNED),
    ({"key": "other"}, None, ProvenanceRefusedError, Problem.UNKNOWN_KEY),
    ({}, forge_manifest, ProvenanceRefusedError, Problem.SIGNATURE),
    ({}, change_manifest, ProvenanceRefusedError, Problem.MANIFEST),
    ({"stated": False}, None, ProvenanceRefusedError, Problem.NO_STATEMENT),
    ({"files": ["tail.bin"]}, None, ProvenanceRefusedError, Problem.STATEMENT),
    ({"state": "EXPERIMENTAL"}, promote, ProvenanceRefusedError, Problem.MANIFEST),
    ({}, swap_statement, ArtifactCorruptError, ""),
]
CASES = pytest.mark.parametrize(
    ("published", "tamper", "error", "problem"),
    REFUSALS,
    ids=["unsigned", "dropped", "other_key", "forged", "changed", "unstated", "other_files", "promoted", "swapped"],
)


@CASES
async def test_a_fetch_by_policy_refuses_and_transfers_nothing(
    keys: KeyPair,
    other: KeyPair,
    tmp_path: Path,
    published: dict[str, Any],
    tamper: Tamper | None,
    error: type[ForgeError],
    problem: str,
) -> None:
    """Every way in which a model does not prove where it comes from, by its own name."""
    async with running_cognate(tmp_path / "cognate") as server:
        key = {"key": keys.private, **published}
        key["key"] = other.private if key["key"] == "other" else key["key"]
        row = publish_stated(tmp_path / "cognate", **key)
        if tamper is not None:
            tamper(tmp_path / "cognate", row)

        with pytest.raises(error) as refused:
            await asyncio.to_thread(fetch, server.address, tmp_path / "cache", keys.public)
        assert problem == refused.value.metadata.get("problem", "")
        assert not (tmp_path / "cache").exists()


async def test_a_fetch_by_policy_verifies_a_cache_hit_too(keys: KeyPair, other: KeyPair, tmp_path: Path) -> None:
    """What was fetched before the key was changed is not taken after it."""
    async with running_cognate(tmp_path / "cognate") as server:
        publish_stated(tmp_path / "cognate", key=keys.private)
        cached = partial(fetch, server.address, tmp_path / "cache")
        path = await asyncio.to_thread(cached, keys.public)
        assert path == await asyncio.to_thread(cached, other.public, keys.public)
        with pytest.raises(ProvenanceRefusedError, match=other.fingerprint):
            await asyncio.to_thread(cached, other.public)
        assert path == await asyncio.to_thread(cached)


def fetch(address: str, cache_dir: Path, *trusted: Path) -> Path:
    with CognateClient(address) as client:
        return foundation.fetch(
            client,
            "cognate-25m",
            accept_experimental=False,
            required=None,
            cache_dir=cache_dir,
            trusted=trusted,
            patience_s=0.1,
        ).path


def plan() -> pb.TrainingPlan:
    return pb.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=pb.FoundationBase(name="cognate-25m"),
        classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=1), max_rows_per_label=4),
        adaptation=pb.Adaptation(lora=pb.LoraAdaptation()),
        optimization=pb.Optimization(adamw=pb.AdamW()),
        total_steps=1,
        batch_size=4,
    )


def policy(address: str, key: KeyPair, **changes: Any) -> dict[str, Any]:
    return {"address": address, "provenance": "require", "public_key_files": [key.public], **changes}


async def test_a_submission_by_policy_is_refused_at_once(keys: KeyPair, other: KeyPair, tmp_path: Path) -> None:
    """With the field and the reason; nothing is written. Another key's policy takes the same model."""
    request = pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan())
    async with running_cognate(tmp_path / "cognate") as cognate:
        row = publish_stated(tmp_path / "cognate", key=keys.private)
        async with (
            running_agent(tmp_path / "no", cognate=policy(cognate.address, other, ask_within_s=30)) as server,
            AsyncAgentClient(server.address) as agents,
        ):
            with pytest.raises(ProvenanceRefusedError) as refused:
                await agents.training.StartTraining(request)
            assert Problem.UNKNOWN_KEY == refused.value.metadata["problem"]
            assert [("plan.foundation.name", True)] == [
                (violation.field, row.name in violation.description) for violation in refused.value.violations
            ]
            assert [] == list((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)
        async with (
            running_agent(tmp_path / "yes", cognate=policy(cognate.address, keys, ask_within_s=30)) as server,
            AsyncAgentClient(server.address) as agents,
        ):
            assert (await agents.training.StartTraining(request)).job.job.name


def go_on() -> pb.TrainingPlan:
    """Return a plan that goes on from the agent of `publish_stated_agent`."""
    changed = plan()
    changed.agent_version.name = "intent-router@1"
    return changed


def collected(folder: Path) -> None:
    with _writing(folder) as connection:
        connection.execute(sa.update(t.artifacts).values(collect_us=1))


@pytest.mark.parametrize("problem", ["", "unknown_key", "not_signed", "other_version", "not_published"])
async def test_an_agent_that_is_gone_on_from_is_held_to_the_same_keys(
    keys: KeyPair, other: KeyPair, tmp_path: Path, problem: str
) -> None:
    """Its foundation is asked for anew: it may have been made before the policy, or under another key."""
    key = {"unknown_key": other.private, "not_signed": None}.get(problem, keys.private)
    async with running_cognate(tmp_path / "cognate") as cognate:
        row = publish_stated(tmp_path / "cognate", key=key)
        settings = policy(cognate.address, keys, ask_within_s=30)
        async with (
            running_agent(tmp_path / "agent", cognate=settings) as server,
            AsyncAgentClient(server.address) as agents,
        ):
            made_of = replace(row, digest=FOUNDATION) if problem == "other_version" else row
            publish_stated_agent(tmp_path / "agent", made_of)
            if problem == "not_published":
                collected(tmp_path / "cognate")
            request = pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=go_on())
            if not problem:
                assert (await agents.training.StartTraining(request)).job.job.name
                return
            with pytest.raises(ProvenanceRefusedError, match=r"intent-router@1 is refused.*cognate-25m@1") as refused:
                await agents.training.StartTraining(request)
            assert problem == refused.value.metadata["problem"]
            assert ["plan.agent_version.name"] == [violation.field for violation in refused.value.violations]
            assert [] == list((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("make", [plan, go_on])
async def test_a_job_by_policy_fails_for_good(
    keys: KeyPair,
    other: KeyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], pb.TrainingPlan],
) -> None:
    """A worker refuses as well, says why, and is not tried again; also for the foundation below an agent."""
    async with running_cognate(tmp_path / "cognate") as cognate:
        row = publish_stated(tmp_path / "cognate", key=keys.private)
        settings = {"cognate": policy(cognate.address, other, ask_within_s=0), "workers": {"slots": 1, "threads": 1}}
        # What its worker, a process of its own, reads.
        monkeypatch.setenv("AGENT_SERVER_DATA_DIR", str(tmp_path / "agent"))
        monkeypatch.setenv("AGENT_SERVER_COGNATE__ADDRESS", cognate.address)
        monkeypatch.setenv("AGENT_SERVER_COGNATE__PROVENANCE", "require")
        monkeypatch.setenv("AGENT_SERVER_COGNATE__PUBLIC_KEY_FILES", str(other.public))
        async with running_agent(tmp_path / "agent", **settings) as server, AsyncAgentClient(server.address) as agents:
            publish_stated_agent(tmp_path / "agent", row)
            request = pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=make())
            name = (await agents.training.StartTraining(request)).job.job.name
            [end] = [frame.end async for frame in agents.watch_job(name) if frame.HasField("end")]
            job = (await agents.training.GetJob(pb.GetJobRequest(name=name))).job.job
    assert job_pb2.JOB_STATE_FAILED == end.state
    assert ("PROVENANCE_REFUSED", 1) == (job.failure.reason, job.attempt)
    assert keys.fingerprint in job.failure.message


@pytest.mark.parametrize("wrong", ["missing", "public", "open"])
def test_a_server_does_not_start_with_a_key_that_cannot_sign(keys: KeyPair, tmp_path: Path, wrong: str) -> None:
    """Both services, with the setting's name and what to do."""
    path = {"missing": tmp_path / "none", "public": tmp_path / "public.pem", "open": tmp_path / "open.key"}[wrong]
    if wrong != "missing":
        path.write_bytes((keys.public if wrong == "public" else keys.private).read_bytes())
        path.chmod(0o600 if wrong == "public" else 0o644)
    values = {"address": "127.0.0.1:0", "data_dir": tmp_path / "data", "artifacts": {"signing_key_file": path}}
    with pytest.raises(SettingsError, match=r"artifacts\.signing_key_file: .*(forge keys make|chmod 600)"):
        build_cognate_server(CognateSettings.model_validate(values), None)
    with pytest.raises(SettingsError, match=r"artifacts\.signing_key_file: "):
        build_agent_server(AgentSettings.model_validate(values), None)
    assert not (tmp_path / "data").exists()


def test_an_agent_service_does_not_start_with_a_key_that_verifies_nothing(keys: KeyPair, tmp_path: Path) -> None:
    """A policy that could not be followed would stop every job later."""
    endpoint = {"provenance": "require", "public_key_files": [keys.public, tmp_path / "none"]}
    values = {"address": "127.0.0.1:0", "data_dir": tmp_path / "data", "cognate": endpoint}
    with pytest.raises(SettingsError, match=r"cognate\.public_key_files: .*none: No such file"):
        build_agent_server(AgentSettings.model_validate(values), None)


def test_a_policy_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One without keys could never be met. The environment has them with commas between."""
    monkeypatch.setenv("AGENT_SERVER_COGNATE__PROVENANCE", "require")
    with pytest.raises(SettingsError, match=r"cognate: public_key_files is missing"):
        load_settings(None)
    monkeypatch.setenv("AGENT_SERVER_COGNATE__PUBLIC_KEY_FILES", "a.pem, b.pem")
    endpoint = load_settings(None).cognate
    assert (Path("a.pem"), Path("b.pem")) == foundation.trusted_keys(endpoint)
    assert () == foundation.trusted_keys(CognateEndpoint(public_key_files=(Path("a.pem"),)))
