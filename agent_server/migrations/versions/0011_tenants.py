"""Tenants, and what jobs take of the capacity

Revision: 0011
After: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("tenant", sa.String(length=48), server_default="", nullable=False))
        batch_op.add_column(sa.Column("cores", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("memory_bytes", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("reservation", sa.String(length=64), server_default="", nullable=False))
        batch_op.create_index(batch_op.f("ix_jobs_reservation"), ["reservation"], unique=False)
        batch_op.create_index(
            "ix_jobs_tenant_queue",
            ["tenant", "queue_us", "id"],
            unique=False,
            sqlite_where=sa.text("queue_us IS NOT NULL"),
            postgresql_where=sa.text("queue_us IS NOT NULL"),
        )


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_tenant_queue")
        batch_op.drop_index(batch_op.f("ix_jobs_reservation"))
        batch_op.drop_column("reservation")
        batch_op.drop_column("memory_bytes")
        batch_op.drop_column("cores")
        batch_op.drop_column("tenant")
