"""Frames that are read without copying hold what the generated classes read out of them."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cognateforge.agent.v1 import agent_pb2
from cognateforge.client.frames import Frame, Header, Piece, Unknown, agent_frame, model_frame
from cognateforge.exchange.v1 import model_pb2

Read = Callable[[bytes], Frame]
BOTH = pytest.mark.parametrize(
    ("read", "kind", "artifact"),
    [(model_frame, model_pb2.FetchModelResponse, "model"), (agent_frame, agent_pb2.FetchAgentResponse, "agent")],
)


def by_generated_class(response: Any, artifact: str) -> Frame:
    if response.HasField("header"):
        return Header(digest=getattr(response.header, artifact).digest, manifest=response.header.manifest)
    if response.HasField("chunk"):
        return Piece(offset_bytes=response.chunk.offset_bytes, data=memoryview(response.chunk.data))
    return Unknown()


@BOTH
@given(offset=st.integers(-(2**63), 2**63 - 1), data=st.binary(max_size=300))
def test_a_chunk_is_read_whatever_its_numbers(read: Read, kind: Any, artifact: str, offset: int, data: bytes) -> None:
    """Also at byte 0 and without bytes, which leaves their fields out, and of more bytes than one digit of a length."""
    response = kind()
    response.chunk.offset_bytes, response.chunk.data = offset, data
    assert Piece(offset_bytes=offset, data=memoryview(data)) == read(response.SerializeToString())


@BOTH
def test_the_bytes_of_a_chunk_are_not_copied(read: Read, kind: Any, artifact: str) -> None:
    """They are a view of the frame."""
    response = kind()
    response.chunk.offset_bytes, response.chunk.data = 7, b"x" * 1000
    raw = response.SerializeToString()
    piece = read(raw)
    assert isinstance(piece, Piece)
    assert piece.data.obj is raw


@BOTH
def test_a_header_and_an_unknown_kind_are_told_apart(read: Read, kind: Any, artifact: str) -> None:
    """A frame of a later release's kind is no error."""
    response = kind()
    response.header.manifest = b"{}"
    getattr(response.header, artifact).digest = "sha256:1"
    assert Header(digest="sha256:1", manifest=b"{}") == read(response.SerializeToString())
    assert Unknown() == read(b"")
    assert Unknown() == read(b"\xfa\x01\x01x")  # field 31


@BOTH
@given(raw=st.binary(max_size=40), cut=st.integers(0, 40), flipped=st.integers(0, 8 * 40))
def test_any_bytes_are_read_as_the_generated_class_reads_them(
    read: Read, kind: Any, artifact: str, raw: bytes, cut: int, flipped: int
) -> None:
    """What no writer would send: cut frames, flipped bits, fields twice or in another order, or bytes of no message."""
    response = kind()
    response.chunk.offset_bytes, response.chunk.data = 300, raw
    changed = bytearray(response.SerializeToString())
    if flipped < 8 * len(changed):
        changed[flipped // 8] ^= 1 << flipped % 8
    for candidate in (raw, bytes(changed[:cut]), bytes(changed), bytes(changed) + raw):
        try:
            wanted = by_generated_class(kind.FromString(candidate), artifact)
        except DecodeError:
            with pytest.raises(DecodeError):
                read(candidate)
        else:
            assert wanted == read(candidate)
