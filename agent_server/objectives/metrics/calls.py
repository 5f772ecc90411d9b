"""Whether calls that an agent wrote are those that are accepted, compared as syntax trees and never run.

The rules are those of the Berkeley Function Calling Leaderboard's `ast_checker`. Source: Patil et al. 2025, "The
Berkeley Function Calling Leaderboard (BFCL)", ICML; github.com/ShishirPatil/gorilla, bfcl_eval/eval_checker/ast_eval.
Where it differs: `parallel` looks for any assignment of calls to answers, not the first that fits; in Java and
JavaScript a value that was not written as a text is taken as it is.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Longer answers are no calls. It bounds what the parser is given: the longest demonstrated answers have a fifth of it.
_MAX_CHARS = 20_000
_NO_ORDER = ("parallel", "parallel_multiple")
_TEXT_LANGUAGES = ("simple_java", "simple_javascript", "java", "javascript")
# Space and punctuation that two writings of the same text may differ in.
_NEGLIGIBLE = re.compile(r"[ ,./\-_*^]")
# Parameters of other languages may be called what Python reserves, `from` for instance; for the parser they are marked.
_MARK = "__parameter"
_RESERVED = re.compile(rf"([(,]\s*)({'|'.join(keyword.kwlist)})(\s*=(?!=))")
# Types as the rows declare them, by what they are in Python. "any" is a text: a variable's name, for instance.
_TYPES: Mapping[str, type] = {
    "string": str, "char": str, "any": str,
    "integer": int, "int": int, "long": int, "short": int, "byte": int, "bigint": int,
    "float": float, "double": float, "number": float,
    "boolean": bool,
    "array": list, "tuple": list, "arraylist": list, "list": list, "set": list,
    "dict": dict, "hashmap": dict, "hashtable": dict, "object": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call: the function's dotted name, its arguments without a name, and those with one."""

    name: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def parse_calls(text: str) -> list[Call] | None:
    """Return the calls of an answer, or None where it is anything else.

    Forms: `[f(a=1), g(b="x")]`, the same without brackets, or a call on each line. Values are literals; a name, an
    expression or a call among them becomes its text. Nothing is evaluated.
    """
    turns = parse_turns(text)
    return None if turns is None else [call for turn in turns for call in turn]


def parse_turns(text: str) -> list[list[Call]] | None:
    """Return the calls of each line of an answer that is not empty; an answer that is one expression is one line."""
    whole = _parse_line(text)
    if whole is not None:
        return [whole]
    lines = [_parse_line(line) for line in text.split("\n") if line.strip()]
    return [line for line in lines if line is not None] if lines and None not in lines else None


def _parse_line(text: str) -> list[Call] | None:
    text = text.strip()
    if not text or len(text) > _MAX_CHARS:
        return None
    try:
        body = _parse(text)
        nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
        calls = [_call(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [call for call in calls if call is not None] if None not in calls else None


def _parse(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # about backslashes in texts
        try:
            return ast.parse(text, mode="eval").body
        except SyntaxError:
            return ast.parse(_RESERVED.sub(rf"\1\2{_MARK}\3", text), mode="eval").body


def _call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call):
        return None
    name, part = list[str](), node.func
    while isinstance(part, ast.Attribute):
        name.insert(0, part.attr)
        part = part.value
    named = {k.arg.removesuffix(_MARK): _value(k.value) for k in node.keywords if k.arg}
    starred = any(isinstance(value, ast.Starred) for value in node.args)
    if not isinstance(part, ast.Name) or starred or len(named) != len(node.keywords):  # **, or a name that comes twice
        return None
    return Call(".".join([part.id, *name]), tuple(_value(value) for value in node.args), named)


def _value(node: ast.expr) -> Any:
    """Return a literal's value, and anything else as its text."""
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if (
            type(value) is not bool
        ):
            return -value
        case ast.List():
            return [_value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_value(item) for item in node.elts)
        case ast.Dict() if None not in node.keys:
            return {_hashable(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    return ast.unparse(node)


def _hashable(key: ast.expr | None) -> Any:
    value = None if key is None else _value(key)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def ast_match(answer: str, accepted: Mapping[str, Any]) -> bool:
    """Return whether an answer's calls are accepted ones.

    accepted: `category`, `functions` and `ground_truth` as the leaderboard's rows have them.
    - irrelevance, or a ground truth of None: no call is made.
    - multi_turn_*: on each line the calls of one turn, equal to the demonstrated ones, in order.
    - parallel*: as many calls as answers, in any order. Otherwise one call.
    A call matches when its function has the right name, every required parameter is there, every parameter is declared
    and has an accepted value of an accepted type, and what is left out may be ("" among the values).
    """
    category, truth = str(accepted.get("category", "")), accepted.get("ground_truth")
    if truth is None:
        return not parse_calls(answer)
    if category.startswith("multi_turn"):
        return _turns_match(answer, truth)
    calls = parse_calls(answer)
    if calls is None or len(calls) != len(truth):
        return False
    functions = {str(function["name"]): function for function in accepted.get("functions") or ()}
    language = category in _TEXT_LANGUAGES
    fits = [[_call_matches(call, one, functions, language) for call in calls] for one in truth]
    if category in _NO_ORDER:
        return _assignable(fits)
    return all(fits[i][i] for i in range(len(truth)))


def _turns_match(answer: str, truth: Sequence[Any]) -> bool:
    turns = [truth] if all(isinstance(one, str) for one in truth) else truth
    demonstrated = [[call for text in turn for call in parse_calls(text) or ()] for turn in turns]
    written = parse_turns(answer)
    if written is None:
        return False
    if len(demonstrated) == 1:
        written = [[call for line in written for call in line]]
    return written == demonstrated


def _assignable(fits: Sequence[Sequence[bool]]) -> bool:
    """Return whether every row can have a column of its own that fits (Kuhn's augmenting paths)."""
    taken: dict[int, int] = {}  # column -> row

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in taken or place(taken[column], seen):
                    taken[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))


def _call_matches(call: Call, one: Mapping[str, Any], functions: Mapping[str, Any], text_language: bool) -> bool:
    ((name, values),) = one.items()
    if call.name != name or call.positional or name not in functions:
        return False
    parameters = functions[name]["parameters"]
    declared: Mapping[str, Any] = parameters.get("properties", {})
    if not set(parameters.get("required", ())) <= call.named.keys():
        return False
    for parameter, value in call.named.items():
        if parameter not in declared or parameter not in values:
            return False
        if not _value_matches(value, values[parameter], declared[parameter], text_language):
            return False
    return all("" in accepted for parameter, accepted in values.items() if parameter not in call.named)


def _value_matches(value: Any, accepted: Sequence[Any], declared: Mapping[str, Any], text_language: bool) -> bool:
    kind: Any = _type(declared)
    items = _type(declared["items"]) if kind is list and isinstance(declared.get("items"), Mapping) else None
    given = [one for one in accepted if one != ""]
    if text_language:
        value = _read_text(value, type(given[0]) if kind is str and given else kind)
    if isinstance(value, tuple):
        value = list(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # a variable in a value's place is a text among the accepted values
        return bool(given) and type(value) is type(given[0]) and value in given
    if given and type(given[0]) is not kind:
        return value in given
    if kind is dict:
        return any(_dict_matches(value, one) for one in given)
    if kind is str:
        return any(_standard(value) == _standard(one) for one in accepted if isinstance(one, str))
    if kind is list:
        return any(_list_matches(value, one, items, text_language) for one in given)
    return value in given


def _list_matches(value: Sequence[Any], accepted: Any, items: type | None, text_language: bool) -> bool:
    if not isinstance(accepted, list) or len(value) != len(accepted):
        return False
    if items is dict and accepted and all(isinstance(one, dict) for one in accepted):
        return all(isinstance(v, dict) and _dict_matches(v, one) for v, one in zip(value, accepted, strict=True))
    if items is not None and not text_language:
        kinds = {items} | {type(one) for one in accepted[:1]}
        if any(type(_listed(one)) not in kinds for one in value):
            return False
    return [_standard(_listed(one)) for one in value] == [_standard(one) for one in accepted]


def _dict_matches(value: Mapping[str, Any], accepted: Any) -> bool:
    """Return whether every key has one of its accepted values, and what is left out may be."""
    if not isinstance(accepted, Mapping) or not value.keys() <= accepted.keys():
        return False
    for key, one in value.items():
        if not any(_standard(_listed(one)) == _standard(choice) for choice in accepted[key]):
            return False
    return all("" in choices for key, choices in accepted.items() if key not in value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _standard(value: Any) -> Any:
    """Return a text as it is compared: without case, space, `,./-_*^`, and with one kind of quotes."""
    return _NEGLIGIBLE.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _type(declared: Mapping[str, Any]) -> type:
    return _TYPES.get(str(declared.get("type", "any")).lower(), str)


def _read_text(value: Any, kind: type) -> Any:
    """Return a value of Java or JavaScript that was written as a text, by its declared type; any other as it is."""
    if not isinstance(value, str) or kind is str:
        return value
    text = value.strip()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), value)
    if kind in (int, float):
        try:
            return kind(text.rstrip("lLfFdDn"))
        except ValueError:
            return value
    try:
        read = json.loads(text)
    except ValueError:
        return value
    return read if isinstance(read, kind) else value
