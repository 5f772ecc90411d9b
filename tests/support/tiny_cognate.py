"""A foundation that costs no training: a tiny Cognate of random weights."""

from pathlib import Path

from tests.agent._support import write_foundation
from tests.support.published import MODEL_BODY
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.models.fingerprints import COGNATE_V1_25M


def publish_tiny_cognate(registry: ArtifactRegistry, scratch: Path) -> ArtifactRow:
    """Publish it under the fingerprint that agents ask for."""
    folder = write_foundation(scratch, ["route this please", "hello there"])
    files = [registry.blobs.put(file, file.name) for file in sorted(folder.iterdir())]
    architecture = {**MODEL_BODY["architecture"], "fingerprint": COGNATE_V1_25M}
    body = {**MODEL_BODY, "architecture": architecture}
    with registry.database.write() as connection:
        return registry.publish(
            connection, family="cognate-25m", state="EXPERIMENTAL", job="jobs/x", files=files, body=body
        )
