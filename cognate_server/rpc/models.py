"""ModelService: the exchange's half about models."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import sqlalchemy as sa

from cognate_server import dependents
from cognate_server.models import ARCHITECTURE, Wanted, compare, find_model
from cognate_server.rpc import convert
from cognateforge.exceptions import SequenceOutOfRangeError
from cognateforge.exchange.v1 import model_pb2 as pb
from cognateforge.exchange.v1 import model_pb2_grpc
from training_common.artifacts.cards import card_of
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow, SnapshotPage
from training_common.artifacts.scrub import require_whole
from training_common.jobs.hub import ChangeHub
from training_common.jobs.shared import SharedReads
from training_common.rpc import fetch, listing, paging, provenance
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context
from training_common.rpc.mutations import mutate

# Read from the store at once. A slow reader is waited for, so that is all a watch holds in memory.
_BATCH = 100
# The contract's bound on ModelSnapshot.models.
_SNAPSHOT_PAGE = 50


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Foundation models over gRPC: read, and told what is made of them."""

    def __init__(
        self,
        registry: ArtifactRegistry,
        hub: ChangeHub,
        *,
        heartbeat_s: float,
        sent: Callable[[int], None] = lambda _size_bytes: None,
    ) -> None:
        """sent: told of the bytes of models that were sent."""
        self._registry = registry
        self._sent = sent
        # What each watcher has been sent, up to this sequence.
        self._watchers: dict[object, int] = {}
        self._hub = hub
        self._heartbeat_s = heartbeat_s
        self._events: SharedReads[list[pb.WatchModelsResponse]] = SharedReads(registry.database)

    def slowest_watcher(self) -> int | None:
        """Return the sequence up to which every watcher of this server has been sent all; None without watchers."""
        return min(self._watchers.values(), default=None)

    async def _find(self, name: str) -> ArtifactRow:
        return await self._registry.database.run_brief(find_model, self._registry, name)

    async def _messages(self, rows: Sequence[ArtifactRow]) -> list[pb.FoundationModel]:
        counts = await self._registry.database.run_brief(dependents.counts_of, self._registry, rows)
        return [convert.model(row, counts.get(row.id, 0)) for row in rows]

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> Any:
        [model] = await self._messages([await self._find(request.name)])
        return pb.GetModelResponse(model=model)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> Any:
        states = convert.model_states(list(request.states))
        rows, token = await listing.page(self._registry, request, states=states)
        return pb.ListModelsResponse(models=await self._messages(rows), next_page_token=token)

    async def FetchModel(self, request: pb.FetchModelRequest, context: Context) -> AsyncIterator[pb.FetchModelResponse]:
        row = await self._find(request.name)
        fetch.check_offset(row, request.offset_bytes)
        await asyncio.to_thread(require_whole, self._registry, row)
        [model] = await self._messages([row])
        header = pb.FetchHeader(model=model, manifest=row.manifest, signature=row.signature or b"")
        yield pb.FetchModelResponse(header=header)
        frames = fetch.frames(self._registry.blobs, row, request.offset_bytes, pb.FetchModelResponse, self._sent)
        async for frame in fetch.guarded(self._registry, row, frames, find_model):
            yield frame

    async def GetModelCard(self, request: pb.GetModelCardRequest, context: Context) -> Any:
        row = await self._find(request.name)
        card = await asyncio.to_thread(card_of, self._registry.blobs, row)
        return pb.GetModelCardResponse(name=row.name, markdown=card)

    async def CheckCompatibility(self, request: pb.CheckCompatibilityRequest, context: Context) -> Any:
        row = await self._find(request.name)
        wanted = Wanted(
            architecture={part: getattr(request.architecture, part) for part in ARCHITECTURE},
            tokenizer_digest=request.tokenizer_digest,
            accept_experimental=request.accept_experimental,
        )
        return convert.compatibility(row, compare(row, wanted))

    async def GetModelProvenance(self, request: pb.GetModelProvenanceRequest, context: Context) -> Any:
        row = await self._find(request.name)
        found = await provenance.of_version(self._registry.blobs, row)
        return pb.GetModelProvenanceResponse(provenance=found)

    async def RegisterDependents(self, request: pb.RegisterDependentsRequest, context: Context) -> Any:
        owner, told = current_caller().name, convert.to_dependents(request.dependents)

        def work(connection: sa.Connection) -> pb.RegisterDependentsResponse:
            dependents.register(connection, self._registry, owner, told)
            return pb.RegisterDependentsResponse()

        answer = await mutate(self._registry.database, "RegisterDependents", request, work)
        return pb.RegisterDependentsResponse.FromString(answer)

    async def ReleaseDependents(self, request: pb.ReleaseDependentsRequest, context: Context) -> Any:
        owner, told = current_caller().name, convert.to_dependents(request.dependents)

        def work(connection: sa.Connection) -> pb.ReleaseDependentsResponse:
            dependents.release(connection, owner, told)
            return pb.ReleaseDependentsResponse()

        answer = await mutate(self._registry.database, "ReleaseDependents", request, work)
        return pb.ReleaseDependentsResponse.FromString(answer)

    async def ListDependents(self, request: pb.ListDependentsRequest, context: Context) -> Any:
        model = await self._find(request.name)
        before = paging.read_token(request, request.page_token)
        size = paging.page_size(request.page_size)
        rows = await self._registry.database.run(
            lambda: dependents.page(self._registry, model, limit=size + 1, before_id=before)
        )
        token = paging.make_token(request, rows[size - 1].id) if len(rows) > size else ""
        found = [convert.dependent(row, model.name) for row in rows[:size]]
        return pb.ListDependentsResponse(dependents=found, next_page_token=token)

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
        watcher = object()
        self._watchers[watcher] = request.after_sequence
        try:
            async for frame in self._watch(watcher, request.after_sequence):
                yield frame
        finally:
            del self._watchers[watcher]

    async def _watch(self, watcher: object, sequence: int) -> AsyncIterator[pb.WatchModelsResponse]:
        run, seen = self._registry.database.run, 0
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()
        while True:
            self._watchers[watcher] = sequence
            frames = await self._events.get((sequence, seen), functools.partial(self._frames, sequence))
            if frames and frames[0].event.sequence > sequence + 1:
                if sequence > 0:
                    raise _compacted(sequence, oldest=frames[0].event.sequence)
                async for page in self._snapshot():
                    yield convert.snapshot_frame(page, await run(dependents.counts_of, self._registry, page.rows))
                    sequence = page.sequence
                continue
            for frame in frames:
                sequence = frame.event.sequence
                yield frame
                self._watchers[watcher] = sequence
            if frames:
                quiet_since = loop.time()
                continue
            seen = await self._hub.wait(seen, max(0.0, quiet_since + self._heartbeat_s - loop.time()))
            if loop.time() >= quiet_since + self._heartbeat_s:
                yield pb.WatchModelsResponse(heartbeat=pb.ModelHeartbeat(last_sequence=sequence))
                quiet_since = loop.time()

    def _frames(self, after_sequence: int) -> list[pb.WatchModelsResponse]:
        events = self._registry.events_after(after_sequence, _BATCH)
        counts = dependents.counts_of(self._registry, [event.artifact for event in events])
        return [convert.event_frame(event, counts.get(event.artifact.id, 0)) for event in events]

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
