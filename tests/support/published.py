"""A model and an agent, published straight into a service's store: for tests of serving, not of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_server.agents import record_agent
from cognateforge.agent.v1 import training_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.layout import STATEMENT_NAME
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.signing import ArtifactSigner
from training_common.artifacts.statement import Ancestor, Making, statement_of
from training_common.models.fingerprints import COGNATE_V1_25M
from training_common.store.database import Database

FOUNDATION = f"sha256:{'f' * 64}"
FILES = {
    "adapter.safetensors": bytes(range(256)) * 6_000,
    "README.md": b"# card\n",
    "empty.bin": b"",
    "tail.bin": b"tail",
}
PAYLOAD = b"".join(FILES.values())

# What a model's manifest tells, at least.
MODEL_BODY: Mapping[str, Any] = {
    "architecture": {
        "name": "cognate_v1",
        "fingerprint": f"sha256:{'a' * 64}",
        "parameter_count": 24_998_668,
        "act_version": 1,
        "ltm_version": 1,
    },
    "tokenizer_digest": f"sha256:{'b' * 64}",
    "data": [],
    "checks": [],
    "training": {"steps": 1, "tokens": 512},
}


def publish_model(
    folder: Path, *, state: str = "READY", payload: bytes = b"weights" * 1000, job: str = "jobs/x", **told: Any
) -> ArtifactRow:
    """Publish the next version of cognate-25m. told: what else its manifest tells."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"))
    source = folder / "payload.bin"
    source.write_bytes(payload)
    body = {**MODEL_BODY, **told}
    file = registry.blobs.put(source, "model.safetensors")
    with database.write() as connection:
        row = registry.publish(connection, family="cognate-25m", state=state, job=job, files=[file], body=body)
    database.close()
    return row


def publish_stated(
    folder: Path,
    *,
    key: Path | None = None,
    stated: bool = True,
    files: Sequence[str] | None = None,
    state: str = "READY",
) -> ArtifactRow:
    """Publish a model as a job does: with a statement, and signed where a key is given.

    files: what the statement is about; by default all other files, as it must be.
    """
    database = Database(f"sqlite:///{folder / 'store.db'}")
    registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"), ArtifactSigner(key) if key else None)
    stored = [_put(registry, folder, name, content) for name, content in FILES.items()]
    body = {
        "kind": "foundation",
        "architecture": {
            "name": "cognate_v1",
            "fingerprint": COGNATE_V1_25M,
            "parameter_count": 24_998_668,
            "act_version": 1,
            "ltm_version": 1,
        },
        "tokenizer_digest": f"sha256:{'b' * 64}",
        "data": [{"name": "forge-arithmetic", "kind": "generated", "rows": 2000, "digest": f"sha256:{'d' * 64}"}],
        "checks": [],
        "training": {"steps": 1, "tokens": 512},
        "recovery": [],
        "create_us": 1_700_000_000_000_000,
        "code": {"version": "0.1.0", "digest": f"sha256:{'c' * 64}"},
    }
    if stated:
        # More than a double holds.
        plan = pretraining_pb2.PretrainingPlan(seed=2**62 + 1, total_steps=1)
        making = Making(job="jobs/x", attempt=1, plan=plan, plan_bytes=plan.SerializeToString())
        about = [file for file in stored if files is None or file.path in files]
        statement = statement_of(about, making, family="cognate-25m", body=body)
        stored.append(_put(registry, folder, STATEMENT_NAME, statement))
    with database.write() as connection:
        row = registry.publish(connection, family="cognate-25m", state=state, job="jobs/x", files=stored, body=body)
    database.close()
    return row


def publish_stated_agent(
    folder: Path, foundation: ArtifactRow, *, key: Path | None = None, made_of: ArtifactRow | None = None
) -> ArtifactRow:
    """Publish an agent as a job does, of a foundation model or of the agent that `made_of` is."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"), ArtifactSigner(key) if key else None)
    stored = [_put(registry, folder, name, content) for name, content in FILES.items()]
    nearest = made_of or foundation
    body = {
        "kind": "agent",
        "architecture": "cognate",
        "task": "classification",
        "labels": ["greeting", "farewell"],
        "parent": {"name": foundation.name, "digest": foundation.digest},
        "made_of": {
            "kind": "agent_version" if made_of else "foundation",
            "name": nearest.name,
            "digest": nearest.digest,
        },
        "parameters": {"trainable": 7, "total": 11},
        "evaluations": [],
        "data": [{"name": "forge-intents", "kind": "generated", "rows": 9, "digest": f"sha256:{'d' * 64}"}],
        "recovery": [],
        "create_us": 1_700_000_000_000_000,
        "code": {"version": "0.1.0", "digest": f"sha256:{'c' * 64}"},
    }
    ancestors = [_ancestor("agent", made_of)] if made_of else []
    plan = training_pb2.TrainingPlan(agent="intent-router")
    making = Making(
        job="jobs/x",
        attempt=1,
        plan=plan,
        plan_bytes=plan.SerializeToString(),
        made_of=[*ancestors, _ancestor("foundation", foundation)],
    )
    statement = statement_of(stored, making, family="intent-router", body=body)
    stored.append(_put(registry, folder, STATEMENT_NAME, statement))
    with database.write() as connection:
        row = registry.publish(
            connection, family="intent-router", state="PUBLISHED", job="jobs/x", files=stored, body=body
        )
        record_agent(connection, row)
    database.close()
    return row


def _ancestor(role: str, row: ArtifactRow) -> Ancestor:
    statement = next((file.digest for file in row.files if file.path == STATEMENT_NAME), "")
    return Ancestor(role=role, name=row.name, digest=row.digest, statement=statement)


def _put(registry: ArtifactRegistry, folder: Path, name: str, content: bytes) -> StoredFile:
    source = folder / name
    source.write_bytes(content)
    return registry.blobs.put(source, name)


def open_registry(folder: Path) -> ArtifactRegistry:
    """Open a service's registry; close its database after use."""
    return ArtifactRegistry(Database(f"sqlite:///{folder / 'store.db'}"), BlobStore(folder / "artifacts"))


def publish_agent(
    folder: Path,
    *,
    family: str = "intent-router",
    labels: Sequence[str] = ("greeting", "farewell"),
    task: str = "classification",
    foundation: str = "cognate-25m@1",
    recorded: bool = True,
) -> ArtifactRow:
    """Publish the next version of an agent; where it is not recorded, as a release without lifecycles did."""
    registry = open_registry(folder)
    files = []
    for name, content in FILES.items():
        source = folder / name
        source.write_bytes(content)
        files.append(registry.blobs.put(source, name))
    body = {
        "architecture": "cognate",
        "task": task,
        "labels": list(labels),
        "parent": {"name": foundation, "digest": FOUNDATION},
        "parameters": {"trainable": 7, "total": 11},
        "evaluations": [{"metric": "accuracy_after", "dataset": "forge-intents/test", "value": 0.5, "rows": 4}],
        "data": [{"name": "forge-intents", "kind": "generated", "rows": 9, "digest": f"sha256:{'d' * 64}"}],
    }
    with registry.database.write() as connection:
        row = registry.publish(connection, family=family, state="PUBLISHED", job="jobs/x", files=files, body=body)
        if recorded:
            record_agent(connection, row)
    registry.database.close()
    return row
