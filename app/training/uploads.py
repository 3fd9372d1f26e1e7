"""Uploads: a large file in parts. Parts are blobs of their own until `complete` joins them into one file.

All calls block; thread-safe. A foreign id is an absent id.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from adapters.manifest import tenant_prefix
from adapters.store import BlobStore
from app.database import reading, writing
from app.errors import RequestInvalid
from app.training import job_rows, tables
from app.training.files import FileStore, FileTooLarge, NewFile, StoredFile, check_purpose
from app.training.job import new_id
from app.training.quota import require_room, require_upload

LIFETIME_S = 3600.0
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 10_000
MAX_COPIES = 3  # of an upload's bytes, in all its parts: one whose answer was lost is sent again


class UploadNotFound(RequestInvalid):
    """There is no such upload."""

    code = "not_found"


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload. `status`: pending, completed, cancelled or expired. Times in Unix seconds."""

    seq: int
    id: str
    tenant: str
    num_bytes: int
    filename: str
    purpose: str
    status: str
    created_at: float
    expires_at: float
    file_ttl_s: int | None
    file_id: str | None


@dataclass(frozen=True, slots=True)
class UploadPart:
    id: str
    upload_id: str
    created_at: float


class UploadStore:
    """Uploads of all tenants."""

    def __init__(
        self,
        engine: Engine,
        store: BlobStore,
        files: FileStore,
        *,
        scratch: Path,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._store, self._files, self._scratch, self._wall = engine, store, files, scratch, wall

    def create(self, tenant: str, new: NewFile, num_bytes: int, *, max_stored_bytes: int | None = None) -> Upload:
        """Announce a file of `num_bytes`; until the upload is over, they count as stored. `max_stored_bytes`: of all
        the tenant's files and uploads. Raises RequestInvalid, FileTooLarge, RateLimited (`quota_exceeded`).
        """
        check_purpose(new.purpose)
        if num_bytes > self._files.limits.max_upload_bytes:
            limit = self._files.limits.max_upload_bytes
            raise FileTooLarge(f"The file is larger than the {limit} bytes allowed here.", param="bytes")
        now, upload_id = self._wall(), new_id("upload_")
        with writing(self._engine) as connection:
            job_rows.lock_tenant(connection, tenant)
            require_upload(connection, tenant)
            require_room(connection, tenant, num_bytes, max_stored_bytes)
            connection.execute(
                sa.insert(tables.uploads).values(
                    id=upload_id,
                    tenant=tenant,
                    num_bytes=num_bytes,
                    filename=new.filename,
                    purpose=new.purpose,
                    status="pending",
                    created_at=now,
                    expires_at=now + LIFETIME_S,
                    file_ttl_s=new.ttl_s,
                )
            )
            return self._load(connection, tenant, upload_id)

    def add_part(self, tenant: str, upload_id: str, path: Path) -> UploadPart:
        """Keep one part. Raises UploadNotFound, FileTooLarge, RequestInvalid when the upload takes no more."""
        size = path.stat().st_size
        if size > MAX_PART_BYTES:
            raise FileTooLarge(f"A part has at most {MAX_PART_BYTES} bytes.", param="data")
        part = UploadPart(new_id("part_"), upload_id, self._wall())
        with reading(self._engine) as connection:
            self._require_room(connection, tenant, upload_id, size)
        key = _part_key(tenant, upload_id, part.id)
        self._store.put_if_absent(key, path)
        try:
            with writing(self._engine) as connection:
                job_rows.lock_tenant(connection, tenant)
                self._require_room(connection, tenant, upload_id, size)
                values = {"id": part.id, "tenant": tenant, "upload_id": upload_id, "num_bytes": size}
                connection.execute(sa.insert(tables.upload_parts).values(**values, created_at=part.created_at))
        except RequestInvalid:  # cancelled or filled meanwhile: no row tells of this part
            self._store.delete(key)
            raise
        return part

    def _require_room(self, connection: Connection, tenant: str, upload_id: str, size: int) -> None:
        upload = self._load(connection, tenant, upload_id)
        _require_pending(upload)
        parts = tables.upload_parts
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(parts.c.num_bytes), 0))
        count, total = connection.execute(query.where(parts.c.upload_id == upload_id)).one()
        if count >= MAX_PARTS:
            raise RequestInvalid(f"An upload has at most {MAX_PARTS} parts.", param="data")
        if total + size > MAX_COPIES * upload.num_bytes:
            raise RequestInvalid("The parts are far larger than the upload's bytes.", param="data")

    def complete(
        self,
        tenant: str,
        upload_id: str,
        part_ids: Sequence[str],
        *,
        md5: str | None = None,
    ) -> tuple[Upload, StoredFile]:
        """Join the parts, in the given order, into a file. Again, after its answer was lost, is fine."""
        with reading(self._engine) as connection:
            upload = self._load(connection, tenant, upload_id)
            if upload.status == "completed" and upload.file_id is not None:
                return upload, self._files.get(tenant, upload.file_id)
            _require_pending(upload)
            self._require_parts(connection, upload, part_ids)
        with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            whole = Path(directory) / "whole"
            self._join(upload, part_ids, whole, md5)
            new = NewFile(upload.filename, upload.purpose, upload.file_ttl_s)
            file = self._files.add(tenant, new, whole)  # it was given its room when it was announced
        done, mine = tables.uploads, tables.uploads.c.id == upload_id
        with writing(self._engine) as connection:
            pending = sa.update(done).where(mine, done.c.status == "pending")
            won = connection.execute(pending.values(status="completed", file_id=file.id)).rowcount == 1
            upload = self._load(connection, tenant, upload_id)
        if not won:  # somebody completed or cancelled it meanwhile
            self._files.delete(tenant, file.id)
            if upload.status != "completed" or upload.file_id is None:
                _require_pending(upload)
            return upload, self._files.get(tenant, str(upload.file_id))
        self._delete_parts(upload)
        return upload, file

    def _require_parts(self, connection: Connection, upload: Upload, part_ids: Sequence[str]) -> None:
        parts = tables.upload_parts
        query = sa.select(parts.c.id, parts.c.num_bytes).where(parts.c.upload_id == upload.id)
        sizes: dict[str, int] = {part_id: size for part_id, size in connection.execute(query)}
        if unknown := next((part_id for part_id in part_ids if part_id not in sizes), None):
            raise RequestInvalid(f"The upload has no part {unknown[:64]!r}.", param="part_ids")
        if len(set(part_ids)) != len(part_ids):
            raise RequestInvalid("A part is named twice.", param="part_ids")
        total = sum(sizes[part_id] for part_id in part_ids)
        if total != upload.num_bytes:
            message = f"The parts have {total} bytes together, the upload was announced with {upload.num_bytes}."
            raise RequestInvalid(message, param="part_ids")

    def _join(self, upload: Upload, part_ids: Sequence[str], whole: Path, md5: str | None) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        piece = whole.with_name("part")
        with open(whole, "wb") as target:
            for part_id in part_ids:
                self._store.download(_part_key(upload.tenant, upload.id, part_id), piece, max_bytes=MAX_PART_BYTES)
                data = piece.read_bytes()
                digest.update(data)
                target.write(data)
        if md5 is not None and digest.hexdigest() != md5.lower():
            raise RequestInvalid("The bytes received do not have this md5. Send the parts again.", param="md5")

    def cancel(self, tenant: str, upload_id: str) -> Upload:
        """Forget the upload and its parts. Again is fine. Raises RequestInvalid for one that is completed."""
        table = tables.uploads
        with writing(self._engine) as connection:
            upload = self._load(connection, tenant, upload_id)
            if upload.status == "cancelled":
                return upload
            _require_pending(upload)
            connection.execute(sa.update(table).where(table.c.id == upload_id).values(status="cancelled"))
            upload = self._load(connection, tenant, upload_id)
        self._delete_parts(upload)
        return upload

    def sweep(self) -> int:
        """End uploads that were never completed, and delete the parts of all that are over; return how many ended."""
        table, parts = tables.uploads, tables.upload_parts
        late = sa.update(table).where(table.c.status == "pending", table.c.expires_at <= self._wall())
        has_parts = sa.exists().where(parts.c.upload_id == table.c.id)
        with writing(self._engine) as connection:
            num_ended = connection.execute(late.values(status="expired")).rowcount
            over = sa.select(table).where(table.c.status != "pending", has_parts).limit(1000)
            left = [_upload(row) for row in connection.execute(over)]
        for upload in left:
            self._delete_parts(upload)
        return num_ended

    def _delete_parts(self, upload: Upload) -> None:
        """Of an upload that is over. The blobs go first: while there are rows, the sweep tries again."""
        parts = tables.upload_parts
        with reading(self._engine) as connection:
            ids = connection.execute(sa.select(parts.c.id).where(parts.c.upload_id == upload.id)).scalars().all()
        for part_id in ids:
            self._store.delete(_part_key(upload.tenant, upload.id, part_id))
        with writing(self._engine) as connection:
            connection.execute(sa.delete(parts).where(parts.c.upload_id == upload.id))

    def _load(self, connection: Connection, tenant: str, upload_id: str) -> Upload:
        """The upload, `expired` once its time is over. Raises UploadNotFound."""
        table = tables.uploads
        row = connection.execute(sa.select(table).where(table.c.tenant == tenant, table.c.id == upload_id)).first()
        if row is None:
            raise UploadNotFound
        upload = _upload(row)
        if upload.status == "pending" and upload.expires_at <= self._wall():
            return replace(upload, status="expired")
        return upload


def _upload(row: sa.Row[Any]) -> Upload:
    return Upload(**{name: row._mapping[name] for name in Upload.__slots__})


def _require_pending(upload: Upload) -> None:
    if upload.status != "pending":
        raise RequestInvalid(f"The upload is {upload.status}.", param="upload_id", code="invalid_upload_state")


def _part_key(tenant: str, upload_id: str, part_id: str) -> str:
    return f"{tenant_prefix(tenant)}uploads/{upload_id}/{part_id}"
