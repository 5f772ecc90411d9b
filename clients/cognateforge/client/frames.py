"""What the frames of a fetch hold, read without copying their bytes.

A message's `bytes` field is copied when the message is parsed, and again at every look at it, which is a twelfth of
what a fetch costs. So a frame that is laid out as every protobuf writer lays out a chunk is cut where its bytes begin;
whatever else arrives goes through the generated class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor

from cognateforge.agent.v1 import agent_pb2
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.exchange.v1 import model_pb2

_VARINT, _BYTES = 0, 2
_INT64_BITS = 63


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first frame of a fetch, of either service."""

    digest: str
    manifest: bytes
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of the payload's bytes, and where they stand in it."""

    offset_bytes: int
    data: memoryview


@dataclass(frozen=True)
class Unknown:
    """A kind of frame that this release does not know. Not None, which gRPC takes for bytes that cannot be read."""


Frame = Header | Piece | Unknown


def _tag(message: Descriptor, field: str, kind: int) -> int:
    return message.fields_by_name[field].number << 3 | kind


_OFFSET = _tag(artifact_pb2.Chunk.DESCRIPTOR, "offset_bytes", _VARINT)
_DATA = _tag(artifact_pb2.Chunk.DESCRIPTOR, "data", _BYTES)
_MODEL_CHUNK = _tag(model_pb2.FetchModelResponse.DESCRIPTOR, "chunk", _BYTES)
_AGENT_CHUNK = _tag(agent_pb2.FetchAgentResponse.DESCRIPTOR, "chunk", _BYTES)


def model_frame(raw: bytes) -> Frame:
    """Read a frame of FetchModel. Errors: google.protobuf.message.DecodeError."""
    return _frame(raw, model_pb2.FetchModelResponse, "model", _MODEL_CHUNK)


def agent_frame(raw: bytes) -> Frame:
    """Read a frame of FetchAgent. Errors: google.protobuf.message.DecodeError."""
    return _frame(raw, agent_pb2.FetchAgentResponse, "agent", _AGENT_CHUNK)


def _frame(
    raw: bytes,
    kind: type[model_pb2.FetchModelResponse | agent_pb2.FetchAgentResponse],
    artifact: str,
    chunk_tag: int,
) -> Frame:
    """artifact: the header's field that holds the digest. chunk_tag: what a frame begins with that is all chunk."""
    if piece := _piece(raw, chunk_tag):
        return piece
    response = kind.FromString(raw)
    if response.HasField("header"):
        header = response.header
        return Header(digest=getattr(header, artifact).digest, manifest=header.manifest, signature=header.signature)
    if response.HasField("chunk"):
        return Piece(offset_bytes=response.chunk.offset_bytes, data=memoryview(response.chunk.data))
    return Unknown()


# What a channel's `unary_stream` is given for a call whose answers are read so.
FETCH_MODEL: Mapping[str, Any] = {
    "method": f"/{model_pb2.DESCRIPTOR.services_by_name['ModelService'].full_name}/FetchModel",
    "request_serializer": model_pb2.FetchModelRequest.SerializeToString,
    "response_deserializer": model_frame,
}
FETCH_AGENT: Mapping[str, Any] = {
    "method": f"/{agent_pb2.DESCRIPTOR.services_by_name['AgentService'].full_name}/FetchAgent",
    "request_serializer": agent_pb2.FetchAgentRequest.SerializeToString,
    "response_deserializer": agent_frame,
}


def _piece(raw: bytes, tag: int) -> Piece | None:
    """Return the chunk that is all of a frame: its offset, unless that is 0, and its data, up to the frame's end."""
    try:
        if raw[0] != tag:
            return None
        size_bytes, at = _varint(raw, 1)
        if at + size_bytes != len(raw):
            return None
        offset_bytes = 0
        if raw[at] == _OFFSET:
            offset_bytes, at = _varint(raw, at + 1)
        if raw[at] != _DATA or offset_bytes >> _INT64_BITS:
            return None
        size_bytes, at = _varint(raw, at + 1)
    except IndexError:
        return None
    if at + size_bytes != len(raw):
        return None
    return Piece(offset_bytes=offset_bytes, data=memoryview(raw)[at:])


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins there, and where it has ended. Errors: IndexError."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
