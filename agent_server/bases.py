"""What an agent is made of, as a plan names it: a foundation, a model folder, nothing, or a published agent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from agent_server.agents import find_agent
from agent_server.architectures.hub import fetch_from_hub
from agent_server.architectures.model_folder import find_folder, open_folder
from agent_server.foundation import Foundation, file_digest
from agent_server.settings import ModelSettings
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError, NotImplementedByServerError
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.registry import ArtifactRegistry


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an agent is made of. The folders must not be written to.

    name, digest: of the foundation, the model folder or the agent; empty from scratch. base_dir: a foundation or a
    model folder. agent_dir: an agent.
    foundation, foundation_digest: the foundation at the bottom of it, also below an agent; empty where there is none.
    """

    name: str = ""
    digest: str = ""
    base_dir: Path | None = None
    agent_dir: Path | None = None
    foundation: str = ""
    foundation_digest: str = ""

    @property
    def text(self) -> str:
        """Return what a person calls it."""
        return self.name or "random values"


def resolve(
    plan: pb.TrainingPlan,
    *,
    fetch: Callable[[], Foundation],
    registry: ArtifactRegistry,
    cache_dir: Path,
    models: ModelSettings | None = None,
    agent_name: str = "",
    model_digest: str = "",
) -> Base:
    """Return a plan's base, with its files on this machine.

    fetch: gets the foundation. models: where model folders are. agent_name, model_digest: what an earlier attempt
    resolved, so that a job has one base.
    Errors: those of `fetch`; AgentNotFoundError; ArtifactCorruptError; DataUnavailableError; IncompatibleError;
    NotImplementedByServerError.
    """
    match plan.WhichOneof("base"):
        case "foundation":
            found = fetch()
            return Base(
                name=found.name,
                digest=found.digest,
                base_dir=found.path,
                foundation=found.name,
                foundation_digest=found.digest,
            )
        case "model_folder":
            return _model_folder(plan.model_folder.path, models or ModelSettings(), model_digest)
        case "scratch":
            return Base()
        case "agent_version":
            return _agent(agent_name or plan.agent_version.name, registry, cache_dir)
        case other:
            raise NotImplementedByServerError(f"this release cannot train on the base {other}")


def _model_folder(name: str, models: ModelSettings, digest: str) -> Base:
    path = find_folder(models, name)
    if not path.is_dir():
        fetch_from_hub(name, path)
    folder = open_folder(path, name)
    found = folder.digest()
    if digest and found != digest:
        raise IncompatibleError(
            f"the model folder {name} is {found}, and this job began with {digest}; put that back, or start a new job"
        )
    return Base(name=name, digest=found, base_dir=path)


def _agent(name: str, registry: ArtifactRegistry, cache_dir: Path) -> Base:
    row = find_agent(registry, name)
    folder = cache_dir / row.digest.removeprefix("sha256:")
    if not folder.exists():
        making = cache_dir / f"{folder.name}.part"
        shutil.rmtree(making, ignore_errors=True)
        unpack(row.files, registry.blobs, making)
        making.rename(folder)
    parent = row.body["parent"]
    return Base(
        name=row.name,
        digest=row.digest,
        agent_dir=folder,
        foundation=parent["name"],
        foundation_digest=parent["digest"],
    )


def unpack(files: Iterable[StoredFile], blobs: BlobStore, folder: Path) -> None:
    """Write an artifact's files into a folder. Errors: ArtifactCorruptError."""
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            for _, piece in blobs.open_payload((file,), 0):
                target.write(piece)
        if file_digest(path) != file.digest:
            raise ArtifactCorruptError(f"{file.path}: its stored bytes are not what the manifest names")
