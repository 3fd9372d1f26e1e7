"""The SQL tables of files, jobs and webhooks, on the shared metadata; made by the migration 0002_training.

Order is by `seq`, which only grows; times are for people. JSON columns hold what SQL never asks about.
"""

from __future__ import annotations

import sqlalchemy as sa

from app.database import metadata

# SQLite gives out row numbers itself only for its own INTEGER type.
Sequence = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Time = sa.Float(53)


def _seq() -> sa.Column[int]:
    return sa.Column("seq", Sequence, primary_key=True, autoincrement=True)


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.String(63), nullable=False, index=True)


def _job_id(*, primary_key: bool = False, index: bool = False) -> sa.Column[str]:
    key = sa.ForeignKey("training_jobs.id", ondelete="CASCADE")
    return sa.Column("job_id", key, nullable=False, primary_key=primary_key, index=index)


files = sa.Table(
    "training_files",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("expires_at", Time),
    sa.Column("is_deleted", sa.Boolean, nullable=False),  # the row stays: a page may continue after it
    sqlite_autoincrement=True,
)

uploads = sa.Table(
    "training_uploads",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("expires_at", Time, nullable=False),
    sa.Column("file_ttl_s", sa.Integer),
    sa.Column("file_id", sa.String(64)),
    sqlite_autoincrement=True,
)

upload_parts = sa.Table(
    "training_upload_parts",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("upload_id", sa.ForeignKey("training_uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sqlite_autoincrement=True,
)

jobs = sa.Table(
    "training_jobs",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("status", sa.String(24), nullable=False, index=True),
    sa.Column("unique_id", sa.String(8), nullable=False, unique=True),  # the last part of the model's name
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("metadata", sa.JSON),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("started_at", Time),
    sa.Column("finished_at", Time),
    # who works on it
    sa.Column("worker", sa.String(128)),
    sa.Column("fence", sa.BigInteger, nullable=False),
    sa.Column("heartbeat", sa.BigInteger, nullable=False),
    sa.Column("num_lost", sa.Integer, nullable=False),  # workers lost since the last durable progress
    sa.Column("resume_note", sa.String(16)),  # why it was put back: "lost", "paused", "released"
    # what is known so far
    sa.Column("config", sa.JSON),
    sa.Column("report", sa.JSON),
    sa.Column("state", sa.JSON),  # where the trainer's last durable state lies, and its step
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("total_steps", sa.Integer),
    sa.Column("total_tokens", sa.BigInteger),
    sa.Column("estimated_finish", Time),
    # how it ended
    sa.Column("is_publishing", sa.Boolean, nullable=False),
    sa.Column("fine_tuned_model", sa.String(512), unique=True),
    sa.Column("adapter_name", sa.String(63), nullable=False),
    sa.Column("adapter_version", sa.Integer),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("result_file", sa.String(64)),
    sa.Column("gate", sa.JSON),
    sa.Column("error", sa.JSON),
    sa.Column("base_digest", sa.String(64)),  # of the base that it trains; None is any
    sqlite_autoincrement=True,
)

job_metadata = sa.Table(
    "training_job_metadata",
    metadata,
    _job_id(primary_key=True),
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(512), nullable=False),
)

job_files = sa.Table(
    "training_job_files",  # content that a job needs until it is over, also when the file is deleted
    metadata,
    _job_id(primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
)

job_keys = sa.Table(
    "training_job_keys",
    metadata,
    sa.Column("tenant", sa.String(63), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    _job_id(),
    sa.Column("created_at", Time, nullable=False),
)

job_events = sa.Table(
    "training_job_events",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _job_id(index=True),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("type", sa.String(8), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON),
    sqlite_autoincrement=True,
)

job_metrics = sa.Table(
    "training_job_metrics",
    metadata,
    _job_id(primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("values", sa.JSON, nullable=False),
)

checkpoints = sa.Table(
    "training_checkpoints",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _job_id(),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("name", sa.String(512), nullable=False, unique=True),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("is_dropped", sa.Boolean, nullable=False),  # the row stays: a page may continue after it
    sa.UniqueConstraint("job_id", "step"),
    sqlite_autoincrement=True,
)

permissions = sa.Table(
    "training_checkpoint_permissions",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("checkpoint", sa.String(512), nullable=False, index=True),
    sa.Column("project_id", sa.String(63), nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("is_deleted", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)

turns = sa.Table(
    "training_turns",
    metadata,
    sa.Column("tenant", sa.String(63), primary_key=True),
    sa.Column("turn", sa.BigInteger, nullable=False),  # larger is later; 0 is never served
)

webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("event_types", sa.JSON, nullable=False),
    sa.Column("secret", sa.String(128), nullable=False),
    sa.Column("old_secret", sa.String(128)),
    sa.Column("old_secret_until", Time),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("updated_at", Time, nullable=False),
    sqlite_autoincrement=True,
)

webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    _seq(),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    _tenant(),
    sa.Column("endpoint_id", sa.ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("num_attempts", sa.Integer, nullable=False),
    sa.Column("due_at", Time, nullable=False, index=True),
    sa.Column("status", sa.String(16), nullable=False),  # "due", "done" or "given_up"
    sa.Column("created_at", Time, nullable=False),
    sqlite_autoincrement=True,
)
