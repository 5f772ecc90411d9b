"""Keeps the outbox at a bounded length: the oldest entries go, the sequence goes on."""

from __future__ import annotations

import asyncio

import structlog

from training_common.artifacts.registry import ArtifactRegistry

log = structlog.get_logger(__name__)

# Publications take hours, so the outbox outgrows its length by little between two looks.
INTERVAL_S = 60.0
# Rows of one transaction: workers wait for the write lock meanwhile, a few milliseconds.
_BATCH = 1000


async def compact_forever(registry: ArtifactRegistry, *, keep_events: int, interval_s: float = INTERVAL_S) -> None:
    """Remove what is beyond the newest `keep_events` entries, now and then, until cancelled. 0 keeps all of them.

    A store that cannot be written is tried again at the next look.
    """
    while True:
        if keep_events:
            await _compact(registry, keep_events)
        await asyncio.sleep(interval_s)


async def _compact(registry: ArtifactRegistry, keep_events: int) -> None:
    removed = 0
    try:
        while count := await registry.database.run_write(lambda: registry.compact(keep=keep_events, limit=_BATCH)):
            removed += count
    except Exception as error:  # a longer outbox harms nobody until then
        log.warning("outbox not compacted", error=type(error).__name__)
    if removed:
        log.info("outbox compacted", removed_events=removed, keep_events=keep_events)
