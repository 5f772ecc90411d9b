"""Fetches from a server whose artifacts lie in a bucket: the same bytes and the same errors as from a folder."""

from pathlib import Path

import grpc
import pytest

from cognate_server import migrations
from cognateforge.client import AsyncCognateClient
from cognateforge.exceptions import ArtifactCorruptError, UnavailableError
from cognateforge.exchange.v1 import model_pb2
from tests.support.publish_killed import Service
from tests.support.published import MODEL_BODY
from tests.support.s3 import S3Server
from tests.support.servers import running_cognate
from tests.support.stored import Stored
from training_common.artifacts.registry import ArtifactRow

# Two whole ranges of a bucket and a part of one.
CONTENT = bytes(range(256)) * 70_000


@pytest.fixture
def stored(tmp_path: Path, s3: S3Server) -> Stored:
    """Return an empty bucket."""
    return Stored(files_dir=tmp_path, url=s3.new_url(), options=s3.options)


def publish(stored: Stored, folder: Path) -> ArtifactRow:
    """Publish a model before its server starts."""
    service = Service(stored, f"sqlite:///{folder / 'store.db'}")
    service.database.upgrade(Path(migrations.__file__).parent)
    (folder / "weights").write_bytes(CONTENT)
    file = service.registry.blobs.put(folder / "weights", "model.safetensors")
    with service.database.write() as connection:
        row = service.registry.publish(
            connection, family="cognate-25m", state="READY", job="jobs/x", files=[file], body=MODEL_BODY
        )
    service.database.close()
    return row


async def received(client: AsyncCognateClient, offset_bytes: int = 0) -> bytes:
    """Return what a fetch brings, by the bare RPC."""
    found = bytearray()
    async for frame in client.models.FetchModel(
        model_pb2.FetchModelRequest(name="cognate-25m@1", offset_bytes=offset_bytes)
    ):
        if frame.HasField("chunk"):
            assert frame.chunk.offset_bytes == offset_bytes + len(found)
            found += frame.chunk.data
    return bytes(found)


async def test_a_model_is_fetched_out_of_a_bucket(stored: Stored, tmp_path: Path) -> None:
    """Whole by the client, from any offset by the RPC; what is damaged ends the fetch and is refused from then on."""
    row = publish(stored, tmp_path)
    given = stored.settings.model_dump()
    async with running_cognate(tmp_path, artifacts=given) as server, AsyncCognateClient(server.address) as client:
        fetched = await client.fetch_model("cognate-25m@1", tmp_path / "fetched")
        assert (row.digest, CONTENT) == (fetched.digest, (fetched.path / "model.safetensors").read_bytes())
        for offset in (1, (8 << 20) - 1, 8 << 20, (16 << 20) + 1, len(CONTENT)):
            assert CONTENT[offset:] == await received(client, offset)
        stored.replace(row.files[0].digest, CONTENT[:9_000_000])
        with pytest.raises((ArtifactCorruptError, grpc.aio.AioRpcError), match="9000000"):
            await received(client)
        with pytest.raises(ArtifactCorruptError, match="cognate-25m@1 is damaged"):
            await client.fetch_model("cognate-25m@1", tmp_path / "again")


async def test_a_bucket_that_goes_away_is_told_as_such(stored: Stored, tmp_path: Path) -> None:
    """Not as damage: the same call may succeed later."""
    publish(stored, tmp_path)
    own = S3Server()
    try:
        own.start()
        lost = Stored(files_dir=tmp_path, url=own.new_url(), options=own.options)
        given = lost.settings.model_dump()
        async with running_cognate(tmp_path, artifacts=given) as server, AsyncCognateClient(server.address) as client:
            own.stop()
            with pytest.raises((UnavailableError, grpc.aio.AioRpcError)) as away:
                await received(client)
    finally:
        own.stop()
    assert "cannot be used now" in str(away.value)
