"""Attempts on borrowed capacity

Revision: 0003
After: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("lease", sa.String(length=64), server_default="", nullable=False))
        batch_op.add_column(sa.Column("lease_token", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("lease_until_us", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("lease_until_us")
        batch_op.drop_column("lease_token")
        batch_op.drop_column("lease")
