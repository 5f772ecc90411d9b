"""Jobs that train on several machines

Revision: 0014
After: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("nodes", sa.Integer(), server_default="1", nullable=False))
        batch_op.add_column(sa.Column("slots", sa.Integer(), server_default="1", nullable=False))
    # So far every process has taken a slot.
    op.execute("UPDATE jobs SET slots = processes")


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("slots")
        batch_op.drop_column("nodes")
