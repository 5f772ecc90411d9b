"""Reservations, and the columns of jobs that both services have

Revision: 0012
After: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
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
    op.create_table(
        "reservations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("caller", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=200), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=False),
        sa.Column("end_us", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("cancel_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
        sa.UniqueConstraint("name", name=op.f("uq_reservations_name")),
    )
    with op.batch_alter_table("reservations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_reservations_end_us"), ["end_us"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("reservations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_reservations_end_us"))
    op.drop_table("reservations")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_tenant_queue")
        batch_op.drop_index(batch_op.f("ix_jobs_reservation"))
        batch_op.drop_column("reservation")
        batch_op.drop_column("memory_bytes")
        batch_op.drop_column("cores")
        batch_op.drop_column("tenant")
