"""Arithmetic word problems in GSM8K's form: question, steps with `<<expression=result>>`, `#### final`.

Every annotation is recomputed with exact rationals. Binary floats would fail on right ones (0.1 + 0.2 = 0.3), and a
row that claims a wrong result would teach one.
Source: Cobbe et al. 2021, arXiv:2110.14168.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from training_common.findings import RowRefusedError, quote
from training_common.rows import text_field

# The longest question and answer of the real set have 985 and 1,228 characters.
MAX_TEXT_CHARS = 16_384
# The longest real expression has about 60 characters. The bound also bounds the parser's depth.
MAX_EXPRESSION_CHARS = 256

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(//|[-+*/()]))", re.ASCII)
# What a step goes on with right after an annotation: the result once more, at times behind a currency sign.
_REPEATED = re.compile(r"\$?(-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))(?!/\d)", re.ASCII)
_ENDS_NUMBER = re.compile(r"(?!\.?\d)", re.ASCII)
_FINAL = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One calculation whose two sides are equal, and which is followed by no other number than its result."""

    expression: str
    result: str
    value: Fraction


@dataclass(frozen=True, slots=True)
class Step:
    """One line of reasoning, with the calculations it holds."""

    text: str
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True, slots=True)
class ArithmeticProblem:
    """A question with its checked reasoning; `final` has neither thousands separators nor trailing zeros."""

    question: str
    steps: tuple[Step, ...]
    final: str

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """Every calculation, in order."""
        return tuple(annotation for step in self.steps for annotation in step.annotations)

    @property
    def chain_reaches_final(self) -> bool:
        """Whether the last calculation's result is the final answer.

        One real row in twenty ends in words, rounds, or means per cent, so it is counted and not required.
        """
        return bool(self.annotations) and self.annotations[-1].value == Fraction(self.final)


def parse_problem(row: Mapping[str, object]) -> ArithmeticProblem:
    """Return the problem in a row with `question` and `answer`. Errors: RowRefusedError."""
    question = text_field(row, "question", max_chars=MAX_TEXT_CHARS).strip()
    answer = text_field(row, "answer", max_chars=MAX_TEXT_CHARS)
    reasoning, mark, final = answer.partition("####")
    if not mark or "####" in final:
        raise RowRefusedError(
            "several_final_answers" if mark else "no_final_answer",
            field="answer",
            detail="'####' stands there more than once" if mark else "there is no '####'",
            remedy="end with '#### <number>', once",
        )
    steps = tuple(_parse_step(line) for line in reasoning.split("\n") if line.strip())
    return ArithmeticProblem(question=question, steps=steps, final=normalize_final(final))


def normalize_final(text: str) -> str:
    """Return a final number without separators, leading or trailing zeros: ' 1,250.50' -> '1250.5'.

    Errors: RowRefusedError.
    """
    digits = text.strip()
    if len(digits) > MAX_EXPRESSION_CHARS or not re.search(r"\d", digits) or not _FINAL.fullmatch(digits):
        raise RowRefusedError(
            "final_not_a_number",
            field="answer",
            detail=f"{quote(digits)} after '####' is not one number",
            remedy="write one number, without a unit",
        )
    whole, _, decimals = digits.replace(",", "").removeprefix("-").partition(".")
    number = (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0")).rstrip(".")
    return f"-{number}" if digits.startswith("-") and number != "0" else number


def _parse_step(line: str) -> Step:
    annotations = tuple(_check(match[1], line[match.end() :]) for match in _ANNOTATION.finditer(line))
    rest = _ANNOTATION.sub("", line)
    if "<<" in rest or ">>" in rest:
        raise RowRefusedError(
            "annotation_malformed",
            field="answer",
            detail=f"unbalanced '<<' or '>>' in {quote(line)}",
            remedy="write calculations as <<expression=result>>",
        )
    return Step(text=line.strip(), annotations=annotations)


def _check(inside: str, after: str) -> Annotation:
    """Return the calculation in `inside` if it holds exactly and the text after it does not contradict it."""
    expression, equals, result = inside.partition("=")
    if not equals or "=" in result:
        raise RowRefusedError(
            "annotation_malformed",
            field="answer",
            detail=f"<<{quote(inside)}>> needs exactly one '='",
            remedy="write calculations as <<expression=result>>",
        )
    value, claimed = evaluate(expression), evaluate(result)
    if value != claimed:
        raise RowRefusedError(
            "annotation_wrong",
            field="answer",
            detail=f"{quote(expression)} is {value}, the row says {quote(result)}",
            remedy="correct the result; rounded ones are refused",
        )
    if contradiction := _contradiction(after, result, value):
        raise RowRefusedError(
            "result_not_repeated",
            field="answer",
            detail=f"after <<{quote(inside)}>> the text says {quote(contradiction)}",
            remedy="repeat the result after the annotation",
        )
    return Annotation(expression, result, value)


def _contradiction(after: str, result: str, value: Fraction) -> str:
    """Return the number that an annotation is followed by, if it is another one than its result."""
    number = _REPEATED.match(after)
    if not number or (after.startswith(result) and _ENDS_NUMBER.match(after, len(result))):
        return ""
    return "" if Fraction(re.sub("[$,]", "", number[1])) == value else number[0]


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an expression of + - * / // ( ) and decimals. Errors: RowRefusedError."""
    return _Parser(expression).parse()


class _Parser:
    """Recursive descent, one method for each precedence; numbers are integers while they can be, then rationals.

    sum := product (('+' | '-') product)*      product := sign (('*' | '/' | '//') sign)*
    sign := ('+' | '-')* atom                  atom := number | '(' sum ')'
    """

    def __init__(self, expression: str) -> None:
        self._expression = expression
        if len(expression) > MAX_EXPRESSION_CHARS:
            raise self._error(f"more than {MAX_EXPRESSION_CHARS} characters")
        self._tokens: list[str] = []
        position, end = 0, len(expression.rstrip())
        while position < end:
            token = _TOKEN.match(expression, position)
            if not token:
                raise self._error(f"{quote(expression[position])} is not arithmetic")
            self._tokens.append(token[1] or token[2])
            position = token.end()
        self._next = 0

    def parse(self) -> Fraction:
        value = self._sum()
        if self._next != len(self._tokens):
            raise self._error(f"unexpected {self._tokens[self._next]!r}")
        return Fraction(value)

    def _take(self, *signs: str) -> str | None:
        if self._next < len(self._tokens) and self._tokens[self._next] in signs:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def _sum(self) -> int | Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> int | Fraction:
        value = self._sign()
        while sign := self._take("*", "/", "//"):
            other = self._sign()
            if sign == "*":
                value *= other
            elif other == 0:
                raise self._error("division by zero")
            else:
                value = Fraction(value) / other if sign == "/" else value // other
        return value

    def _sign(self) -> int | Fraction:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        return -self._atom() if negative else self._atom()

    def _atom(self) -> int | Fraction:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise self._error("a parenthesis is not closed")
            return value
        if self._next == len(self._tokens) or self._tokens[self._next] in "+-*//()":
            raise self._error("a number is missing")
        self._next += 1
        digits = self._tokens[self._next - 1]
        return Fraction(digits) if "." in digits else int(digits)

    def _error(self, detail: str) -> RowRefusedError:
        return RowRefusedError(
            "annotation_not_arithmetic",
            field="answer",
            detail=f"{quote(self._expression)}: {detail}",
            remedy="use numbers with + - * / // and parentheses only",
        )
