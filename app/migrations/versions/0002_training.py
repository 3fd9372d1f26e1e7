"""Files, uploads, fine-tuning jobs with all that hangs on them, and webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "training_checkpoint_permissions",
    "training_files",
    "training_jobs",
    "training_turns",
    "training_uploads",
    "webhook_endpoints",
    "training_checkpoints",
    "training_job_events",
    "training_job_files",
    "training_job_keys",
    "training_job_metadata",
    "training_job_metrics",
    "training_upload_parts",
    "webhook_deliveries",
)  # in the order in which they are made


def upgrade() -> None:
    op.create_table(
        "training_checkpoint_permissions",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("checkpoint", sa.String(512), nullable=False),
        sa.Column("project_id", sa.String(63), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("is_deleted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_training_checkpoint_permissions"),
        sa.UniqueConstraint("id", name="uq_training_checkpoint_permissions_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_checkpoint_permissions_checkpoint", "training_checkpoint_permissions", ["checkpoint"])
    op.create_index("ix_training_checkpoint_permissions_tenant", "training_checkpoint_permissions", ["tenant"])
    op.create_table(
        "training_files",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("is_deleted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_training_files"),
        sa.UniqueConstraint("id", name="uq_training_files_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_files_tenant", "training_files", ["tenant"])
    op.create_table(
        "training_jobs",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("unique_id", sa.String(8), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("started_at", sa.Float(53)),
        sa.Column("finished_at", sa.Float(53)),
        sa.Column("worker", sa.String(128)),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("heartbeat", sa.BigInteger, nullable=False),
        sa.Column("num_lost", sa.Integer, nullable=False),
        sa.Column("resume_note", sa.String(16)),
        sa.Column("config", sa.JSON),
        sa.Column("report", sa.JSON),
        sa.Column("state", sa.JSON),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("total_steps", sa.Integer),
        sa.Column("total_tokens", sa.BigInteger),
        sa.Column("estimated_finish", sa.Float(53)),
        sa.Column("is_publishing", sa.Boolean, nullable=False),
        sa.Column("fine_tuned_model", sa.String(512)),
        sa.Column("adapter_name", sa.String(63), nullable=False),
        sa.Column("adapter_version", sa.Integer),
        sa.Column("trained_tokens", sa.BigInteger),
        sa.Column("result_file", sa.String(64)),
        sa.Column("gate", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.PrimaryKeyConstraint("seq", name="pk_training_jobs"),
        sa.UniqueConstraint("fine_tuned_model", name="uq_training_jobs_fine_tuned_model"),
        sa.UniqueConstraint("id", name="uq_training_jobs_id"),
        sa.UniqueConstraint("unique_id", name="uq_training_jobs_unique_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_jobs_status", "training_jobs", ["status"])
    op.create_index("ix_training_jobs_tenant", "training_jobs", ["tenant"])
    op.create_table(
        "training_turns",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("turn", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_training_turns"),
    )
    op.create_table(
        "training_uploads",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("file_ttl_s", sa.Integer),
        sa.Column("file_id", sa.String(64)),
        sa.PrimaryKeyConstraint("seq", name="pk_training_uploads"),
        sa.UniqueConstraint("id", name="uq_training_uploads_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_uploads_tenant", "training_uploads", ["tenant"])
    op.create_table(
        "webhook_endpoints",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event_types", sa.JSON, nullable=False),
        sa.Column("secret", sa.String(128), nullable=False),
        sa.Column("old_secret", sa.String(128)),
        sa.Column("old_secret_until", sa.Float(53)),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_webhook_endpoints"),
        sa.UniqueConstraint("id", name="uq_webhook_endpoints_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhook_endpoints_tenant", "webhook_endpoints", ["tenant"])
    op.create_table(
        "training_checkpoints",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("is_dropped", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_checkpoints_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_training_checkpoints"),
        sa.UniqueConstraint("id", name="uq_training_checkpoints_id"),
        sa.UniqueConstraint("job_id", "step", name="uq_training_checkpoints_job_id_step"),
        sa.UniqueConstraint("name", name="uq_training_checkpoints_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "training_job_events",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("type", sa.String(8), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_events_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_training_job_events"),
        sa.UniqueConstraint("id", name="uq_training_job_events_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_job_events_job_id", "training_job_events", ["job_id"])
    op.create_table(
        "training_job_files",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_files_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "sha256", name="pk_training_job_files"),
    )
    op.create_table(
        "training_job_keys",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_keys_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_training_job_keys"),
    )
    op.create_table(
        "training_job_metadata",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(512), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_metadata_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "key", name="pk_training_job_metadata"),
    )
    op.create_table(
        "training_job_metrics",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("step", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("values", sa.JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_metrics_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "step", name="pk_training_job_metrics"),
    )
    op.create_table(
        "training_upload_parts",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("upload_id", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"],
            ["training_uploads.id"],
            name="fk_training_upload_parts_upload_id_training_uploads",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_training_upload_parts"),
        sa.UniqueConstraint("id", name="uq_training_upload_parts_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_training_upload_parts_tenant", "training_upload_parts", ["tenant"])
    op.create_index("ix_training_upload_parts_upload_id", "training_upload_parts", ["upload_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("endpoint_id", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Float(53), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name="fk_webhook_deliveries_endpoint_id_webhook_endpoints",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_webhook_deliveries"),
        sa.UniqueConstraint("id", name="uq_webhook_deliveries_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhook_deliveries_due_at", "webhook_deliveries", ["due_at"])
    op.create_index("ix_webhook_deliveries_endpoint_id", "webhook_deliveries", ["endpoint_id"])
    op.create_index("ix_webhook_deliveries_tenant", "webhook_deliveries", ["tenant"])


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
