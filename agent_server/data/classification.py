"""Prepare a classification set: `AgentDataProcessor`.

Rows are JSON objects with `text`, and `intent` or `label`; `split` and `domain` where the file has them. Splits are
train, val and test in their usual spellings; a file without them is split by the texts' hashes. A text that occurs in
several splits stays in the one it measures in: test before validation before training.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agent_server.data import intents
from cognateforge.exceptions import DataUnavailableError, FieldViolation, InvalidFieldError
from training_common.attempt import Json
from training_common.digests import canonical_json, sha256_file
from training_common.findings import ProcessingReport, RowRefusedError, quote
from training_common.rows import Row, checked_text, read_rows, text_field

# The longest text of the real set has 136 characters; longer ones are documents, not utterances.
MAX_TEXT_CHARS = 8_192
MAX_LABEL_CHARS = 128
# A head of more classes would outweigh its base model.
MAX_LABELS = 4_096
# Rows are held in memory to find repeats. The real set has 23,700 rows of at most 136 characters.
MAX_ROWS = 500_000
MAX_CHARS = 1 << 27
OUT_OF_SCOPE = "oos"
# Shares of a file that names no split.
_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.1

_SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
_SPLIT_ORDER = ("test", "validation", "train")
_FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

Example = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ClassificationSource:
    """Which rows to prepare.

    path: a file or folder below the data folder; None takes the generated set with `generator_seed`.
    max_rows_per_label: most training rows of each label; 0 for all. The choice follows the texts' hashes.
    labels, domains: keep only these; empty for all. A row without a domain belongs to none.
    """

    path: str | None = None
    generator_seed: int = 0
    include_out_of_scope: bool = False
    max_rows_per_label: int = 0
    labels: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgentDataManifest:
    """All that tells which data an agent was trained on."""

    name: str
    kind: str
    source: ClassificationSource
    files: tuple[dict[str, Json], ...]
    digest: str
    labels: tuple[str, ...]
    rows: dict[str, int]
    test_majority_share: float
    report: ProcessingReport

    def to_json(self) -> dict[str, Json]:
        """Return the manifest as it is published."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.source).items()},
            "files": list(self.files),
            "digest": self.digest,
            "labels": list(self.labels),
            "rows": dict(self.rows),
            "test_majority_share": self.test_majority_share,
            "report": self.report.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Examples ready to train on: text and number of the label."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    manifest: AgentDataManifest

    @property
    def report(self) -> ProcessingReport:
        """What became of every row."""
        return self.manifest.report

    @property
    def test_majority_share(self) -> float:
        """Accuracy on the test rows of always answering their most frequent label: the floor to beat."""
        return self.manifest.test_majority_share


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A checked row; `split` is empty where the file names none."""

    text: str
    label: str
    split: str
    domain: str
    row: Row

    @property
    def key(self) -> str:
        """What texts are compared by: without case and punctuation."""
        return " ".join(re.findall(r"\w+", self.text.casefold())) or self.text

    @property
    def out_of_scope(self) -> bool:
        return self.label == OUT_OF_SCOPE


class AgentDataProcessor:
    """Rows of a task-specific set in, examples out; each row that is not used is in the report."""

    def __init__(self, *, folder: Path | None = None) -> None:
        self._folder = folder

    def require_available(self, source: ClassificationSource) -> None:
        """Fail early, before a job is queued, where the file is not there.

        Errors: DataUnavailableError, InvalidFieldError.
        """
        if source.path is not None:
            self._files(source.path)

    def process(
        self, source: ClassificationSource, *, each_row: Callable[[], None] = lambda: None
    ) -> ClassificationData:
        """Read, check, filter, split and label. `each_row` is called at every row, and may raise to end it.

        Errors: DataUnavailableError, when the file is missing or its usable rows do not make a task; InvalidFieldError.
        """
        report, digest = ProcessingReport(), hashlib.sha256()
        paths = [] if source.path is None else self._files(source.path)
        name = intents.NAME if source.path is None else _set_name(source.path)
        rows = _generated(source.generator_seed) if source.path is None else _read(paths)
        checked = _checked(rows, report, digest, each_row)
        kept = _without_repeats(_bounded(_filtered(checked, source, report)), report)
        splits = _labelled(kept, source, report)
        labels = tuple(sorted({row.label for row in splits["train"]}))
        _require_task(name, splits, labels, report)
        numbers = {label: number for number, label in enumerate(labels)}
        examples = {split: tuple((row.text, numbers[row.label]) for row in rows) for split, rows in splits.items()}
        files = tuple(_file_entry(path) for path in paths)
        manifest = AgentDataManifest(
            name=name,
            kind="generated" if source.path is None else "folder",
            source=source,
            files=files,
            digest=str(files[0]["sha256"]) if len(files) == 1 else f"sha256:{digest.hexdigest()}",
            labels=labels,
            rows={split: len(rows) for split, rows in splits.items()},
            test_majority_share=max(Counter(row.label for row in splits["test"]).values()) / len(splits["test"]),
            report=report,
        )
        return ClassificationData(name=name, labels=labels, manifest=manifest, **examples)

    def _files(self, path: str) -> list[Path]:
        """Return the files that a request's path names, none of them outside the data folder."""
        if self._folder is None:
            raise _unavailable("no data folder is set on this server, so it has no files; use generated rows")
        root = self._folder.resolve()
        try:
            found = (root / path).resolve()
            inside = found.is_relative_to(root)
        except (OSError, ValueError):  # a loop of links, or a zero byte
            inside = False
        if not inside:
            raise _leads_out(path)
        if found.is_dir():
            files = sorted(file for file in found.iterdir() if file.is_file() and file.name.endswith(_FILE_ENDINGS))
            for file in files:
                if not file.resolve().is_relative_to(root):
                    raise _leads_out(f"{path}/{file.name}")
            if files:
                return files
        elif found.is_file():
            return [found]
        raise _unavailable(f"the data folder has no {quote(path)} with rows; add the file or use generated rows")


def _unavailable(description: str) -> DataUnavailableError:
    return DataUnavailableError(description, violations=[FieldViolation(field="path", description=description)])


def _leads_out(path: str) -> InvalidFieldError:
    description = f"{quote(path)} leads out of the data folder"
    return InvalidFieldError(description, violations=[FieldViolation(field="path", description=description)])


def _set_name(path: str) -> str:
    """Return a set's name out of its path: "agent/clinc150/data_full.jsonl" -> "clinc150/data_full"."""
    parts = [part for part in path.split("/") if part]
    parts[-1] = parts[-1].removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    return "/".join(parts[-2:])[:64]


def _file_entry(path: Path) -> dict[str, Json]:
    return {"name": path.name, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}


def _read(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from read_rows(path)


def _generated(seed: int) -> Iterator[Row]:
    for line, content in enumerate(intents.generate_intents(seed=seed), start=1):
        yield Row(intents.NAME, line, content)


def _checked(
    rows: Iterator[Row], report: ProcessingReport, digest: hashlib._Hash, each_row: Callable[[], None]
) -> Iterator[_Labelled]:
    for row in rows:
        each_row()
        report.read()
        try:
            checked = _check(row)
        except RowRefusedError as error:
            report.refuse(error.at(row.file, row.line))
            continue
        digest.update(canonical_json([checked.text, checked.label, checked.split, checked.domain]))
        yield checked


def _check(row: Row) -> _Labelled:
    content = row.load()
    name = "intent" if "intent" in content else "label"
    label = text_field(content, name, max_chars=MAX_LABEL_CHARS).strip()
    split = _split(content)
    text = text_field(content, "text", max_chars=MAX_TEXT_CHARS).strip()
    domain = content.get("domain")
    domain = "" if domain is None else checked_text(domain, "domain", max_chars=MAX_LABEL_CHARS, blank=True)
    if split.startswith("oos_"):
        split, label = split.removeprefix("oos_"), OUT_OF_SCOPE
    return _Labelled(text, label, _SPLITS[split] if split else "", domain, row)


def _split(content: Mapping[str, object]) -> str:
    value = content.get("split")
    if value is None:
        return ""
    if not isinstance(value, str) or value.removeprefix("oos_") not in _SPLITS:
        raise RowRefusedError(
            "unknown_value",
            field="split",
            detail=f"{quote(value)} is no split",
            remedy="write train, val or test, or leave it out of every row",
        )
    return value


def _filtered(rows: Iterator[_Labelled], source: ClassificationSource, report: ProcessingReport) -> Iterator[_Labelled]:
    labels, domains = frozenset(source.labels), frozenset(source.domains)
    for row in rows:
        if row.out_of_scope:
            # Rows of no label have no domain either, so the filters are not for them.
            if source.include_out_of_scope:
                yield row
            else:
                report.leave_out("out_of_scope")
        elif labels and row.label not in labels:
            report.leave_out("other_label")
        elif domains and row.domain not in domains:
            report.leave_out("other_domain")
        else:
            yield row


def _bounded(rows: Iterator[_Labelled]) -> Iterator[_Labelled]:
    """Yield the rows as long as a worker can hold them. Errors: DataUnavailableError."""
    chars = 0
    for number, row in enumerate(rows, start=1):
        chars += len(row.text)
        if number > MAX_ROWS or chars > MAX_CHARS:
            raise _unavailable(
                f"the set has more than {MAX_ROWS} usable rows or {MAX_CHARS} characters of text (at {row.row.file}, "
                f"row {row.row.line}): choose fewer labels or domains, or use a smaller set"
            )
        yield row


def _without_repeats(rows: Iterator[_Labelled], report: ProcessingReport) -> dict[str, list[_Labelled]]:
    """Return the rows by split, each text once: in its test row if it has one, else validation, else training."""
    by_split: dict[str, list[_Labelled]] = {split: [] for split in _SPLIT_ORDER}
    for row in rows:
        by_split[row.split or _hashed_split(row.key)].append(row)
    seen: dict[str, _Labelled] = {}
    for split in _SPLIT_ORDER:
        kept = []
        for row in by_split[split]:
            first = seen.setdefault(row.key, row)
            if first is row:
                kept.append(row)
            elif first.label != row.label:
                report.leave_out("contradicting_label")
            else:
                report.leave_out("repeated_text")
        by_split[split] = kept
    return by_split


def _labelled(
    by_split: dict[str, list[_Labelled]], source: ClassificationSource, report: ProcessingReport
) -> dict[str, list[_Labelled]]:
    """Return the splits as they will be used: training rows within the bound, no label that training lacks."""
    most = source.max_rows_per_label
    if most:
        by_label: dict[str, list[_Labelled]] = {}
        for row in by_split["train"]:
            by_label.setdefault(row.label, []).append(row)
        chosen = {id(row) for rows in by_label.values() for row in sorted(rows, key=lambda row: _hash(row.key))[:most]}
        report.leave_out("max_rows_per_label", len(by_split["train"]) - len(chosen))
        by_split["train"] = [row for row in by_split["train"] if id(row) in chosen]
    known = {row.label for row in by_split["train"]}
    for split in ("validation", "test"):
        unknown = [row for row in by_split[split] if row.label not in known]
        for row in unknown:
            report.refuse(_untrained(row).at(row.row.file, row.row.line))
        by_split[split] = [row for row in by_split[split] if row.label in known]
    report.keep(sum(len(rows) for rows in by_split.values()))
    return by_split


def _untrained(row: _Labelled) -> RowRefusedError:
    return RowRefusedError(
        "label_without_training_rows",
        field="intent",
        detail=f"no training row has the label {quote(row.label)}",
        remedy="add training rows of this label, or correct it",
    )


def _require_task(
    name: str, splits: Mapping[str, Sequence[_Labelled]], labels: Sequence[str], report: ProcessingReport
) -> None:
    """Raise DataUnavailableError unless there is something to choose between and something to measure on."""
    first = f"; the first finding: {report.findings[0]}" if report.findings else ""
    counts = f"{report.rows_read} rows read, {report.rows_refused} refused, {report.rows_left_out} left out{first}"
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataUnavailableError(f"{name} has {len(labels)} labels; 2 to {MAX_LABELS} are needed ({counts})")
    if not splits["test"]:
        raise DataUnavailableError(f"{name} has no test rows; add some with the split 'test' ({counts})")


def _hashed_split(key: str) -> str:
    place = _hash(key) / 2**64
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
