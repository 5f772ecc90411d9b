"""GSM8K's form: exact arithmetic, and the counts of the real rows."""

from __future__ import annotations

import ast
import gzip
import hashlib
import operator
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognate_server.data.gsm8k import ArithmeticProblem, evaluate, normalize_final, parse_problem
from tests.data_fixtures import figures, real_data
from training_common.findings import RowRefusedError
from training_common.rows import read_rows


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", Fraction(7)),
        ("(1+2)*3", Fraction(9)),
        (".5*4", Fraction(2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("-14+-8+1", Fraction(-21)),
        ("2--3", Fraction(5)),
        ("560//10", Fraction(56)),
        ("7//2", Fraction(3)),
        ("-7//2", Fraction(-4)),
        ("12/60/2", Fraction(1, 10)),
        ("3/4", Fraction(3, 4)),
        (" 2 * ( 3 - 1 ) ", Fraction(4)),
    ],
)
def test_expressions_are_exact(expression: str, value: Fraction) -> None:
    """Precedence, signs and decimals are those of arithmetic."""
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "text", ["", "1+", "(1", "1)", "2**3", "1/0", "1//0", "a", "1e3", "1,000", "1..2", "٣", "(" * 300, "1 2"]
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    """Nothing is guessed, and nothing is evaluated as code."""
    with pytest.raises(RowRefusedError) as refusal:
        evaluate(text)
    assert refusal.value.reason == "annotation_not_arithmetic"


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def _reference(node: ast.expr) -> Fraction:
    """A slow and plain evaluation of Python's own parse."""
    if isinstance(node, ast.UnaryOp):
        value = _reference(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _reference(node.left), _reference(node.right)
        return left / right if isinstance(node.op, ast.Div) else Fraction(_OPERATORS[type(node.op)](left, right))
    assert isinstance(node, ast.Constant)
    return Fraction(str(node.value))


expressions = st.recursive(
    st.integers(0, 99).map(str) | st.decimals(0, 9, places=2).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})")
        | st.tuples(inner, st.sampled_from("+-*"), inner).map("".join)
        | inner.map(lambda text: f"-{text}")
    ),
    max_leaves=8,
)


@given(expressions)
def test_the_parser_agrees_with_a_plain_reference(text: str) -> None:
    """Recursive descent gives what Python's grammar and rationals give."""
    try:
        expected: Fraction | None = _reference(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        expected = None
    try:
        found: Fraction | None = evaluate(text)
    except RowRefusedError as error:
        assert "division by zero" in error.detail or "characters" in error.detail  # noqa: PT017
        found = None
    if len(text) <= 256:
        assert found == expected


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (" 72", "72"),
        ("1,250", "1250"),
        ("-5", "-5"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("1,250.10", "1250.1"),
    ],
)
def test_finals_are_normalized(text: str, final: str) -> None:
    """Equal numbers are equal texts."""
    assert normalize_final(text) == final


@pytest.mark.parametrize("text", ["", " ", "$5", "5 apples", "1,25", "--1", "1.2.3", ".", "-", "NaN", "1" * 300])
def test_finals_that_are_no_number_are_refused(text: str) -> None:
    """An answer is one number."""
    with pytest.raises(RowRefusedError) as refusal:
        normalize_final(text)
    assert refusal.value.reason == "final_not_a_number"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<<2+2=5>>5\n#### 5", "annotation_wrong"),
        ("<<10/3=3.33>>3.33\n#### 3", "annotation_wrong"),
        ("<<2+2>>4\n#### 4", "annotation_malformed"),
        ("<<2=2=2>>2\n#### 2", "annotation_malformed"),
        ("<<2+2=4\n#### 4", "annotation_malformed"),
        ("<<2+$2=4>>4\n#### 4", "annotation_not_arithmetic"),
        ("<<2+2=4>>5\n#### 4", "result_not_repeated"),
        ("<<2+2=4>>40\n#### 4", "result_not_repeated"),
        ("<<2*2=4>>$4.50\n#### 4", "result_not_repeated"),
        ("no mark", "no_final_answer"),
        ("one\n#### 4\n#### 5", "several_final_answers"),
        ("a\n#### many", "final_not_a_number"),
        ("  ", "blank"),
        (4, "wrong_type"),
        ("\ud800\n#### 4", "lone_surrogate"),
        ("x" * 20_000, "too_long"),
    ],
)
def test_bad_answers_are_refused_with_a_reason(answer: object, reason: str) -> None:
    """A row that teaches a wrong result is not used."""
    with pytest.raises(RowRefusedError) as refusal:
        parse_problem({"question": "How many?", "answer": answer})
    assert (refusal.value.reason, refusal.value.field) == (reason, "answer")


@pytest.mark.parametrize(
    "step",
    [
        "<<3/4=3/4>>3/4 of it",
        "<<3/4=.75>>3/4 of it",
        "<<5*144=720.00>>720 in all",
        "<<2*1000=2000>>2,000.",
        "$<<2*1=2>>$2 each",
        "<<2+2=4>>4, 5 and 6",
        "<<2+2=4>>4.",
        "<<2-5=-3>>-3 degrees",
        "<<.5+.5=1>>one whole",
    ],
)
def test_a_result_may_be_repeated_in_any_spelling(step: str) -> None:
    """Only another number contradicts the annotation."""
    assert len(parse_problem({"question": "q", "answer": f"{step}\n#### 1"}).annotations) == 1


def test_the_chain_is_the_steps_in_order() -> None:
    """Blank lines and outer space go, every other character stays, and the last result may be the answer."""
    answer = "\u00a0First <<.5*4=2>>2\u200b cups\t(warm).\n\n  \nThen (2) <<(2+-8)/3=-2>>-2\u00a0left.\r\n#### -2\n"
    problem = parse_problem({"question": " q\u00a0", "answer": answer})
    assert [step.text for step in problem.steps] == [
        "First <<.5*4=2>>2\u200b cups\t(warm).",
        "Then (2) <<(2+-8)/3=-2>>-2\u00a0left.",
    ]
    assert [annotation.value for annotation in problem.annotations] == [Fraction(2), Fraction(-2)]
    assert problem.final == "-2"
    assert problem.chain_reaches_final
    assert not parse_problem({"question": "q", "answer": "<<1/4=0.25>>0.25\n#### 25"}).chain_reaches_final


def test_steps_keep_stray_angle_brackets() -> None:
    """Only doubled brackets are marks."""
    problem = parse_problem({"question": "q", "answer": "as 3 < 4 > 2, <<3/4=3/4>>3/4\n\nso <<1.50=1.5>>\n#### 1"})
    assert [annotation.value for annotation in problem.annotations] == [Fraction(3, 4), Fraction(3, 2)]
    assert len(problem.steps) == 2


@pytest.mark.parametrize(("name", "split"), [("train.jsonl.gz", "train"), ("test_shared.jsonl", "test_shared")])
def test_real_rows_have_the_measured_figures(name: str, split: str) -> None:
    """Every real annotation parses and holds, two of them need floor division, and every other figure is met."""
    folder = real_data()
    path = folder / "gsm8k" / name
    expected = figures(folder)["gsm8k"][split]
    rows = [row.load() for row in read_rows(path)]
    problems = [parse_problem(row) for row in rows]
    assert _figures(rows, problems, _bytes_of(path)).items() >= expected.items()


def _bytes_of(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _figures(rows: list[Mapping[str, object]], problems: list[ArithmeticProblem], data: bytes) -> dict[str, object]:
    """The figures under the names that `expected_figures.json` gives them."""
    marks = sum(str(row["answer"]).count("<<") for row in rows)
    floors = [sum("//" in one.expression for one in problem.annotations) for problem in problems]
    annotated = [problem for problem in problems if problem.annotations]
    return {
        "rows": len(rows),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "annotations": marks,
        "rows_without_annotation": len(problems) - len(annotated),
        "annotations_exact_strict_grammar": sum(len(problem.annotations) for problem in problems) - sum(floors),
        "annotations_strict_grammar_unparsable": sum(floors),
        "annotations_exact_with_floor_division": sum(len(problem.annotations) for problem in problems),
        "annotations_wrong": marks - sum(len(problem.annotations) for problem in problems),
        "rows_all_annotations_exact_strict": len(annotated) - sum(bool(number) for number in floors),
        "rows_with_annotation": len(annotated),
        "last_annotation_equals_final": sum(problem.chain_reaches_final for problem in problems),
        "final_integer": sum(Fraction(problem.final).denominator == 1 for problem in problems),
        "final_with_thousands_comma": sum("," in str(row["answer"]).partition("####")[2] for row in rows),
        "final_negative": sum(problem.final.startswith("-") for problem in problems),
    }
