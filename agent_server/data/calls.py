"""Calls of tools in one canonical form: `[fn(a=1, b="x"), other.fn()]`, and `[]` where none is to be made.

Values are Python's literals, texts in double quotes; what may be left out is left out. Parameters are called what the
row calls them, also where Python reserves the word (`from`).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training_common.findings import RowRefusedError, quote

# Among accepted values: the parameter may be left out.
OMITTED = ""
_WORDS = {None: "None", True: "True", False: "False"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call. positional: arguments without a name, before those with one."""

    name: str
    named: Mapping[str, object]
    positional: Sequence[object] = ()

    def __str__(self) -> str:
        given = [literal(value) for value in self.positional]
        given += [f"{name}={literal(value)}" for name, value in self.named.items()]
        return f"{self.name}({', '.join(given)})"


def written(calls: Sequence[Call]) -> str:
    """Return calls in the canonical form."""
    return f"[{', '.join(map(str, calls))}]"


def literal(value: object) -> str:
    """Return a value of JSON as Python's literal."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(name)}: {literal(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


def first_accepted(accepted: Mapping[str, object], function: Mapping[str, object], place: str) -> Call:
    """Return the shortest accepted call: the first value of each parameter, and none where it may be left out.

    accepted: `{name: {parameter: [accepted values]}}`. function: the tool's description. Errors: RowRefusedError.
    """
    ((name, values),) = accepted.items()
    if not isinstance(values, Mapping):
        raise _no_values(place, values)
    parameters = function.get("parameters")
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    return Call(name, _chosen(values, required if isinstance(required, list) else [], place))


def _chosen(values: Mapping[str, object], required: Sequence[object], place: str) -> dict[str, object]:
    chosen: dict[str, object] = {}
    for name, choices in values.items():
        if not isinstance(choices, list) or not choices:
            raise _no_values(f"{place}.{name}", choices)
        given = [choice for choice in choices if choice != OMITTED]
        if OMITTED not in choices or name in required:
            chosen[name] = _plain(given[0] if given else OMITTED, f"{place}.{name}")
    return chosen


def _plain(value: object, place: str) -> object:
    """Return an accepted value as it is given: the entries of objects have accepted values of their own."""
    if isinstance(value, Mapping):
        return _chosen(value, [], place)
    return [_plain(item, place) for item in value] if isinstance(value, list) else value


def parsed(text: object, place: str) -> Call:
    """Return a call that a row has as text: `cd(folder='workspace')`. Nothing is run. Errors: RowRefusedError."""
    try:
        node = ast.parse(text if isinstance(text, str) else "", mode="eval").body
        if not isinstance(node, ast.Call) or not all(keyword.arg for keyword in node.keywords):
            raise ValueError("no call")
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return Call(ast.unparse(node.func), named, [ast.literal_eval(value) for value in node.args])
    except (SyntaxError, ValueError, TypeError, MemoryError):
        raise RowRefusedError(
            "no_call",
            field=place,
            detail=f"{quote(text)} is no call with literal arguments",
            remedy="write it as fn(a=1, b='x')",
        ) from None


def _no_values(place: str, values: object) -> RowRefusedError:
    return RowRefusedError(
        "wrong_type",
        field=place,
        detail=f"expected accepted values, got {quote(values)}",
        remedy="write a list of accepted values for each parameter",
    )
