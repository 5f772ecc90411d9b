"""Jobs that wait for something outside their service

Revision: 0002
After: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("not_before_us", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("waits", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("waiting_since_us", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("waiting_since_us")
        batch_op.drop_column("waits")
        batch_op.drop_column("not_before_us")
