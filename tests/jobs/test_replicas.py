"""Several servers over one PostgreSQL: every job once, whoever is killed."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.postgres import PostgresServer
from tests.support.replicas import run_through_kills
from tests.support.toy_service import ToyService
from training_common.jobs.states import JobState


@pytest.mark.slow
def test_servers_that_share_a_store_do_every_job_once(postgres: PostgresServer, tmp_path: Path) -> None:
    """Three servers, killed at random with or without their workers. The bench `replicas` does it with 500 jobs."""
    outcome = run_through_kills(tmp_path, postgres.new_database(), jobs=15, replicas=3, seed=3, timeout_s=150)
    print(outcome)
    assert {"SUCCEEDED": 15} == dict(outcome.states), outcome
    assert ([], [], []) == (outcome.done_twice, outcome.wrong_result, outcome.gaps)
    assert outcome.server_kills >= 3


def test_a_writer_that_is_stopped_holds_no_row_for_ever(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends a transaction that nothing comes from, so that its job can be taken away from it."""
    monkeypatch.setattr("training_common.store.database._IDLE_TRANSACTION_S", 1)
    service = ToyService(tmp_path, store_url=postgres.new_database())
    job = service.submit(steps=3)
    service.store.begin_attempt("here")
    held, attempt = service.store.held()[0]
    stopped = service.store.attempt(job.name, attempt.number, held.fencing_token)
    with pytest.raises(sa.exc.OperationalError), service.database.write() as connection:
        stopped.move_in(connection, JobState.RUNNING)
        after = service.store.cut(held, attempt, message="given up by the test")
        assert after is not None
    assert JobState.RECOVERING is service.store.get(job.name).state
    service.database.close()
