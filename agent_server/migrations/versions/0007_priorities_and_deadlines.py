"""Priorities, deadlines, what a job waits for, and how fast attempts were

Revision: 0007
After: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("waits_for", sa.String(length=64), server_default="", nullable=False))
        batch_op.add_column(sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("queue_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("start_by_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("finish_by_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("deadline_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("configuration", sa.String(length=64), server_default="", nullable=False))
        batch_op.create_index(batch_op.f("ix_jobs_deadline_us"), ["deadline_us"], unique=False)
        batch_op.create_index("ix_jobs_configuration_id", ["configuration", "id"], unique=False)
        batch_op.create_index("ix_jobs_queue", ["queue_us", "id", "not_before_us"], unique=False)
    # Jobs that wait keep their order.
    op.execute("UPDATE jobs SET queue_us = create_us WHERE state IN ('QUEUED', 'RECOVERING')")
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("steps_per_s", sa.Float(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.drop_column("steps_per_s")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_queue")
        batch_op.drop_index("ix_jobs_configuration_id")
        batch_op.drop_index(batch_op.f("ix_jobs_deadline_us"))
        batch_op.drop_column("configuration")
        batch_op.drop_column("deadline_us")
        batch_op.drop_column("finish_by_us")
        batch_op.drop_column("start_by_us")
        batch_op.drop_column("queue_us")
        batch_op.drop_column("priority")
        batch_op.drop_column("waits_for")
