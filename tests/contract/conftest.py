"""The contract as its descriptors tell it."""

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import cognateforge


@pytest.fixture(scope="session")
def files() -> list[descriptor_pb2.FileDescriptorProto]:
    """Return the contract's own files, with comments."""
    stored = (Path(cognateforge.__file__).parent / "contract.binpb").read_bytes()
    found = descriptor_pb2.FileDescriptorSet.FromString(stored).file
    return [file for file in found if file.package.startswith("cognateforge.")]
