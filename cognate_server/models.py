"""Foundation models as the registry holds them: look-up by name, and the handshake with an agent architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cognateforge.exceptions import ModelNotFoundError
from cognateforge.exchange.v1 import model_pb2 as pb
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow

FAMILY = "cognate-25m"


Kind = pb.MismatchKind

# The parts of an architecture, by their names in contract and manifest.
ARCHITECTURE: dict[str, Kind.ValueType] = {
    "name": Kind.MISMATCH_KIND_ARCHITECTURE_NAME,
    "fingerprint": Kind.MISMATCH_KIND_FINGERPRINT,
    "parameter_count": Kind.MISMATCH_KIND_PARAMETER_COUNT,
    "act_version": Kind.MISMATCH_KIND_ACT_VERSION,
    "ltm_version": Kind.MISMATCH_KIND_LTM_VERSION,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One part that an agent architecture asked about, as the model has it and as it was wanted."""

    kind: Kind.ValueType
    field: str
    model_value: str
    wanted_value: str

    @property
    def fits(self) -> bool:
        """Whether the model is what was asked for."""
        return self.model_value == self.wanted_value


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


def compare(row: ArtifactRow, wanted: Wanted) -> list[Comparison]:
    """Return every part that was asked about, in the order of its kind."""
    return [
        Comparison(kind=kind, field=field, model_value=str(actual), wanted_value=str(value))
        for kind, field, actual, value in _asked(row, wanted)
    ]


def _asked(row: ArtifactRow, wanted: Wanted) -> Iterator[tuple[Kind.ValueType, str, object, object]]:
    has = row.body["architecture"]
    for part, kind in ARCHITECTURE.items():
        if value := wanted.architecture[part]:
            yield kind, f"architecture.{part}", has[part], value
    if wanted.tokenizer_digest:
        yield Kind.MISMATCH_KIND_TOKENIZER, "tokenizer_digest", row.body["tokenizer_digest"], wanted.tokenizer_digest
    if not wanted.accept_experimental:
        yield Kind.MISMATCH_KIND_EXPERIMENTAL, "state", row.state, "READY"
