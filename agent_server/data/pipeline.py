"""From the rows of a source to examples, the same way for every task: check, divide, remove repeats, make examples.

A task says how one row is checked and what becomes of sound ones (`Form`); all that tasks share is here: the report,
the splits, the bounds on memory, and the share of refused rows beyond which a set is not used.

Splits are train, validation and test in their usual spellings, as a row's field, a file's name or the hub tells them.
Where nothing does, a row's group decides by its hash. No group is in two splits, and what occurs in several splits
stays in the one it measures in: test before validation before training.
"""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from agent_server.data.examples import DataManifest, PreparedData
from agent_server.data.source import Source, SourceRow, digest_of
from cognateforge.exceptions import DataUnavailableError, FieldViolation
from training_common.attempt import Json
from training_common.findings import ProcessingReport, RowRefusedError, quote

# Rows are held in memory to find repeats. The largest real set has 23,700 rows, of at most 136 characters.
MAX_ROWS = 500_000
MAX_CHARS = 1 << 27
# Shares of rows whose split nothing tells.
_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.1
# Findings that an error's text quotes, and that it names one by one.
_QUOTED_FINDINGS = 3
_TOLD_FINDINGS = 10
_QUOTED_LABELS = 5

_SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "train_dev": "train_dev",
}  # fmt: skip
_SPLIT_FIELDS = ("split", "official_split")
_SPLIT_ORDER = ("test", "validation", "train")

C = TypeVar("C")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Sound(Generic[C]):
    """A row that can be used.

    key: equal for rows that ask the same. answer: what they are told; unlike answers to one key contradict each other.
    group: rows of one group are never in two splits. split: "" where nothing says. chars: about what it takes.
    """

    content: C
    key: str
    group: str
    chars: int
    split: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sound row that the plan excludes."""

    reason: str


@dataclass(frozen=True, slots=True)
class Placed(Generic[C]):
    """A sound row with its place, and digests of what it is compared by."""

    content: C
    file: str
    line: int
    split: str
    key: bytes
    group: bytes
    answer: bytes


Splits = Mapping[str, list[Placed[C]]]


@dataclass(frozen=True, kw_only=True)
class Made(Generic[E]):
    """Examples by split, the labels that their numbers mean, and what the task has to tell of the set."""

    examples: Mapping[str, Sequence[E]]
    labels: tuple[str, ...] = ()
    facts: Mapping[str, Json] = field(default_factory=dict)


class UnfitError(ValueError):
    """What is left of a set makes no task. The text goes on after the set's name."""


class Form(abc.ABC, Generic[C, E]):
    """How the rows of a task become examples.

    companions: patterns of files that stand beside rows and are none. reads_companions: whether examples depend on
    them. contradiction: the word for unlike answers.
    """

    companions: tuple[str, ...] = ()
    reads_companions = False
    contradiction = "contradicting_label"

    def read_companions(self, files: Mapping[str, Path]) -> None:
        """Read what stands beside the rows, before the first one."""

    @abc.abstractmethod
    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[C] | LeftOut:
        """Return a row as it will be used. Errors: RowRefusedError."""

    @abc.abstractmethod
    def make(self, splits: Splits[C], report: ProcessingReport) -> Made[E]:
        """Return the examples of the rows that are left; it may take rows out, for a reason in the report.

        Errors: UnfitError.
        """


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what is wrong with the rows. max_refused_share: of all rows that were read."""

    max_refused_share: float = 0.1


def prepare_rows(
    source: Source,
    form: Form[C, E],
    *,
    wish: Mapping[str, Json],
    limits: Limits,
    each_row: Callable[[], None],
    report: ProcessingReport,
    needed: Sequence[str] = ("train", "test"),
) -> PreparedData[E]:
    """Read, check, divide and make examples. `each_row` is called at every row, and may raise to end it.

    wish: what was asked for, for the manifest. needed: splits that must have rows.
    Errors: DataUnavailableError, when too many rows are refused or what is left does not make a task.
    """
    digest = hashlib.sha256()
    if form.reads_companions:
        form.read_companions(source.companions)
    kept = _bounded(_checked(source.rows(each_row, digest), form, report))
    divided, how = _divided(list(kept))
    if not report.rows_read:
        raise unusable(source.name, "is empty; write its rows, or name another set", report)
    splits = _without_repeats(divided, report, form.contradiction)
    require_few_refused(source.name, report, limits)
    try:
        made = form.make(splits, report)
    except UnfitError as error:
        raise unusable(source.name, str(error), report) from None
    rows = {split: len(splits[split]) for split in reversed(_SPLIT_ORDER)}
    report.keep(sum(rows.values()))
    require_few_refused(source.name, report, limits)
    for split in needed:
        if not made.examples[split]:
            raise unusable(source.name, f"has no {split} rows; add some, or leave the split out of every row", report)
    entries = source.entries(companions=form.reads_companions)
    counts: dict[str, Json] = {split: len(made.examples[split]) for split in rows}
    facts: dict[str, Json] = {"examples": counts, "test_rows": how, **made.facts}
    manifest = DataManifest(
        name=source.name,
        kind=source.kind,
        source=dict(wish),
        files=entries,
        digest=digest_of(entries, digest),
        labels=made.labels,
        rows=rows,
        report=report,
        facts=facts,
    )
    examples = {split: tuple(made.examples[split]) for split in rows}
    return PreparedData(name=source.name, labels=made.labels, manifest=manifest, **examples)


def _checked(rows: Iterator[SourceRow], form: Form[C, E], report: ProcessingReport) -> Iterator[tuple[Placed[C], int]]:
    for found in rows:
        report.read()
        row = found.row
        try:
            sound = form.check(row.load(), found)
        except RowRefusedError as error:
            report.refuse(error.at(row.file, row.line))
            continue
        except RecursionError:
            report.refuse(_too_deep().at(row.file, row.line))
            continue
        if isinstance(sound, LeftOut):
            report.leave_out(sound.reason)
            continue
        key, group, answer = (hash_of(text) for text in (sound.key, sound.group, sound.answer))
        yield Placed(sound.content, row.file, row.line, sound.split, key, group, answer), sound.chars


def _bounded(rows: Iterator[tuple[Placed[C], int]]) -> Iterator[Placed[C]]:
    """Yield the rows as long as a worker can hold them. Errors: DataUnavailableError."""
    chars = 0
    for number, (row, size) in enumerate(rows, start=1):
        chars += size
        if number > MAX_ROWS or chars > MAX_CHARS:
            description = (
                f"the set has more than {MAX_ROWS} usable rows or {MAX_CHARS} characters of text (at {row.file}, "
                f"row {row.line}): choose fewer labels or domains, or use a smaller set"
            )
            raise DataUnavailableError(description, violations=[FieldViolation(field="", description=description)])
        yield row


def _divided(rows: list[Placed[C]]) -> tuple[dict[str, list[Placed[C]]], str]:
    """Return the rows by split, and how the test rows were come by: "named", "halved_validation" or "hashed"."""
    divided: dict[str, list[Placed[C]]] = {split: [] for split in _SPLIT_ORDER}
    named = {row.split for row in rows}
    only_train = named == {"train"}
    for row in rows:
        divided[_hashed_split(row.group) if only_train else _split(row)].append(row)
    if divided["test"]:
        return divided, "named" if "test" in named else "hashed"
    # A set that names training and validation rows alone is measured on half of the latter.
    halves: dict[bool, list[Placed[C]]] = {True: [], False: []}
    for row in divided["validation"]:
        halves[row.group[8] < 128].append(row)
    return divided | {"test": halves[True], "validation": halves[False]}, "halved_validation"


def _split(row: Placed[C]) -> str:
    if row.split == "train_dev":  # training and validation rows that nobody has told apart
        return "validation" if _place(row.group) < _VALIDATION_SHARE else "train"
    return row.split or _hashed_split(row.group)


def _without_repeats(
    divided: Mapping[str, Sequence[Placed[C]]], report: ProcessingReport, contradiction: str
) -> dict[str, list[Placed[C]]]:
    """Return the rows by split, each key once, and each group in one split: test, else validation, else training."""
    answers: dict[bytes, bytes] = {}
    owners: dict[bytes, str] = {}
    kept: dict[str, list[Placed[C]]] = {}
    for split in _SPLIT_ORDER:
        kept[split] = []
        for row in divided[split]:
            if row.key in answers:
                report.leave_out("repeated_text" if answers[row.key] == row.answer else contradiction)
            elif owners.setdefault(row.group, split) != split:
                report.leave_out("related_to_measured")
            else:
                answers[row.key] = row.answer
                kept[split].append(row)
    return kept


def require_few_refused(name: str, report: ProcessingReport, limits: Limits) -> None:
    """Raise DataUnavailableError where too many rows cannot be used."""
    refused, read = report.rows_refused, report.rows_read
    if refused > limits.max_refused_share * read:
        share = (
            f"{refused} of {read} rows are refused ({refused / read:.1%}, at most {limits.max_refused_share:.1%} may)"
        )
        raise unusable(
            name, f"is not used, because {share}; correct them, or raise data_limits.max_refused_share", report
        )


def require_labels(found: Iterable[str], labels: Sequence[str]) -> None:
    """Raise UnfitError where a set has labels that the set it goes with lacks."""
    foreign = sorted(set(found) - set(labels))
    if foreign:
        named = ", ".join(quote(label) for label in foreign[:_QUOTED_LABELS])
        raise UnfitError(
            f"has {len(foreign)} labels that the set it goes with lacks ({named}); leave out their rows, or add rows "
            "of these labels to that set"
        )


def unusable(name: str, problem: str, report: ProcessingReport) -> DataUnavailableError:
    """Return the error for a set that makes no task: with its counts, and the first findings with their remedies."""
    counts = f"{report.rows_read} rows read, {report.rows_refused} refused, {report.rows_left_out} left out"
    reasons, left_out = counted(report.refused), counted(report.left_out)
    told = [counts, *([f"refused: {reasons}"] if reasons else []), *([f"left out: {left_out}"] if left_out else [])]
    first = [str(finding) for finding in report.findings[:_QUOTED_FINDINGS]]
    message = f"{name} {problem} ({'; '.join(told)})" + (f"; the first findings: {' | '.join(first)}" if first else "")
    told = [problem, *map(str, report.findings[:_TOLD_FINDINGS])]
    return DataUnavailableError(message, violations=[FieldViolation(field="", description=one) for one in told])


def counted(reasons: Mapping[str, int]) -> str:
    """Return counts by reason as people read them: "blank 2, not_json 1"."""
    return ", ".join(f"{reason} {rows}" for reason, rows in sorted(reasons.items()))


def split_of(content: Mapping[str, object], found: SourceRow) -> str:
    """Return the split that a row or its file names, "" where neither does. Errors: RowRefusedError."""
    for name in _SPLIT_FIELDS:
        value = content.get(name)
        if value is not None:
            return known_split(value, name)
    return _SPLITS.get(found.split, "")


def known_split(value: object, field: str) -> str:
    """Return a split in this module's own spelling. Errors: RowRefusedError."""
    if isinstance(value, str) and value in _SPLITS:
        return _SPLITS[value]
    raise RowRefusedError(
        "unknown_value",
        field=field,
        detail=f"{quote(value)} is no split",
        remedy="write train, val or test, or leave it out of every row",
    )


def same_text(text: str) -> str:
    """Return what texts are compared by: without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def hash_of(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _place(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _hashed_split(group: bytes) -> str:
    place = _place(group)
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def _too_deep() -> RowRefusedError:
    return RowRefusedError("too_deep", detail="the row is nested too deeply", remedy="flatten or remove the row")
