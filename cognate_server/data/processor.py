"""Turn rows into documents: `CognateDatasetProcessor`.

A document is a prompt and what follows it. Both forms end in `#### answer`:

    Question: <question>                            <title>: <paragraph>      (gold paragraphs and a few others)
    <step with <<expression=result>>>               Question: <question>
    #### <number>                                   <title>: <supporting sentence>       (from question to answer)
                                                    #### <answer>
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cognate_server.data.difficulty import arithmetic_difficulty, twohop_difficulty
from cognate_server.data.gsm8k import ArithmeticProblem, parse_problem
from cognate_server.data.hotpotqa import TwoHopQuestion, parse_question
from cognate_server.data.seen import SeenKeys
from cognate_server.data.sources import Source
from training_common.findings import ProcessingReport, RowRefusedError, quote

# Gold paragraphs have about 140 words; two distractors double the text and make the reader choose.
DEFAULT_DISTRACTORS = 2
# One document in twenty validates.
DEFAULT_VALIDATION_SHARE = 0.05
ANSWER_MARK = "####"


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on.

    key: the same for documents that ask the same; the split rests on it. row_key: the row's own name, empty where rows
    have none. difficulty: 0 to 65,535, higher is harder; see `cognate_server.data.difficulty`.
    """

    source: str
    key: bytes
    prompt: str
    completion: str
    answer: str
    difficulty: int = 0
    row_key: str = ""

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.completion

    def is_validation(self, share: float) -> bool:
        """Whether the document validates: decided by its key alone, so equal questions never part."""
        return int.from_bytes(self.key[:8], "big") < share * 2**64


class CognateDatasetProcessor:
    """Rows in, validated documents out, one at a time; each row that is not used is in the report.

    distractors: paragraphs without a supporting fact that a two-hop document keeps. distractor_seed: which ones; apart
    from a job's seed, so that jobs with unlike seeds still share documents and tokenizer.
    folder: on whose disk the questions seen so far are kept; None means the system's temporary folder.
    """

    def __init__(
        self, *, distractors: int = DEFAULT_DISTRACTORS, distractor_seed: int = 0, folder: Path | None = None
    ) -> None:
        if distractors < 0:
            raise ValueError(f"distractors must be at least 0, got {distractors}")
        self._distractors = distractors
        self._distractor_seed = distractor_seed
        self._folder = folder

    def documents(self, source: Source, report: ProcessingReport) -> Iterator[Document]:
        """Yield the documents of a source, without repeated rows and questions."""
        make = self._arithmetic if source.dataset.arithmetic else self._twohop
        with SeenKeys(self._folder) as seen:
            for row in source.rows():
                report.read()
                try:
                    document = make(source.dataset, row.load())
                except RowRefusedError as error:
                    report.refuse(error.at(row.file, row.line))
                    continue
                if repeated := _repeated(document, seen):
                    report.leave_out(repeated)
                    continue
                report.keep()
                yield document

    def _arithmetic(self, source: str, row: Mapping[str, object]) -> Document:
        return arithmetic_document(source, parse_problem(row))

    def _twohop(self, source: str, row: Mapping[str, object]) -> Document:
        return twohop_document(
            source, parse_question(row), distractors=self._distractors, distractor_seed=self._distractor_seed
        )


def _repeated(document: Document, seen: SeenKeys) -> str:
    """Return why a document repeats an earlier one, or nothing."""
    if document.row_key and not seen.add(b"row" + hashlib.sha256(document.row_key.encode("utf-8")).digest()[:16]):
        return "duplicate_id"
    return "" if seen.add(document.key) else "duplicate_question"


def arithmetic_document(source: str, problem: ArithmeticProblem) -> Document:
    """Return a word problem as a document. Errors: RowRefusedError when it has no reasoning."""
    if not problem.steps:
        raise RowRefusedError(
            "no_reasoning", field="answer", detail="nothing stands before '####'", remedy="write the steps, one a line"
        )
    prompt = f"Question: {problem.question}\n"
    completion = "\n".join([*(step.text for step in problem.steps), f"{ANSWER_MARK} {problem.final}"])
    return Document(
        source=source,
        key=_key(problem.question),
        prompt=prompt,
        completion=completion,
        answer=problem.final,
        difficulty=arithmetic_difficulty(problem, prompt + completion),
    )


def twohop_document(source: str, question: TwoHopQuestion, *, distractors: int, distractor_seed: int = 0) -> Document:
    """Return a two-hop question as a document: context, question, supporting facts as a chain, answer.

    Errors: RowRefusedError when no supporting fact holds the answer, so that the chain leads nowhere.
    """
    if not question.answer_is_supported:
        raise RowRefusedError(
            "answer_not_supported",
            field="supporting_facts",
            detail=f"no supporting sentence holds the answer {quote(question.answer)}",
            remedy="name the sentence that the answer stands in",
        )
    pages = question.with_distractors(distractors, seed=distractor_seed)
    context = [f"{page.title}: {page.text}\n" for page in pages]
    prompt = "".join([*context, f"Question: {question.question}\n"])
    chain = [f"{fact.title}: {fact.sentence}" for fact in question.chain]
    completion = "\n".join([*chain, f"{ANSWER_MARK} {question.answer}"])
    return Document(
        source=source,
        key=_key(question.question),
        prompt=prompt,
        completion=completion,
        answer=question.answer,
        difficulty=twohop_difficulty(question, prompt + completion),
        row_key=question.key,
    )


def _key(question: str) -> bytes:
    return hashlib.sha256(" ".join(question.casefold().split()).encode("utf-8")).digest()[:16]
