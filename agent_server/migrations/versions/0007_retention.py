"""What retention has left of a job, and indexes by which it finds what is old

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
        batch_op.add_column(sa.Column("first_sequence", sa.BigInteger(), server_default="1", nullable=False))
        batch_op.add_column(sa.Column("files_removed_us", sa.BigInteger(), nullable=True))
        batch_op.create_index("ix_jobs_end_us", ["end_us"], unique=False)
    with op.batch_alter_table("requests", schema=None) as batch_op:
        batch_op.create_index("ix_requests_create_us", ["create_us"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("requests", schema=None) as batch_op:
        batch_op.drop_index("ix_requests_create_us")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_end_us")
        batch_op.drop_column("files_removed_us")
        batch_op.drop_column("first_sequence")
