"""How much a tenant may train in a day, and which base a job was made for."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("training_tokens_per_day", sa.BigInteger))
    op.add_column("training_jobs", sa.Column("base_digest", sa.String(64)))


def downgrade() -> None:
    op.drop_column("training_jobs", "base_digest")
    op.drop_column("tenants", "training_tokens_per_day")
