"""Page tokens in the manner of AIP-158: opaque, and bound to the query they were made for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

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


def make_token(query: Message, before_id: int) -> str:
    """Return the token for the page after the row `before_id`."""
    text = json.dumps([_bound(query), before_id])
    return base64.urlsafe_b64encode(text.encode()).decode()


def read_token(query: Message, token: str) -> int | None:
    """Return the row after which the page starts, None for the first page. Errors: InvalidPageTokenError."""
    if not token:
        return None
    try:
        bound, before_id = json.loads(base64.urlsafe_b64decode(token.encode()))
        if bound == _bound(query) and type(before_id) is int and 0 < before_id < 2**63:
            return before_id
    except (binascii.Error, ValueError, TypeError):
        pass
    message = "page_token was not made for this query: start again without one"
    raise InvalidPageTokenError(message, violations=[FieldViolation(field="page_token", description=message)])
