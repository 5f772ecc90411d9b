"""Where rows come from: a folder in the settings, then the hub, then this project's own generator.

A set that a plan names is never replaced: GSM8K and HotpotQA come from the folder or the hub, or the plan fails. Only
a plan that names no set gets generated problems where the real ones are not to be had, and the manifest says so.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cognate_server.data.generate import generate_rows
from cognateforge.exceptions import DataUnavailableError, FieldViolation, InvalidFieldError
from training_common.digests import canonical_json, sha256_bytes, sha256_file
from training_common.hub import unbroken
from training_common.rows import Row, read_rows


class DatasetId(enum.StrEnum):
    """The sets that a plan may name."""

    GSM8K = "gsm8k"
    HOTPOTQA = "hotpotqa"
    FORGE_ARITHMETIC = "forge-arithmetic"
    FORGE_TWOHOP = "forge-twohop"

    @property
    def generated(self) -> bool:
        """Whether the rows are this project's own."""
        return self in (DatasetId.FORGE_ARITHMETIC, DatasetId.FORGE_TWOHOP)

    @property
    def arithmetic(self) -> bool:
        """Whether rows have GSM8K's form; otherwise HotpotQA's."""
        return self in (DatasetId.GSM8K, DatasetId.FORGE_ARITHMETIC)


class SourceKind(enum.StrEnum):
    """How rows were come by."""

    FOLDER = "folder"
    HUB = "hub"
    GENERATED = "generated"


@dataclass(frozen=True, kw_only=True)
class DatasetShare:
    """A set and its weight among the documents that are trained on."""

    dataset: DatasetId
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What a server allows its jobs to read.

    generated_rows: size of a generated set; 2,000 problems of each kind hold about 600,000 tokens.
    generator_seed: its own seed, so that jobs with unlike seeds still share data and tokenizer.
    """

    folder: Path | None = None
    hub: bool = False
    generated_rows: int = 2_000
    generator_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that was read; `name` is relative to the data folder."""

    name: str
    sha256: str
    size_bytes: int


@dataclass
class Source:
    """One resolved set. Iterate `rows` to the end before asking for the digest of rows that were never a file."""

    dataset: DatasetId
    kind: SourceKind
    licence: str
    origin: str
    files: tuple[SourceFile, ...] = ()
    note: str = ""
    open_rows: Callable[[], Iterator[Row]] = field(default=lambda: iter(()), repr=False)
    _rows_digest: str = field(default="", init=False)

    def rows(self) -> Iterator[Row]:
        """Yield every row; rows of the hub and the generator are hashed on the way."""
        digest = hashlib.sha256()
        for row in self.open_rows():
            if isinstance(row.content, Mapping):
                digest.update(_canonical(row.content))
            yield row
        self._rows_digest = f"sha256:{digest.hexdigest()}"

    @property
    def digest(self) -> str:
        """Digest over the files, or over the rows where there is no file."""
        if len(self.files) == 1:
            return self.files[0].sha256
        if self.files:
            return sha256_bytes(canonical_json([[file.name, file.sha256] for file in self.files]))
        return self._rows_digest


# The official names and those of common copies, in the order in which they are looked for.
_FILES: dict[DatasetId, tuple[str, ...]] = {
    DatasetId.GSM8K: ("gsm8k/train.jsonl", "gsm8k_train.jsonl"),
    DatasetId.HOTPOTQA: (
        "hotpotqa/train_distractor.jsonl",
        "hotpotqa/train.jsonl",
        "hotpotqa/hotpot_train_v1.1.json",
        "hotpot_train_v1.1.json",
        "hotpotqa_train.jsonl",
    ),
}
# path, configuration and split on the hub
_HUB: dict[DatasetId, tuple[str, str, str]] = {
    DatasetId.GSM8K: ("openai/gsm8k", "main", "train"),
    DatasetId.HOTPOTQA: ("hotpotqa/hotpot_qa", "distractor", "train"),
}
_LICENCES = {
    DatasetId.GSM8K: "MIT",
    DatasetId.HOTPOTQA: "CC-BY-SA-4.0",
    DatasetId.FORGE_ARITHMETIC: "Apache-2.0",
    DatasetId.FORGE_TWOHOP: "Apache-2.0",
}
# What a plan without sets gets: the real set first, its generated counterpart otherwise.
_AUTO = (
    (DatasetId.GSM8K, DatasetId.FORGE_ARITHMETIC),
    (DatasetId.HOTPOTQA, DatasetId.FORGE_TWOHOP),
)


def parse_share(name: str, weight: float = 1.0, *, field_name: str = "plan.datasets") -> DatasetShare:
    """Return the share for a set's name, also as the contract spells it (DATASET_GSM8K). Errors: InvalidFieldError."""
    spelled = name.removeprefix("DATASET_").lower().replace("_", "-")
    if spelled not in tuple(DatasetId):
        known = ", ".join(DatasetId)
        _invalid(field_name, f"{name[:64]!r} is no known set; the known ones are {known}")
    if not math.isfinite(weight) or weight <= 0:
        _invalid(field_name, f"the weight of {spelled} must be above 0, got {weight}")
    return DatasetShare(dataset=DatasetId(spelled), weight=weight)


def resolve(shares: Sequence[DatasetShare], settings: SourceSettings) -> list[tuple[Source, float]]:
    """Return a source and its weight for every share, or for both kinds of problem where a plan names none.

    Errors: DataUnavailableError for a named set that is not to be had; InvalidFieldError for one named twice.
    """
    if not shares:
        return [(_resolve_auto(real, generated, settings), 1.0) for real, generated in _AUTO]
    names = [share.dataset for share in shares]
    if len(set(names)) != len(names):
        _invalid("plan.datasets", "a set is named twice")
    return [(_resolve_one(share.dataset, settings), share.weight) for share in shares]


def require_available(shares: Sequence[DatasetShare], settings: SourceSettings) -> None:
    """Fail early, before a job is queued, where a named set cannot be read.

    Only looks for files and modules: whether the hub answers shows when the job starts.

    Errors: DataUnavailableError, naming every such set by its place in the plan.
    """
    violations = [
        FieldViolation(field=f"plan.datasets[{position}].dataset", description=reason)
        for position, share in enumerate(shares)
        if (reason := _why_unavailable(share.dataset, settings))
    ]
    if violations:
        raise DataUnavailableError("; ".join(v.description for v in violations), violations=violations)


def _why_unavailable(dataset: DatasetId, settings: SourceSettings) -> str:
    if dataset.generated or _find(dataset, settings.folder):
        return ""
    if not settings.hub:
        return _unavailable(dataset, settings).message
    if importlib.util.find_spec("datasets") is None:
        return f"the hub is allowed, but the package `datasets` is not installed, so {dataset} cannot be read"
    return ""


def _resolve_auto(real: DatasetId, generated: DatasetId, settings: SourceSettings) -> Source:
    try:
        return _resolve_one(real, settings)
    except DataUnavailableError as error:
        source = _generated(generated, settings)
        source.note = f"generated, because {error.message}"
        return source


def _resolve_one(dataset: DatasetId, settings: SourceSettings) -> Source:
    if dataset.generated:
        return _generated(dataset, settings)
    if found := _find(dataset, settings.folder):
        path, name = found
        try:
            file = SourceFile(name=name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
        except OSError as error:
            raise DataUnavailableError(f"{name} in the data folder cannot be read: {error.strerror}") from error
        return Source(
            dataset=dataset,
            kind=SourceKind.FOLDER,
            licence=_LICENCES[dataset],
            origin=name,
            files=(file,),
            open_rows=lambda: read_rows(path),
        )
    if not settings.hub:
        raise _unavailable(dataset, settings)
    return _hub(dataset)


def _find(dataset: DatasetId, folder: Path | None) -> tuple[Path, str] | None:
    """Return the set's file and its name within the folder."""
    if folder is None:
        return None
    names = (f"{name}{ending}" for name in _FILES[dataset] for ending in ("", ".gz"))
    return next(((folder / name, name) for name in names if (folder / name).is_file()), None)


def _generated(dataset: DatasetId, settings: SourceSettings) -> Source:
    rows, seed = settings.generated_rows, settings.generator_seed
    origin = f"{dataset}, {rows} rows of seed {seed}"
    return Source(
        dataset=dataset,
        kind=SourceKind.GENERATED,
        licence=_LICENCES[dataset],
        origin=origin,
        open_rows=lambda: _numbered(dataset, generate_rows(dataset, rows=rows, seed=seed)),
    )


def _hub(dataset: DatasetId) -> Source:
    """Open a set on the hub through `datasets`, which streams it: no row is kept. Code from the hub is never run."""
    path, configuration, split = _HUB[dataset]
    remedy = f"put the set into the data folder as {_FILES[dataset][0]}"
    try:
        import datasets

        streamed: Iterable[Mapping[str, object]] = datasets.load_dataset(
            path, configuration, split=split, streaming=True
        )
    except Exception as error:  # whatever a network and a foreign library can raise
        raise DataUnavailableError(f"the hub did not give {path} ({type(error).__name__}); {remedy}") from error
    return Source(
        dataset=dataset,
        kind=SourceKind.HUB,
        licence=_LICENCES[dataset],
        origin=f"{path}/{configuration}/{split}",
        open_rows=lambda: _numbered(path, unbroken(path, streamed, remedy=remedy)),
    )


def _numbered(name: str, rows: Iterable[Mapping[str, object]]) -> Iterator[Row]:
    for line, row in enumerate(rows, start=1):
        yield Row(name, line, row)


def _canonical(row: Mapping[str, object]) -> bytes:
    try:
        return canonical_json(row)
    except (
        TypeError,
        ValueError,
    ):  # not JSON, or half a surrogate pair: the row will be refused, and is hashed as seen
        return ascii(row).encode("ascii")


def _unavailable(dataset: DatasetId, settings: SourceSettings, field: str = "plan.datasets") -> DataUnavailableError:
    place = "no data folder is set" if settings.folder is None else f"the data folder has no {_FILES[dataset][0]}"
    counterpart = dict(_AUTO)[dataset]
    message = (
        f"{place} and the hub is not allowed, so {dataset} cannot be read; add the file, allow the hub, or name "
        f"{counterpart}"
    )
    return DataUnavailableError(message, violations=[FieldViolation(field=field, description=message)])


def _invalid(name: str, description: str) -> None:
    raise InvalidFieldError(f"{name}: {description}", violations=[FieldViolation(field=name, description=description)])
