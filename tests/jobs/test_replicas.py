"""Several servers over one PostgreSQL: every job once, whoever is killed."""

from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer
from tests.support.replicas import run_through_kills


@pytest.mark.slow
def test_servers_that_share_a_store_do_every_job_once(postgres: PostgresServer, tmp_path: Path) -> None:
    """Three servers, killed at random with or without their workers. The bench `replicas` does it with 500 jobs."""
    outcome = run_through_kills(tmp_path, postgres.new_database(), jobs=24, replicas=3, seed=3, timeout_s=150)
    print(outcome)
    assert {"SUCCEEDED": 24} == dict(outcome.states), outcome
    assert ([], [], []) == (outcome.done_twice, outcome.wrong_result, outcome.gaps)
    assert outcome.server_kills >= 3
