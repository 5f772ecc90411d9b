"""Waiting for what another thread, task or process does."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def until(check: Callable[[], bool | Awaitable[bool]], timeout_s: float = 5) -> None:
    """Ask until the answer is yes. Errors: AssertionError, after so many seconds."""
    end = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)
