"""ModelService: the exchange's half about models."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

from cognate_server.models import ARCHITECTURE, Wanted, compare, find_model
from cognate_server.rpc import convert
from cognateforge.exceptions import SequenceOutOfRangeError
from cognateforge.exchange.v1 import model_pb2 as pb
from cognateforge.exchange.v1 import model_pb2_grpc
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow, SnapshotPage
from training_common.jobs.hub import ChangeHub
from training_common.jobs.shared import SharedReads
from training_common.rpc import fetch, paging
from training_common.rpc.jobs import Context

# Read from the store at once. A slow reader is waited for, so that is all a watch holds in memory.
_BATCH = 100
# The contract's bound on ModelSnapshot.models.
_SNAPSHOT_PAGE = 50


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Foundation models over gRPC, read-only."""

    def __init__(self, registry: ArtifactRegistry, hub: ChangeHub, *, heartbeat_s: float) -> None:
        self._registry = registry
        self._hub = hub
        self._heartbeat_s = heartbeat_s
        self._events: SharedReads[list[pb.WatchModelsResponse]] = SharedReads(registry.database)

    async def _find(self, name: str) -> ArtifactRow:
        return await self._registry.database.run_brief(find_model, self._registry, name)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> Any:
        return pb.GetModelResponse(model=convert.model(await self._find(request.name)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> Any:
        before = paging.read_token(request, request.page_token)
        size = paging.page_size(request.page_size)
        states = convert.model_states(list(request.states))
        rows = await self._registry.database.run(
            lambda: self._registry.page(limit=size + 1, before_id=before, states=states)
        )
        token = paging.make_token(request, rows[size - 1].id) if len(rows) > size else ""
        return pb.ListModelsResponse(models=[convert.model(row) for row in rows[:size]], next_page_token=token)

    async def FetchModel(self, request: pb.FetchModelRequest, context: Context) -> AsyncIterator[pb.FetchModelResponse]:
        row = await self._find(request.name)
        fetch.check_offset(row, request.offset_bytes)
        yield pb.FetchModelResponse(header=pb.FetchHeader(model=convert.model(row), manifest=row.manifest))
        async for frame in fetch.frames(self._registry.blobs, row, request.offset_bytes, pb.FetchModelResponse):
            yield frame

    async def CheckCompatibility(self, request: pb.CheckCompatibilityRequest, context: Context) -> Any:
        row = await self._find(request.name)
        wanted = Wanted(
            architecture={part: getattr(request.architecture, part) for part in ARCHITECTURE},
            tokenizer_digest=request.tokenizer_digest,
            accept_experimental=request.accept_experimental,
        )
        return convert.compatibility(row, compare(row, wanted))

    async def WatchModels(
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        run = self._registry.database.run
        newest = await run(self._registry.newest_sequence)
        if request.after_sequence > newest:
            raise SequenceOutOfRangeError(
                f"after_sequence {request.after_sequence} is beyond the last event {newest}",
                metadata={"last_sequence": str(newest)},
            )
        sequence, seen = request.after_sequence, 0
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()
        while True:
            frames = await self._events.get((sequence, seen), functools.partial(self._frames, sequence))
            if frames and frames[0].event.sequence > sequence + 1:
                if sequence > 0:
                    raise _compacted(sequence, oldest=frames[0].event.sequence)
                async for page in self._snapshot():
                    yield convert.snapshot_frame(page)
                    sequence = page.sequence
                continue
            for frame in frames:
                sequence = frame.event.sequence
                yield frame
            if frames:
                quiet_since = loop.time()
                continue
            seen = await self._hub.wait(seen, max(0.0, quiet_since + self._heartbeat_s - loop.time()))
            if loop.time() >= quiet_since + self._heartbeat_s:
                yield pb.WatchModelsResponse(heartbeat=pb.ModelHeartbeat(last_sequence=sequence))
                quiet_since = loop.time()

    def _frames(self, after_sequence: int) -> list[pb.WatchModelsResponse]:
        return [convert.event_frame(event) for event in self._registry.events_after(after_sequence, _BATCH)]

    async def _snapshot(self) -> AsyncIterator[SnapshotPage]:
        page: SnapshotPage | None = None
        while page is None or page.more:
            page = await self._registry.database.run(self._registry.snapshot_page, page, _SNAPSHOT_PAGE)
            yield page


def _compacted(sequence: int, *, oldest: int) -> SequenceOutOfRangeError:
    return SequenceOutOfRangeError(
        f"the events after {sequence} are no longer kept, the oldest is {oldest}: watch with after_sequence 0, which "
        "begins with a snapshot of all models",
        metadata={"oldest_sequence": str(oldest)},
    )
