"""Lifecycles and evaluations of agents

Versions that were published before get their row in `agents` when a server starts: it reads their manifests.

Revision: 0013
After: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("artifact_id", KEY, autoincrement=False, nullable=False),
        sa.Column("task", sa.String(length=48), nullable=False),
        sa.Column("lifecycle", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", name=op.f("pk_agents")),
    )
    op.create_index("ix_agents_task", "agents", ["task", "artifact_id"], unique=False)
    op.create_index("ix_agents_lifecycle", "agents", ["lifecycle", "artifact_id"], unique=False)
    op.create_table(
        "evaluations",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("artifact_id", KEY, nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("dataset", sa.String(length=128), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("caller", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index("ix_evaluations_artifact_id", "evaluations", ["artifact_id", "id"], unique=False)
    op.rename_table("alias_moves", "moves")
    with op.batch_alter_table("moves", schema=None) as batch_op:
        batch_op.alter_column("to_version", new_column_name="version", existing_type=sa.Integer(), nullable=False)
        batch_op.alter_column("alias", existing_type=sa.String(length=48), nullable=True)
        batch_op.add_column(sa.Column("from_lifecycle", sa.String(length=16), nullable=True))
        batch_op.add_column(sa.Column("to_lifecycle", sa.String(length=16), nullable=True))
        batch_op.create_index("ix_moves_family", ["family", "id"], unique=False)


def downgrade() -> None:
    op.execute(sa.text("DELETE FROM moves WHERE alias IS NULL"))
    with op.batch_alter_table("moves", schema=None) as batch_op:
        batch_op.drop_index("ix_moves_family")
        batch_op.drop_column("to_lifecycle")
        batch_op.drop_column("from_lifecycle")
        batch_op.alter_column("alias", existing_type=sa.String(length=48), nullable=False)
        batch_op.alter_column("version", new_column_name="to_version", existing_type=sa.Integer(), nullable=False)
    op.rename_table("moves", "alias_moves")
    op.drop_table("evaluations")
    op.drop_table("agents")
