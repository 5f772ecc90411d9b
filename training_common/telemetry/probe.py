"""Looks at something that may be away, for a scrape that must answer all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from training_common.telemetry.readings import Reading

log = structlog.get_logger(__name__)

# Prometheus gives up after 10 s by default, and the listener has to answer before that.
PATIENCE_S = 2.0


class Probe:
    """Readings of one source, taken in a thread of its own. Those who ask while it looks share what it finds.

    A source that does not answer in time gives nothing, rather than what it gave before, and is not asked again while
    the last question is still open: threads do not pile up.
    """

    def __init__(self, name: str, look: Callable[[], Sequence[Reading]], *, patience_s: float = PATIENCE_S) -> None:
        self._name = name
        self._look = look
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"telemetry-{name}")
        self._looking: asyncio.Future[Sequence[Reading]] | None = None

    async def readings(self) -> Sequence[Reading] | None:
        """Return what the source says now, None where it says nothing."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(self._thread, self._look)
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            log.warning("telemetry source does not answer", source=self._name, waited_s=self._patience_s)
        except Exception as error:
            log.warning("telemetry source failed", source=self._name, error=type(error).__name__)
        return None

    def close(self) -> None:
        """Let go of the thread, without waiting for a source that does not answer."""
        self._thread.shutdown(wait=False, cancel_futures=True)
