"""Turn rows into documents: `CognateDatasetProcessor`.

A document is a prompt and what follows it. Both forms end in `#### answer`:

    Question: <question>                            <title>: <paragraph>      (gold paragraphs and a few others)
    <step with <<expression=result>>>               Question: <question>
    #### <number>                                   <title>: <supporting sentence>
                                                    #### <answer>
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cognate_server.data.gsm8k import ArithmeticProblem, parse_problem
from cognate_server.data.hotpotqa import TwoHopQuestion, parse_question
from cognate_server.data.sources import Source
from training_common.findings import ProcessingReport, RowRefusedError, quote

# Gold paragraphs have about 140 words; two distractors double the text and make the reader choose.
DEFAULT_DISTRACTORS = 2
# One document in twenty validates.
DEFAULT_VALIDATION_SHARE = 0.05
ANSWER_MARK = "####"


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on. `key` is the same for documents that ask the same; the split rests on it."""

    source: str
    key: bytes
    prompt: str
    completion: str
    answer: str

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.completion

    def is_validation(self, share: float) -> bool:
        """Whether the document validates: decided by its key alone, so equal questions never part."""
        return int.from_bytes(self.key[:8], "big") < share * 2**64


class CognateDatasetProcessor:
    """Rows in, validated documents out, one at a time; each row that is not used is in the report.

    distractors: paragraphs without a supporting fact that a two-hop document keeps.
    """

    def __init__(self, *, distractors: int = DEFAULT_DISTRACTORS) -> None:
        self._distractors = distractors

    def documents(self, source: Source, report: ProcessingReport) -> Iterator[Document]:
        """Yield the documents of a source, without repeated questions."""
        seen: set[bytes] = set()
        make = self._arithmetic if source.dataset.arithmetic else self._twohop
        for row in source.rows():
            report.read()
            try:
                document = make(source.dataset, row.load())
            except RowRefusedError as error:
                report.refuse(error.at(row.file, row.line))
                continue
            if document.key in seen:
                report.leave_out("duplicate_question")
                continue
            seen.add(document.key)
            report.keep()
            yield document

    def _arithmetic(self, source: str, row: Mapping[str, object]) -> Document:
        return arithmetic_document(source, parse_problem(row))

    def _twohop(self, source: str, row: Mapping[str, object]) -> Document:
        return twohop_document(source, parse_question(row), distractors=self._distractors)


def arithmetic_document(source: str, problem: ArithmeticProblem) -> Document:
    """Return a word problem as a document. Errors: RowRefusedError when it has no reasoning."""
    if not problem.steps:
        raise RowRefusedError(
            "no_reasoning", field="answer", detail="nothing stands before '####'", remedy="write the steps, one a line"
        )
    return Document(
        source=source,
        key=_key(problem.question),
        prompt=f"Question: {problem.question}\n",
        completion="\n".join([*(step.text for step in problem.steps), f"{ANSWER_MARK} {problem.final}"]),
        answer=problem.final,
    )


def twohop_document(source: str, question: TwoHopQuestion, *, distractors: int) -> Document:
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
    context = [f"{page.title}: {page.text}\n" for page in question.with_distractors(distractors)]
    chain = [f"{fact.title}: {fact.sentence}" for fact in question.facts]
    return Document(
        source=source,
        key=_key(question.question),
        prompt="".join([*context, f"Question: {question.question}\n"]),
        completion="\n".join([*chain, f"{ANSWER_MARK} {question.answer}"]),
        answer=question.answer,
    )


def _key(question: str) -> bytes:
    return hashlib.sha256(" ".join(question.casefold().split()).encode("utf-8")).digest()[:16]
