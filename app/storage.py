"""From settings to what server, worker and command line use alike: the blob store and the limits. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters.checked import DoorLimits
from adapters.store import BlobStore, DirectoryStore
from app.settings import FileLocation, Settings

if TYPE_CHECKING:
    from app.tenants import TenantLimits


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


def door_limits(settings: Settings) -> DoorLimits:
    """What an adapter may be."""
    return DoorLimits(
        max_rank=settings.max_rank, max_scale=settings.max_scale, max_file_bytes=settings.max_adapter_bytes
    )


def default_limits(settings: Settings) -> TenantLimits:
    """What holds where a tenant's own row says nothing."""
    from app.tenants import LIMIT_NAMES, TenantLimits

    return TenantLimits(**{name: getattr(settings, f"tenant_{name}") for name in LIMIT_NAMES})
