"""A mutation over gRPC: done once for its request id, its answer stored in the transaction of its change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import Message

from training_common.jobs.store import once
from training_common.rpc.identity import current_caller
from training_common.store.database import Database


async def mutate(database: Database, method: str, request: Any, work: Callable[[sa.Connection], Message]) -> bytes:
    """Do `work` once for the caller's request id, and return the answer's bytes, replayed or new.

    Errors: RequestIdReusedError, and those of `work`: then nothing is stored.
    """
    caller, payload = current_caller().name, payload_of(request)

    def transact() -> bytes:
        with database.write() as connection:
            return once(
                connection,
                caller=caller,
                request_id=request.request_id,
                method=method,
                payload=payload,
                work=lambda: work(connection).SerializeToString(),
            )

    return await database.run_write(transact)


def payload_of(request: Any) -> bytes:
    """Return what must be the same when a request_id comes again: all but the id, which may be spelt in capitals."""
    plain = type(request)()
    plain.CopyFrom(request)
    plain.ClearField("request_id")
    payload: bytes = plain.SerializeToString(deterministic=True)
    return payload
