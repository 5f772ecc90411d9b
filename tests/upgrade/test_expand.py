"""Migrations after the first release that others are updated from: they expand, or say that they contract."""

import shutil
from pathlib import Path

import pytest

import agent_server.migrations
import cognate_server.migrations
from tests.support.migration_lint import complaints
from training_common.store.revisions import head

SERVICES = {
    "cognate": Path(cognate_server.migrations.__file__).parent,
    "agent": Path(agent_server.migrations.__file__).parent,
}
# The newest revision of the first release whose successor had to run beside it. Those before it are history.
FIRST = "0016"
LATER = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"
{contracts}

def upgrade() -> None:
    {change}
"""


def later(service: str, folder: Path, change: str, contracts: str = "") -> Path:
    migrations = shutil.copytree(SERVICES[service], folder / "migrations")
    text = LATER.format(head=head(migrations), change=change, contracts=contracts)
    (migrations / "versions" / "9999_later.py").write_text(text)
    return migrations


@pytest.mark.parametrize("service", SERVICES)
def test_every_migration_leaves_room_for_the_release_before_it(service: str) -> None:
    """Older servers and workers go on, and start again, beside the schema that it makes."""
    assert {} == complaints(SERVICES[service], after=FIRST)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ('op.add_column("jobs", sa.Column("x", sa.Integer, nullable=False))', "adds jobs.x"),
        ('op.drop_column("jobs", "observed")', "DropColumnOp jobs"),
        ('op.drop_table("artifact_events")', "DropTableOp artifact_events"),
        ('op.drop_index("ix_jobs_state", "jobs")', "DropIndexOp jobs"),
        ('op.rename_table("jobs", "work")', "RenameTableOp jobs"),
        ('op.create_index("ix_x", "jobs", ["caller"], unique=True)', "a unique index to jobs"),
        ('op.execute("UPDATE jobs SET wish = 0")', "ExecuteSQLOp UPDATE jobs"),
        ('op.get_bind().exec_driver_sql("DELETE FROM jobs")', "a statement of its own: DELETE FROM jobs"),
        ('with op.batch_alter_table("jobs") as b: b.alter_column("wish", nullable=True)', "AlterColumnOp jobs"),
    ],
)
def test_what_older_code_may_trip_over_is_found(change: str, word: str, tmp_path: Path) -> None:
    """The rule above is able to fail; a migration that says that it contracts may do all of it."""
    found = complaints(later("cognate", tmp_path / "a", change), after=FIRST)
    assert ["9999"] == list(found)
    assert any(word in told for told in found["9999"]), found
    assert {} == complaints(later("cognate", tmp_path / "b", change, "contracts = True\n"), after=FIRST)


@pytest.mark.parametrize(
    "change",
    [
        'op.add_column("jobs", sa.Column("x", sa.Integer))',
        'op.add_column("jobs", sa.Column("x", sa.Integer, nullable=False, server_default="0"))',
        'op.create_index("ix_x", "jobs", ["caller"])',
        'op.create_table("x", sa.Column("a", sa.Integer)); op.create_index("ix_x", "x", ["a"], unique=True)',
        'with op.batch_alter_table("jobs") as b: b.add_column(sa.Column("x", sa.Integer))',
    ],
)
def test_what_only_adds_is_let_through(change: str, tmp_path: Path) -> None:
    """Also in a batch."""
    assert {} == complaints(later("agent", tmp_path, change), after=FIRST)
