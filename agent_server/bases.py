"""What an agent is made of, as a plan names it: a foundation, a model folder, nothing, or a published agent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent_server.agents import find_agent
from agent_server.architectures.hub import fetch_from_hub
from agent_server.architectures.model_folder import find_folder, open_folder
from agent_server.foundation import Below, Foundation, file_digest, locked
from agent_server.settings import ModelSettings
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    FieldViolation,
    IncompatibleError,
    NotImplementedByServerError,
)
from training_common.artifacts.blobs import StoredFile
from training_common.artifacts.files import unpack
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import require_whole


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
    hold: Callable[[ArtifactRow], None] = lambda _row: None,
    trust: Callable[[str, Below], None] = lambda _agent, _below: None,
) -> Base:
    """Return a plan's base, with its files on this machine.

    fetch: gets the foundation. models: where model folders are. agent_name, model_digest: what an earlier attempt
    resolved, so that a job has one base. hold: keeps an agent from being collected. trust: refuses an agent for the
    foundation below it.
    Errors: those of `fetch` and `trust`; AgentNotFoundError; ArtifactCorruptError; DataUnavailableError;
    IncompatibleError; NotImplementedByServerError.
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
            row = find_base(plan, registry, name=agent_name)
            hold(row)
            trust(row.name, below(row))
            return _agent(row, registry, cache_dir)
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


def find_base(plan: pb.TrainingPlan, registry: ArtifactRegistry, *, name: str = "") -> ArtifactRow:
    """Return the published agent that a plan goes on with. name: the version that was resolved before.

    Errors: AgentNotFoundError; IncompatibleError, when it is of another architecture than the plan's.
    """
    row = find_agent(registry, name or plan.agent_version.name)
    architecture = row.body["architecture"]
    if architecture != plan.architecture:
        description = f"{row.name} is of architecture {architecture}, not {plan.architecture}: name that one"
        raise IncompatibleError(
            f"plan.architecture: {description}",
            violations=[FieldViolation(field="plan.architecture", description=description)],
        )
    return row


def below(row: ArtifactRow) -> Below:
    """Return the foundation at the bottom of a published agent."""
    parent = row.body["parent"]
    return Below(name=parent["name"], digest=parent["digest"])


def _agent(row: ArtifactRow, registry: ArtifactRegistry, cache_dir: Path) -> Base:
    require_whole(registry, row)
    folder = cache_dir / row.digest.removeprefix("sha256:")
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Jobs side by side may want the same one; what is there is believed as far as its digests go.
    with locked(cache_dir / f"{folder.name}.lock"):
        if folder.exists() and not all(_holds(folder / file.path, file) for file in row.files):
            shutil.rmtree(folder)
        if not folder.exists():
            making = cache_dir / f"{folder.name}.part"
            shutil.rmtree(making, ignore_errors=True)
            unpack(row.files, registry.blobs, making)
            making.rename(folder)
    bottom = below(row)
    return Base(
        name=row.name,
        digest=row.digest,
        agent_dir=folder,
        foundation=bottom.name,
        foundation_digest=bottom.digest,
    )


def _holds(path: Path, file: StoredFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and file_digest(path) == file.digest
