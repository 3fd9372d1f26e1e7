"""Picks the blob store's class by its URL; the one place that does."""

from __future__ import annotations

from collections.abc import Callable

from adapters.store import BlobStore, DirectoryStore
from app.settings import FileLocation, Settings


def open_store(settings: Settings, *, on_call: Callable[[str, str, float], None] | None = None) -> BlobStore:
    """The store that the settings name. `on_call(op, outcome, seconds)` is told of every S3 call. Raises StoreError."""
    where = settings.store_location
    if isinstance(where, FileLocation):
        return DirectoryStore(where.path)
    from adapters.s3 import S3Store  # boto3 takes half a second to import

    return S3Store(
        where.bucket,
        where.prefix,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        addressing_style=settings.s3_addressing_style,
        connect_timeout_s=settings.s3_connect_timeout_s,
        read_timeout_s=settings.s3_read_timeout_s,
        object_timeout_s=settings.s3_object_timeout_s,
        max_attempts=settings.s3_max_attempts,
        pool_connections=settings.loader_workers + 12,  # the loader's, and those of the API's worker threads
        upload_checksums=settings.s3_upload_checksums,
        on_call=on_call,
    )
