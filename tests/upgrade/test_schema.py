"""Code of the release before this one on the schema of this one: both services, both stores, while jobs run."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from cognateforge.job.v1 import job_pb2
from tests.support.light_worker import expected_weights
from tests.support.postgres import PostgresServer
from tests.support.previous import Release, light
from tests.upgrade.calls import client_of, fetch, start, steer, wait_for, watch
from tests.upgrade.conftest import Servers
from training_common.store.database import Database
from training_common.store.revisions import current, head

# All that an expanding migration may do, to every table that older code writes.
EXPANDING = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"
TABLES = ("jobs", "events", "attempts", "checkpoints", "requests", "artifacts", "artifact_events")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("later", sa.Integer, nullable=True))
        op.add_column(table, sa.Column("defaulted", sa.Integer, nullable=False, server_default="7"))
    op.create_table("later_things", sa.Column("id", sa.Integer, primary_key=True))
    op.create_index("ix_jobs_later", "jobs", ["later"])
"""


@pytest.fixture(scope="module")
def releases(old: Release, new: Release, tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    """Return the release before and this one, which brings one more migration than it has."""
    folder = tmp_path_factory.mktemp("releases")
    before, after = light(old, folder / "before"), light(new, folder / "after")
    for service in ("cognate", "agent"):
        migrations = folder / "after" / f"{service}_server" / "migrations"
        (migrations / "versions" / "9999_later.py").write_text(EXPANDING.format(head=head(migrations)))
    return before, after


@pytest.mark.slow
@pytest.mark.timeout(300)
# Each service and each kind of store once: `tests.store.test_migrations` has all four.
@pytest.mark.parametrize(("service", "kind"), [("cognate", "sqlite"), ("agent", "postgresql")])
def test_the_previous_release_works_on_the_schema_of_this_one(
    service: str,
    kind: str,
    releases: tuple[Release, Release],
    servers: Servers,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """It goes on while the store is upgraded, starts again on what it finds, and this release ends what it began."""
    before, after = releases
    settings = {}
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        settings = {"STORE_URL": postgres.new_database()}
    if service == "agent":
        server = servers.add("cognate", tmp_path / "cognate")
        settings["COGNATE__ADDRESS"] = server.start(before)
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "weights.txt").write_bytes(b"w" * 1000)
        server.publish(before, tmp_path / "files")
    server = servers.add(service, tmp_path / service, WORKERS__SLOTS="2", **settings)
    server.start(before)
    with client_of(service, server.address) as client:
        first = start(client, steps=40, step_ms=50)
        watch(client, first, until_step=3)
        database = Database(server.store_url)
        migrations = Path(after.environment["PYTHONPATH"]) / f"{service}_server" / "migrations"
        database.upgrade(migrations)
        seen = watch(client, first)
        assert (True, 1, 1) == (seen.contiguous, seen.succeeded, seen.attempts)
        second = start(client, steps=40, step_ms=50)
        watch(client, second, until_step=6)
        steer(client, "Pause", second)
        wait_for(client, second, job_pb2.JOB_STATE_PAUSED)
        assert 0 == server.stop()
        server.start(before)
        assert 1 == watch(client, start(client, steps=2, step_ms=1)).succeeded
    server.stop()
    server.start(after)
    with client_of(service, server.address) as client:
        steer(client, "Resume", second)
        seen = watch(client, second)
        assert (True, 1, 2) == (seen.contiguous, seen.succeeded, seen.attempts), seen
        told = {
            name: fetch(client, name, tmp_path / name) for name in (watch(client, first).published + seen.published)
        }
    assert [before.version, after.version] == [one.manifest["code"]["version"] for one in told.values()]
    assert {expected_weights(40)} == {(one.path / "weights.txt").read_bytes() for one in told.values()}
    with database.read() as connection:
        assert "9999" == current(connection)
        # Rows of the older release have what the schema gives them.
        assert {(None, 7)} == set(connection.execute(sa.text("SELECT later, defaulted FROM jobs")).all())
    database.close()
