"""Tenants, their limits and API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

LIMITS = (
    "max_waiting",
    "max_running",
    "requests_per_minute",
    "tokens_per_minute",
    "max_adapters",
    "max_storage_bytes",
    "max_jobs",
)


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("erased_at", sa.Float(53)),
        *(sa.Column(name, sa.BigInteger) for name in LIMITS),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("all_tenants", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("revoked_at", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "api_key_tenants",
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "tenant_id", name="pk_api_key_tenants"),
        sa.ForeignKeyConstraint(
            ["key_id"], ["api_keys.id"], name="fk_api_key_tenants_key_id_api_keys", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_api_key_tenants_tenant_id_tenants"),
    )
    op.create_index("ix_api_key_tenants_tenant_id", "api_key_tenants", ["tenant_id"])


def downgrade() -> None:
    op.drop_table("api_key_tenants")
    op.drop_table("api_keys")
    op.drop_table("tenants")
