"""StorageService: how a service keeps the artifacts that it stores. Both services serve it, each its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import sqlalchemy as sa

from cognateforge.artifact.v1 import storage_pb2 as pb
from cognateforge.artifact.v1 import storage_pb2_grpc
from cognateforge.exceptions import ResourceExhaustedError
from training_common.artifacts.collect import ArtifactCollector
from training_common.artifacts.keeping import ArtifactKeeper
from training_common.artifacts.registry import ArtifactRow
from training_common.artifacts.scrub import Damage, Scrubber, Verified
from training_common.rpc import convert
from training_common.rpc.jobs import Context
from training_common.rpc.mutations import mutate

# Each reads as fast as the store gives: one keeps a disk busy, and a second is for who cannot wait for the first.
_VERIFICATIONS = 2
# Progress is for people who watch.
_PROGRESS_S = 1.0
# The contract's bound on CollectedArtifact.why.
_WHY_CHARS = 255


class StorageServicer(storage_pb2_grpc.StorageServiceServicer):
    """Pins, tiers, verification and collection over gRPC."""

    def __init__(self, keeper: ArtifactKeeper, collector: ArtifactCollector, scrubber: Scrubber) -> None:
        self._keeper = keeper
        self._collector = collector
        self._scrubber = scrubber
        self._registry = keeper.registry
        self._database = keeper.registry.database
        self._verifying = 0

    def _storage(self, connection: sa.Connection, row: ArtifactRow) -> pb.Storage:
        return convert.storage(row, self._keeper.holds.counts(connection, [row]).get(row.id, 0))

    async def SetPin(self, request: pb.SetPinRequest, context: Context) -> Any:
        def work(connection: sa.Connection) -> pb.SetPinResponse:
            row = self._keeper.set_pin(connection, request.name, pinned=request.pinned)
            return pb.SetPinResponse(storage=self._storage(connection, row))

        return pb.SetPinResponse.FromString(await mutate(self._database, "SetPin", request, work))

    async def SetTier(self, request: pb.SetTierRequest, context: Context) -> Any:
        tier = convert.to_tier(request.tier)
        row = await self._database.run(self._keeper.find, self._registry, request.name)
        if row.tier != tier:
            # What is damaged stays where it is: a move would lose what might yet be mended.
            await asyncio.to_thread(self._check, row)

        def work(connection: sa.Connection) -> pb.SetTierResponse:
            return pb.SetTierResponse(
                storage=self._storage(connection, self._keeper.set_tier(connection, request.name, tier))
            )

        answer = await mutate(self._database, "SetTier", request, work)
        # The tier is settled; bytes that do not come there now, the next pass of the collector brings.
        await asyncio.to_thread(self._keeper.settle, [row])
        return pb.SetTierResponse.FromString(answer)

    def _check(self, row: ArtifactRow) -> None:
        for file in row.files:
            self._registry.blobs.check(file)

    async def VerifyArtifacts(
        self, request: pb.VerifyArtifactsRequest, context: Context
    ) -> AsyncIterator[pb.VerifyArtifactsResponse]:
        if request.name:
            await self._database.run(self._keeper.find, self._registry, request.name)
        if self._verifying >= _VERIFICATIONS:
            raise ResourceExhaustedError(f"{self._verifying} verifications are under way: call when one has ended")
        self._verifying += 1
        stop = threading.Event()
        try:
            async for frame in self._verify(request.name, stop):
                yield frame
        finally:
            stop.set()
            self._verifying -= 1

    async def _verify(self, name: str, stop: threading.Event) -> AsyncIterator[pb.VerifyArtifactsResponse]:
        family, _, number = name.partition("@")
        version = int(number) if number else None
        read, last = Verified(), 0
        total = await self._database.run(self._scrubber.count, family, version)
        loop = asyncio.get_running_loop()
        told_s = loop.time()
        while rows := await self._database.run(self._scrubber.page, family, version, last):
            for row in rows:
                last = row.id
                for damage in await asyncio.to_thread(self._scrubber.verify, row, stop, total=read):
                    yield pb.VerifyArtifactsResponse(damage=_damage(damage))
                if loop.time() - told_s >= _PROGRESS_S:
                    yield pb.VerifyArtifactsResponse(progress=_progress(read, total))
                    told_s = loop.time()
        yield pb.VerifyArtifactsResponse(summary=_progress(read, total))

    async def CollectArtifacts(self, request: pb.CollectArtifactsRequest, context: Context) -> Any:
        names = list(request.names)
        plan = await asyncio.to_thread(lambda: self._collector.plan(versions=not names))
        marked: list[ArtifactRow] = []

        def work(connection: sa.Connection) -> pb.CollectArtifactsResponse:
            versions = list(plan.versions)
            if names:
                named = self._keeper.lock(connection, names)
                self._keeper.require_free(connection, named, field="names")
                versions = [(row, "it was asked for") for row in named]
            chosen = [row for row, _ in versions]
            if not request.validate_only:
                chosen = self._collector.mark(connection, versions)
                marked.extend(chosen)
            garbage = self._collector.unnamed(plan, without=chosen)
            why = {row.id: text for row, text in versions}
            return pb.CollectArtifactsResponse(
                collected=[
                    pb.CollectedArtifact(name=row.name, digest=row.digest, why=why[row.id][:_WHY_CHARS])
                    for row in chosen
                ],
                blobs=len(garbage),
                bytes=sum(blob.size_bytes for blob in garbage),
            )

        answer = await mutate(self._database, "CollectArtifacts", request, work)
        if not request.validate_only:
            self._collector.told(marked)
            await asyncio.to_thread(self._collector.sweep)
        return pb.CollectArtifactsResponse.FromString(answer)


def _damage(found: Damage) -> pb.Damage:
    return pb.Damage(
        name=found.name,
        path=found.path,
        digest=found.digest,
        problem=pb.Problem.Value(f"PROBLEM_{found.problem}"),
        detail=found.detail,
    )


def _progress(read: Verified, total: int) -> pb.VerifyProgress:
    return pb.VerifyProgress(versions=read.versions, files=read.files, bytes=read.size_bytes, total_versions=total)
