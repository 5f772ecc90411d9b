"""What retention has left of a job, indexes by which it finds what is old, and verifications

Revision: 0009
After: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("first_sequence", sa.BigInteger(), server_default="1", nullable=False))
        batch_op.add_column(sa.Column("files_removed_us", sa.BigInteger(), nullable=True))
        batch_op.create_index("ix_jobs_end_us", ["end_us"], unique=False)
    with op.batch_alter_table("requests", schema=None) as batch_op:
        batch_op.create_index("ix_requests_create_us", ["create_us"], unique=False)
    op.create_table(
        "verifications",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("caller", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("from_checkpoint_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("to_checkpoint_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("server", sa.String(length=255), nullable=False),
        sa.Column("handle", sa.String(length=255), nullable=False),
        sa.Column("heartbeat_us", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=True),
        sa.Column("end_us", sa.BigInteger(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("receipt", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_verifications_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["from_checkpoint_id"], ["checkpoints.id"], name=op.f("fk_verifications_from_checkpoint_id_checkpoints")
        ),
        sa.ForeignKeyConstraint(
            ["to_checkpoint_id"], ["checkpoints.id"], name=op.f("fk_verifications_to_checkpoint_id_checkpoints")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_verifications")),
        sa.UniqueConstraint("name", name=op.f("uq_verifications_name")),
    )
    op.create_index("ix_verifications_job_id", "verifications", ["job_id"], unique=False)
    op.create_index("ix_verifications_state", "verifications", ["state"], unique=False)


def downgrade() -> None:
    op.drop_table("verifications")
    with op.batch_alter_table("requests", schema=None) as batch_op:
        batch_op.drop_index("ix_requests_create_us")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_end_us")
        batch_op.drop_column("files_removed_us")
        batch_op.drop_column("first_sequence")
