"""How versions are kept, what they are looked for by, and what descends from what

Results and sources of versions that were published before are written when a server starts: it reads manifests.

Revision: 0015
After: 0014
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

# Indices of a few rows each: name, and which rows.
FEW = (
    ("ix_artifacts_pinned", "pinned IS 1", "pinned IS true"),
    ("ix_artifacts_damage", "damage != ''", "damage != ''"),
)


def upgrade() -> None:
    with op.batch_alter_table("artifacts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("tier", sa.String(length=16), server_default="STANDARD", nullable=False))
        batch_op.add_column(sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("verify_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("damage", sa.String(length=500), server_default="", nullable=False))
        batch_op.add_column(sa.Column("collect_us", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("signature", sa.LargeBinary(), nullable=True))
        batch_op.add_column(sa.Column("key", sa.String(length=71), server_default="", nullable=False))
        batch_op.create_index("ix_artifacts_create_us", ["create_us", "id"], unique=False)
        batch_op.create_index("ix_artifacts_size_bytes", ["size_bytes", "id"], unique=False)
        batch_op.create_index("ix_artifacts_family", ["family", "id"], unique=False)
        batch_op.create_index("ix_artifacts_tier", ["tier", "id"], unique=False)
    for name, sqlite, postgresql in FEW:
        op.create_index(name, "artifacts", ["id"], sqlite_where=sa.text(sqlite), postgresql_where=sa.text(postgresql))
    op.create_table(
        "results",
        sa.Column("artifact_id", KEY, nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("dataset", sa.String(length=128), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name=op.f("fk_results_artifact_id_artifacts")),
        sa.PrimaryKeyConstraint("artifact_id", "metric", "dataset", name=op.f("pk_results")),
    )
    op.create_index("ix_results_metric", "results", ["metric", "dataset", "value", "artifact_id"], unique=False)
    op.create_table(
        "sources",
        sa.Column("artifact_id", KEY, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name=op.f("fk_sources_artifact_id_artifacts")),
        sa.PrimaryKeyConstraint("artifact_id", "name", "digest", name=op.f("pk_sources")),
    )
    op.create_index("ix_sources_name", "sources", ["name", "artifact_id"], unique=False)
    op.create_index("ix_sources_digest", "sources", ["digest", "artifact_id"], unique=False)
    op.create_table(
        "dependents",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("artifact_id", KEY, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dependents")),
        sa.UniqueConstraint("artifact_id", "name", "owner", name=op.f("uq_dependents_artifact_id")),
    )


def downgrade() -> None:
    op.drop_table("dependents")
    op.drop_table("sources")
    op.drop_table("results")
    for name, *_ in FEW:
        op.drop_index(name, "artifacts")
    with op.batch_alter_table("artifacts", schema=None) as batch_op:
        batch_op.drop_index("ix_artifacts_tier")
        batch_op.drop_index("ix_artifacts_family")
        batch_op.drop_index("ix_artifacts_size_bytes")
        batch_op.drop_index("ix_artifacts_create_us")
        for name in ("key", "signature", "collect_us", "damage", "verify_us", "pinned", "tier"):
            batch_op.drop_column(name)
