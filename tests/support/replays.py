"""Verifications that are only rows, and the workers that a server starts for them."""

from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.outbox import job_with_events
from training_common.jobs.store import JobStore
from training_common.jobs.verifications import VerificationStore
from training_common.store import tables as t
from training_common.store.database import Database


def stored_verification(database: Database, *, state: str, server: str = "") -> str:
    """Store a verification of a job that holds no worker, and return its name."""
    job = job_with_events(database, 1)
    with database.write() as connection:
        job_id = JobStore(database).get(job, connection).id
        saved = {"attempt": 1, "step": 1, "digest": "", "size_bytes": 1, "folder": "", "create_us": 1}
        key = connection.execute(sa.insert(t.checkpoints).values(job_id=job_id, **saved)).inserted_primary_key
        assert key is not None
        named = {"from_checkpoint_id": key[0], "to_checkpoint_id": key[0], "server": server, "create_us": 1}
        name = f"verifications/{job_id}"
        values = {"name": name, "job_id": job_id, "caller": "c", "state": state, **named}
        connection.execute(sa.insert(t.verifications).values(**values))
    return name


class Replays:
    """What a server does about verifications: how often it looked for one to start, and which it has started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.started: list[str] = []
        begin = VerificationStore.begin

        def look(store: VerificationStore, server: str, **options: Any) -> Any:
            found = begin(store, server, **options)
            self.looks += 1
            return found

        def launch(_engine: Any, arguments: Sequence[str], **_: Any) -> str:
            self.started.append(arguments[1])
            return "1:0"

        monkeypatch.setattr(VerificationStore, "begin", look)
        monkeypatch.setattr("training_common.engines.local.LocalEngine.launch", launch)
