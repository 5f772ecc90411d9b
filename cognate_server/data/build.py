"""From a plan to a stream and its manifest: `build_stream`.

Rows are read once; documents wait on disk until the tokenizer has been trained on the training documents, and are then
encoded into mapped files. Memory does not grow with the number of rows. The same plan, settings and files give the same
stream, bit for bit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from cognate_server.data.corpus import Corpus, CorpusWriter
from cognate_server.data.curriculum import Curriculum
from cognate_server.data.processor import (
    DEFAULT_DISTRACTORS,
    DEFAULT_VALIDATION_SHARE,
    CognateDatasetProcessor,
    Document,
)
from cognate_server.data.sources import DatasetShare, Source, SourceSettings, resolve
from cognate_server.data.stream import CognateTokenStream
from cognate_server.data.tokenizer import VOCABULARY, CognateTokenizer
from cognateforge.exceptions import DataUnavailableError
from training_common.attempt import Json
from training_common.findings import ProcessingReport

# BPE merges settle early: 8 MB of text train in about two seconds, and all of HotpotQA would take minutes.
_TOKENIZER_TEXT_BYTES = 8 * 1024 * 1024
# So many documents, or so much text where they are long, are encoded together.
_ENCODE_DOCUMENTS = 512
_ENCODE_TEXT_CHARS = 4 * 1024 * 1024
# Problems that whole-answer scores are taken on, for each set.
_HELD_OUT_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What a job wants to read. No datasets means both kinds of problem in equal shares, real ones where they are."""

    seed: int
    batch_size: int
    sequence_length: int
    datasets: tuple[DatasetShare, ...] = ()
    distractors: int = DEFAULT_DISTRACTORS
    curriculum: Curriculum | None = None
    validation_share: float = DEFAULT_VALIDATION_SHARE


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """What became of one source."""

    source: Source
    share: float
    report: ProcessingReport
    documents: dict[str, int]
    tokens: dict[str, int]

    def to_json(self) -> dict[str, Json]:
        """Return the manifest's entry."""
        source = self.source
        return {
            "name": source.dataset.value,
            "kind": source.kind.value,
            "origin": source.origin,
            "licence": source.licence,
            "note": source.note,
            "digest": source.digest,
            "files": [asdict(file) for file in source.files],
            "share": self.share,
            "documents": dict(self.documents),
            "tokens": dict(self.tokens),
            "report": self.report.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """All that tells which data a model was trained on."""

    plan: DataPlan
    sources: tuple[SourceManifest, ...]
    tokenizer_digest: str
    tokenizer_learned: int
    stream_digest: str

    def to_json(self) -> dict[str, Json]:
        """Return the manifest as it is published."""
        return {
            "seed": self.plan.seed,
            "distractors": self.plan.distractors,
            "curriculum": None if self.plan.curriculum is None else dict(self.plan.curriculum.to_json()),
            "validation_share": self.plan.validation_share,
            "sources": [source.to_json() for source in self.sources],
            "tokenizer": {
                "digest": self.tokenizer_digest,
                "vocabulary": VOCABULARY,
                "learned": self.tokenizer_learned,
            },
            "stream_digest": self.stream_digest,
        }


def build_stream(
    plan: DataPlan, settings: SourceSettings, *, tokenizer_file: Path | None = None, folder: Path | None = None
) -> tuple[CognateTokenStream, DataManifest]:
    """Read, check, tokenize and pack what a plan names.

    tokenizer_file: loaded where it exists, so that a later attempt keeps its job's tokenizer; otherwise written.
    folder: on whose disk documents and tokens lie, in files without a name; None means the system's temporary folder.

    Errors: DataUnavailableError, when a set is not to be had or has no usable rows; InvalidFieldError.
    """
    sources = resolve(plan.datasets, settings)
    processor = CognateDatasetProcessor(distractors=plan.distractors, folder=folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        spool = _Spool(file)
        intakes = [_take_in(source, processor, spool, plan.validation_share) for source, _ in sources]
        tokenizer = _tokenizer(spool, tokenizer_file)
        corpora = _encode(spool, tokenizer, {source.dataset.value for source, _ in sources}, folder)
    train, validation = (
        [corpora[source.dataset.value, held_out] for source, _ in sources] for held_out in (False, True)
    )
    weights = [weight for _, weight in sources]
    stream = CognateTokenStream(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        weights=weights,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        seed=plan.seed,
        held_out=[document for intake in intakes for document in intake.held_out],
        curriculum=plan.curriculum,
    )
    entries = tuple(
        SourceManifest(
            source=intake.source,
            share=weight / sum(weights),
            report=intake.report,
            documents={"train": one.documents, "validation": other.documents},
            tokens={"train": len(one.tokens), "validation": len(other.tokens)},
        )
        for intake, weight, one, other in zip(intakes, weights, train, validation, strict=True)
    )
    manifest = DataManifest(
        plan=plan,
        sources=entries,
        tokenizer_digest=tokenizer.digest,
        tokenizer_learned=tokenizer.learned,
        stream_digest=stream.digest,
    )
    return stream, manifest


@dataclass
class _Intake:
    source: Source
    report: ProcessingReport = field(default_factory=ProcessingReport)
    held_out: list[Document] = field(default_factory=list)
    train: int = 0


@dataclass(frozen=True, slots=True)
class _Spooled:
    source: str
    validation: bool
    key: bytes
    difficulty: int
    text: str


class _Spool:
    """Documents on their way to the tokenizer, one JSON line each."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.train_bytes = 0

    def add(self, document: Document, *, validation: bool) -> None:
        entry = [document.source, validation, document.key.hex(), document.difficulty, document.text]
        line = json.dumps(entry).encode("ascii")
        self._file.write(line + b"\n")
        self.train_bytes += 0 if validation else len(line)

    def read(self) -> Iterator[_Spooled]:
        self._file.seek(0)
        for line in self._file:
            source, validation, key, difficulty, text = json.loads(line)
            yield _Spooled(source, validation, bytes.fromhex(key), difficulty, text)


def _take_in(source: Source, processor: CognateDatasetProcessor, spool: _Spool, share: float) -> _Intake:
    intake = _Intake(source)
    for document in processor.documents(source, intake.report):
        validation = document.is_validation(share)
        spool.add(document, validation=validation)
        intake.train += not validation
        if validation and len(intake.held_out) < _HELD_OUT_DOCUMENTS:
            intake.held_out.append(document)
    if not intake.train:
        first = f"; the first finding: {intake.report.findings[0]}" if intake.report.findings else ""
        raise DataUnavailableError(
            f"{source.dataset} ({source.origin}) has no document to train on: {intake.report.rows_read} rows read, "
            f"{intake.report.rows_refused} refused{first}"
        )
    return intake


def _tokenizer(spool: _Spool, file: Path | None) -> CognateTokenizer:
    if file is not None and file.exists():
        return CognateTokenizer.load(file)
    sampled = min(1.0, _TOKENIZER_TEXT_BYTES / max(1, spool.train_bytes))
    tokenizer = CognateTokenizer.train(
        document.text
        for document in spool.read()
        if not document.validation and int.from_bytes(document.key[8:], "big") < sampled * 2**64
    )
    if file is not None:
        tokenizer.save(file)
    return tokenizer


def _encode(
    spool: _Spool, tokenizer: CognateTokenizer, names: set[str], folder: Path | None
) -> Mapping[tuple[str, bool], Corpus]:
    """Return the training (False) and the validation corpus (True) of every name."""
    writers = {(name, held_out): CorpusWriter(name, folder) for name in names for held_out in (False, True)}
    for documents in _portions(spool.read()):
        encoded = tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            writer = writers[document.source, document.validation]
            writer.add([tokenizer.bos_id, *ids, tokenizer.eos_id], difficulty=document.difficulty)
    return {key: writer.corpus() for key, writer in writers.items()}


def _portions(documents: Iterator[_Spooled]) -> Iterator[list[_Spooled]]:
    portion: list[_Spooled] = []
    chars = 0
    for document in documents:
        portion.append(document)
        chars += len(document.text)
        if len(portion) == _ENCODE_DOCUMENTS or chars >= _ENCODE_TEXT_CHARS:
            yield portion
            portion, chars = [], 0
    if portion:
        yield portion
