"""Foundation models as the registry holds them: look-up by name, and the handshake with an agent architecture."""

from __future__ import annotations

from dataclasses import dataclass

from cognateforge.exceptions import ModelNotFoundError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow

FAMILY = "cognate-25m"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One compared part in which a model is not what was asked for."""

    field: str
    model_value: str
    wanted_value: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an agent architecture asks for. Empty parts are not compared."""

    architecture: dict[str, str | int]
    tokenizer_digest: str
    accept_experimental: bool


def find_model(registry: ArtifactRegistry, name: str) -> ArtifactRow:
    """Return the model of a name, "family@version" or a family for its newest. Errors: ModelNotFoundError."""
    family, _, version = name.partition("@")
    row = registry.find(family, int(version) if version else None)
    if row is None:
        raise ModelNotFoundError(f"no model {name} is published; list the models to see what there is")
    return row


def compare(row: ArtifactRow, wanted: Wanted) -> list[Difference]:
    """Return every reason why a model does not fit."""
    has = row.body["architecture"]
    pairs = [(f"architecture.{key}", has[key], value) for key, value in wanted.architecture.items() if value]
    if wanted.tokenizer_digest:
        pairs.append(("tokenizer_digest", row.body["tokenizer_digest"], wanted.tokenizer_digest))
    if not wanted.accept_experimental:
        pairs.append(("state", row.state, "READY"))
    return [
        Difference(field=field, model_value=str(actual), wanted_value=str(value))
        for field, actual, value in pairs
        if actual != value
    ]
