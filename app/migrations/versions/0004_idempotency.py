"""Answers that are given again under one Idempotency-Key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("claimed_at", sa.Float(53), nullable=False),
        sa.Column("answer", sa.JSON(none_as_null=True)),
    )


def downgrade() -> None:
    op.drop_table("idempotency_keys")
