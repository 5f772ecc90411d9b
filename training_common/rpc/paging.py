"""Page tokens in the manner of AIP-158: opaque, and bound to the query they were made for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math

from google.protobuf.message import Message

from cognateforge.exceptions import FieldViolation, InvalidPageTokenError

DEFAULT_SIZE = 50
MAX_SIZE = 500


def page_size(asked: int) -> int:
    """Return the size that counts: 0 means the default, and what is above the maximum is the maximum."""
    return min(asked, MAX_SIZE) if asked else DEFAULT_SIZE


def _bound(query: Message) -> str:
    plain = type(query)()
    plain.CopyFrom(query)
    plain.ClearField("page_token")
    # The size may change between pages, as AIP-158 allows.
    plain.ClearField("page_size")
    return hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()[:16]


def make_token(query: Message, before_id: int, value: float | None = None) -> str:
    """Return the token for the page after the row `before_id`. value: the row's own in the list's order, if any."""
    text = json.dumps([_bound(query), before_id, *([] if value is None else [value])])
    return base64.urlsafe_b64encode(text.encode()).decode()


def read_token(query: Message, token: str) -> int | None:
    """Return the row after which the page starts, None for the first page. Errors: InvalidPageTokenError."""
    place = read_place(query, token)
    return None if place is None else place[0]


def read_place(query: Message, token: str, *, valued: bool = False) -> tuple[int, float | None] | None:
    """Return that row and its value in the list's order, where that has values. Errors: InvalidPageTokenError."""
    if not token:
        return None
    try:
        bound, before_id, *values = json.loads(base64.urlsafe_b64decode(token.encode()))
        if bound == _bound(query) and type(before_id) is int and 0 < before_id < 2**63 and len(values) == valued:
            return before_id, _number(*values) if valued else None
    except (binascii.Error, ValueError, TypeError):
        pass
    message = "page_token was not made for this query: start again without one"
    raise InvalidPageTokenError(message, violations=[FieldViolation(field="page_token", description=message)])


def _number(value: object) -> float:
    """Return a number that a store can hold. Errors: ValueError."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    raise ValueError(f"{value!r} is no value of a list's order")
