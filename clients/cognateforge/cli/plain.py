"""Messages as plain JSON values: field names of the contract, numbers as numbers, enums without their prefix."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from cognateforge.cli.terminal import printable_json


def to_plain(message: Message) -> dict[str, Any]:
    """Return a message as a dict. What has no presence is always there; what is absent is left out."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            plain[field.name] = {str(key): _value(of, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            plain[field.name] = [_value(field, item) for item in value]
        else:
            plain[field.name] = _value(field, value)
    return plain


def to_line(value: Message | dict[str, Any]) -> str:
    """Return one line of JSON."""
    plain = to_plain(value) if isinstance(value, Message) else value
    return printable_json(json.dumps(plain, ensure_ascii=False, allow_nan=False))


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """Return a value's name without the enum's: RUNNING for JOB_STATE_RUNNING."""
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
    return str(value.name).removeprefix(f"{prefix}_")


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value
