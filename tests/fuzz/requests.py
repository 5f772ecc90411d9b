"""Requests out of descriptors: valid ones, ones at the bounds of their rules, and ones that an attacker would send."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from cognateforge._vendor.buf.validate import validate_pb2

Kind = Literal["valid", "boundary", "hostile", "bytes"]
KINDS: tuple[Kind, ...] = ("valid", "valid", "boundary", "hostile", "bytes")

_INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan)
_TEXTS = (
    "",
    "\x00",
    "a\nb\r\n",
    "../../../etc/passwd",
    "'; DROP TABLE jobs; --",
    "%s%n%x{0}{self}${HOME}",
    "\u202egpj.exe\u200b",
    "\U0001f4a9" * 50,
    "x" * 5000,
    "-1",
    "NaN",
    "null",
    "cognate-25m@999999999",
    "cognate-25m@01",
    "intent-router@" + "9" * 30,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call: its bytes, and what goes with them."""

    kind: Kind
    data: bytes
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float | None


def requests(
    method: MethodDescriptor, known: Sequence[str], examples: Sequence[Message], *, usual_timeout_s: float
) -> st.SearchStrategy[Request]:
    """Return a strategy for calls of a method.

    known: names of things that exist. examples: requests that are served, without their request_id.
    """

    @st.composite
    def draw_request(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Request:
        kind: Kind = draw(st.sampled_from(KINDS))
        message = draw(messages(method.input_type, "valid" if kind == "bytes" else kind, tuple(known)))
        if examples and draw(st.booleans()):
            good = type(message)()
            good.CopyFrom(draw(st.sampled_from(list(examples))))
            if kind in ("boundary", "hostile"):
                good.MergeFrom(message)  # served, but for what is merged into it
            elif "request_id" in method.input_type.fields_by_name:
                good.request_id = str(draw(st.uuids()))
            message = good
        data = message.SerializeToString()
        if kind == "bytes":
            data = draw(_damaged(data))
        timeouts = [usual_timeout_s] if kind == "valid" else [usual_timeout_s] * 8 + [None, 0.001, 1e9]
        metadata: tuple[tuple[str, str | bytes], ...] = ()
        if kind in ("hostile", "bytes"):
            metadata = draw(_METADATA)
        return Request(kind=kind, data=data, metadata=metadata, timeout_s=draw(st.sampled_from(timeouts)))

    return draw_request()


_METADATA = st.sampled_from(
    [
        (),
        (),
        (("x-request-id", "call-1"),),
        (("x-request-id", "a b;c %00"),),
        (("x-request-id", "x" * 3000),),
        (("authorization", "Bearer x"), ("x-forwarded-for", "10.0.0.1")),
        (("some-bin", bytes(range(256))),),
        tuple((f"k{n}", "v" * 50) for n in range(60)),
    ]
)


def messages(descriptor: Descriptor, kind: Kind, known: tuple[str, ...]) -> st.SearchStrategy[Message]:
    """Return a strategy for messages of a type."""
    cls = message_factory.GetMessageClass(descriptor)

    @st.composite
    def draw_message(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Message:
        made = cls()
        # At a bound or hostile in one field, and valid in the others: or the first refusal would hide the rest.
        names = [field.name for field in descriptor.fields]
        spoiled = draw(st.sampled_from(names)) if names and kind != "valid" else ""
        chosen = {oneof.name: draw(st.sampled_from(list(oneof.fields))).name for oneof in descriptor.oneofs}
        for field in descriptor.fields:
            how = kind if field.name == spoiled else "valid"
            oneof = field.containing_oneof
            if oneof is not None:
                if chosen[oneof.name] != field.name or (how == "hostile" and draw(st.booleans())):
                    continue
            elif not (_is_required(field) or how != "valid" or draw(st.booleans())):
                continue
            _fill(draw, made, field, how, known)
        return made

    return draw_message()


def _is_required(field: FieldDescriptor) -> bool:
    rules = _rules(field)
    return bool(rules.required or rules.string.uuid or field.name == "name" or rules.repeated.min_items)


def _rules(field: FieldDescriptor) -> validate_pb2.FieldRules:
    return field.GetOptions().Extensions[validate_pb2.field]


def _fill(draw: Any, made: Message, field: FieldDescriptor, kind: Kind, known: tuple[str, ...]) -> None:
    rules = _rules(field)
    if field.is_repeated:
        longest = rules.repeated.max_items or 8
        counts = {"valid": [1, 2], "boundary": [0, longest, longest + 1]}.get(kind, [0, 1, 3 * longest])
        count = min(draw(st.sampled_from(counts)), 2000)
        items = rules.repeated.items
        values = [draw(_value(field, items, "valid" if count > 8 else kind, known)) for _ in range(min(count, 8))]
        target = getattr(made, field.name)
        for number in range(count):
            if field.message_type is not None:
                target.add().CopyFrom(values[number % len(values)])
            else:
                target.append(values[number % len(values)])
        return
    if field.message_type is not None:
        getattr(made, field.name).CopyFrom(draw(_value(field, rules, kind, known)))
        return
    setattr(made, field.name, draw(_value(field, rules, kind, known)))


def _value(
    field: FieldDescriptor, rules: validate_pb2.FieldRules, kind: Kind, known: tuple[str, ...]
) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Duration":
            return _durations(kind)
        return messages(field.message_type, kind, known)
    if field.enum_type is not None:
        values = [value.number for value in field.enum_type.values if value.number not in rules.enum.not_in]
        return st.sampled_from(values if kind == "valid" else [*values, 0, -1, 99, 2**31 - 1])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=64)
        return _texts(field, rules.string, kind, known)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return _numbers(rules.double, kind)
    return _integers(field, rules, kind)


def _durations(kind: Kind) -> st.SearchStrategy[Any]:
    from google.protobuf.duration_pb2 import Duration

    if kind == "valid":
        return st.builds(Duration, seconds=st.integers(1, 5))
    odd = st.sampled_from([0, 1, -1, 86_400, 86_401, 2**63 - 1, -(2**63)])
    return st.builds(Duration, seconds=odd, nanos=st.sampled_from([0, 1, -1, 999_999_999, 2**31 - 1]))


def _texts(
    field: FieldDescriptor, rules: validate_pb2.StringRules, kind: Kind, known: tuple[str, ...]
) -> st.SearchStrategy[str]:
    if kind == "hostile":
        return st.one_of(st.sampled_from(_TEXTS), st.text(max_size=300))
    if rules.uuid:
        good: st.SearchStrategy[str] = st.uuids().map(str)
        return good if kind == "valid" else st.one_of(good, st.sampled_from(["", "0", str(uuid.UUID(int=0)), "G" * 36]))
    if kind == "boundary" and rules.max_len:
        return st.sampled_from(["", "a", "a" * rules.max_len, "a" * (rules.max_len + 1)])
    fitting = [name for name in known if not rules.pattern or re.search(rules.pattern, name)]
    if field.name.endswith("name") and fitting:
        return st.sampled_from(fitting)
    if rules.pattern:
        return st.from_regex(rules.pattern, fullmatch=False).map(lambda text: text.rstrip("\n"))
    return st.text("abcdefghijklmnopqrstuvwxyz0123456789-_./", max_size=min(rules.max_len or 20, 20))


def _numbers(rules: validate_pb2.DoubleRules, kind: Kind) -> st.SearchStrategy[float]:
    low = rules.gte if rules.HasField("gte") else rules.gt if rules.HasField("gt") else 0.0
    high = rules.lte if rules.HasField("lte") else rules.lt if rules.HasField("lt") else low + 1.0
    if kind == "valid":
        return st.floats(low, high, exclude_min=rules.HasField("gt"), exclude_max=rules.HasField("lt"))
    return st.sampled_from([low, high, math.nextafter(low, -math.inf), math.nextafter(high, math.inf), *_FLOATS])


def _integers(field: FieldDescriptor, rules: validate_pb2.FieldRules, kind: Kind) -> st.SearchStrategy[int]:
    least, most = _INT_RANGES[field.cpp_type]
    own: Any = rules.int32 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else rules.int64
    if field.cpp_type == FieldDescriptor.CPPTYPE_UINT64:
        own = rules.uint64
    low = own.gte if own.HasField("gte") else own.gt + 1 if own.HasField("gt") else 0
    high = own.lte if own.HasField("lte") else own.lt - 1 if own.HasField("lt") else low + 1000
    if kind == "valid":
        return st.integers(low, max(low, min(high, low + 1_000_000)))
    odd = {low, high, low - 1, high + 1, 0, -1, 1, least, most}
    return st.sampled_from(sorted(number for number in odd if least <= number <= most))


@st.composite
def _damaged(draw: Callable[[st.SearchStrategy[Any]], Any], data: bytes) -> bytes:
    """Return bytes that are no message, or one with something in it that nobody has defined."""
    how = draw(st.sampled_from(["noise", "cut", "flip", "unknown", "repeat", "length", "groups", "large"]))
    if how == "noise":
        return bytes(draw(st.binary(max_size=400)))
    if how == "cut":
        return data[: int(draw(st.integers(0, max(0, len(data) - 1))))]
    if how == "flip" and data:
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "unknown":
        varint, text, long_varint = b"\xf8\xff\xff\xff\x0f\x01", b"\x9a\x3f\x03abc", b"\x98\x3f" + b"\xff" * 9 + b"\x01"
        return data + bytes(draw(st.sampled_from([varint, text, long_varint])))
    if how == "repeat":
        return data * int(draw(st.integers(2, 50)))
    if how == "length":
        return data + b"\x0a\xff\xff\xff\xff\x07"
    if how == "groups":
        return b"\x0b" * int(draw(st.integers(1, 2000)))
    return data + b"\x9a\x3f\xa0\x8d\x06" + b"x" * 100_000
