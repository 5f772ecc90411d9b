"""A model and an agent, published straight into a service's store: for tests of serving, not of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent_server.agents import record_agent
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.store.database import Database

FOUNDATION = f"sha256:{'f' * 64}"
FILES = {
    "adapter.safetensors": bytes(range(256)) * 6_000,
    "card.md": b"# card\n",
    "empty.bin": b"",
    "tail.bin": b"tail",
}
PAYLOAD = b"".join(FILES.values())


def publish_model(folder: Path, *, state: str = "READY", payload: bytes = b"weights" * 1000) -> ArtifactRow:
    """Publish the next version of cognate-25m."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"))
    source = folder / "payload.bin"
    source.write_bytes(payload)
    body = {
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
    file = registry.blobs.put(source, "model.safetensors")
    with database.write() as connection:
        row = registry.publish(connection, family="cognate-25m", state=state, job="jobs/x", files=[file], body=body)
    database.close()
    return row


def open_registry(folder: Path) -> ArtifactRegistry:
    """Open a service's registry; close its database after use."""
    return ArtifactRegistry(Database(f"sqlite:///{folder / 'store.db'}"), BlobStore(folder / "artifacts"))


def publish_agent(
    folder: Path,
    *,
    family: str = "intent-router",
    labels: Sequence[str] = ("greeting", "farewell"),
    task: str = "classification",
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
        "parent": {"name": "cognate-25m@1", "digest": FOUNDATION},
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
