"""What a tenant stores: files, and what uploads that are not over were announced with. One rule for both, in SQL."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.errors import RateLimited
from app.training import tables

MAX_PENDING_UPLOADS = 100  # of a tenant: each may keep parts in the store for an hour


def require_room(connection: Connection, tenant: str, num_bytes: int, max_stored_bytes: int | None) -> None:
    """Raises RateLimited (`quota_exceeded`) where so many bytes more would be above the tenant's limit.

    What it says holds to the end of a transaction that holds the tenant's lock.
    """
    if max_stored_bytes is None:
        return
    files, uploads = tables.files, tables.uploads
    kept = sa.select(sa.func.coalesce(sa.func.sum(files.c.num_bytes), 0))
    announced = sa.select(sa.func.coalesce(sa.func.sum(uploads.c.num_bytes), 0))
    stored = int(connection.execute(kept.where(files.c.tenant == tenant, ~files.c.is_deleted)).scalar_one())
    stored += int(connection.execute(announced.where(_pending(tenant))).scalar_one())
    if stored + num_bytes > max_stored_bytes:
        message = f"Your files and uploads would take more than the {max_stored_bytes} bytes allowed. Delete some."
        raise RateLimited(message, code="quota_exceeded")


def require_upload(connection: Connection, tenant: str) -> None:
    """Raises RateLimited (`quota_exceeded`) where a tenant has too many uploads that are neither completed nor over."""
    pending = sa.select(sa.func.count()).select_from(tables.uploads).where(_pending(tenant))
    if connection.execute(pending).scalar_one() >= MAX_PENDING_UPLOADS:
        message = f"{MAX_PENDING_UPLOADS} uploads of this tenant are pending. Complete or cancel some."
        raise RateLimited(message, code="quota_exceeded")


def _pending(tenant: str) -> sa.ColumnElement[bool]:
    return (tables.uploads.c.tenant == tenant) & (tables.uploads.c.status == "pending")
