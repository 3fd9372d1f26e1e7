"""Files: rows in SQL, content in the blob store under its sha256. What a job pins stays until the job is over.

All calls block; thread-safe. A foreign id is an absent id.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from adapters.collect import BlobCollector
from adapters.errors import ObjectNotFound, ObjectTooLarge, StoreError
from adapters.manifest import blob_key
from adapters.store import BlobStore
from app.database import reading, writing
from app.errors import RateLimited, RequestInvalid
from app.training import job_rows, tables
from app.training.dataset import EncodingCheck, FileFault
from app.training.faults import ContentLost
from app.training.job import JobStatus, new_id
from app.training.job_rows import Page
from app.training.quota import require_room
from app.training.spec import PinnedFile

logger = logging.getLogger(__name__)

TRAINING_PURPOSE = "fine-tune"
RESULT_PURPOSE = "fine-tune-results"
CHUNK_BYTES = 1 << 20
MAX_FILENAME_CHARS = 512


_OVER = tuple(status.value for status in JobStatus if status.is_over)


class FileNotFound(RequestInvalid):
    """There is no such file."""

    code = "not_found"


class FileTooLarge(RequestInvalid):
    """The file is larger than allowed here. Send it by /v1/uploads, or split it."""

    code = "file_too_large"


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Sizes in bytes."""

    max_file_bytes: int = 512 * 10**6
    max_upload_bytes: int = 8 * 10**9
    max_unpacked_bytes: int = 8 << 30  # of a gzip file's content


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a tenant. Times in Unix seconds."""

    seq: int
    id: str
    tenant: str
    sha256: str
    num_bytes: int
    filename: str
    purpose: str
    created_at: float
    expires_at: float | None

    @property
    def pinned(self) -> PinnedFile:
        return PinnedFile(self.id, self.sha256, self.num_bytes)


@dataclass(frozen=True, slots=True)
class NewFile:
    """What a client says of a file. `ttl_s`: it is deleted so long after its creation."""

    filename: str
    purpose: str = TRAINING_PURPOSE
    ttl_s: int | None = None


class FileStore:
    """The files of all tenants. Invariant: the blob of a listed file, or of one pinned by a live job, exists."""

    def __init__(
        self,
        engine: Engine,
        store: BlobStore,
        *,
        limits: FileLimits = FileLimits(),
        collector: BlobCollector | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`collector`: shared with whatever else names blobs in this store; None where nothing does."""
        self._engine, self._store, self.limits, self._wall = engine, store, limits, wall
        self._collector = BlobCollector(store) if collector is None else collector
        self._collector.ask(self._needed)

    def add(self, tenant: str, new: NewFile, path: Path, *, max_stored_bytes: int | None = None) -> StoredFile:
        """Check and keep the file at `path` (which stays the caller's). `max_stored_bytes`: of all the tenant's files.

        Raises RequestInvalid (wrong purpose, encoding), FileTooLarge, RateLimited (`quota_exceeded`), StoreError.
        """
        check_purpose(new.purpose)
        num_bytes = path.stat().st_size
        if num_bytes > self.limits.max_upload_bytes:
            raise FileTooLarge(param="file")
        self._check_encoding(path)
        return self._keep(tenant, new, path, sha256_of(path), num_bytes, max_stored_bytes)

    def add_result(self, tenant: str, filename: str, path: Path) -> StoredFile:
        """Keep a job's result file. The tenant's limit does not stop it: the work is done."""
        new = NewFile(filename, RESULT_PURPOSE)
        return self._keep(tenant, new, path, sha256_of(path), path.stat().st_size, None)

    def _check_encoding(self, path: Path) -> None:
        with open(path, "rb") as source:
            try:
                EncodingCheck(max_unpacked_bytes=self.limits.max_unpacked_bytes).check(source)
            except FileFault as fault:
                message = f"The file cannot be used: {fault.finding.sentence()}"
                raise RequestInvalid(message, param="file", code=fault.finding.code.value) from fault

    def _keep(
        self, tenant: str, new: NewFile, path: Path, sha256: str, num_bytes: int, max_stored_bytes: int | None
    ) -> StoredFile:
        with reading(self._engine) as connection:  # before anything goes to the store
            require_room(connection, tenant, num_bytes, max_stored_bytes)
        key, now = blob_key(tenant, sha256), self._wall()
        values = {
            "id": new_id("file-"),
            "tenant": tenant,
            "sha256": sha256,
            "num_bytes": num_bytes,
            "filename": new.filename,
            "purpose": new.purpose,
            "created_at": now,
            "expires_at": None if new.ttl_s is None else now + new.ttl_s,
            "is_deleted": False,
        }
        self._store.put_if_absent(key, path)
        try:
            file = self._insert(values, max_stored_bytes)
        except RateLimited:  # others took the room meanwhile
            self._collector.collect(tenant, [sha256])
            raise
        # Nothing waits for the store with the database's lock in its hand: a delete of the same content may have come
        # between, but from here on the collector knows of this file.
        if not self._collector.is_kept(tenant, sha256):
            self._store.put_if_absent(key, path)
        return file

    def _insert(self, values: Mapping[str, Any], max_stored_bytes: int | None) -> StoredFile:
        table = tables.files
        with writing(self._engine) as connection:
            # Of two files for which there is room for one, one stays.
            job_rows.lock_tenant(connection, values["tenant"])
            require_room(connection, values["tenant"], values["num_bytes"], max_stored_bytes)
            connection.execute(sa.insert(table).values(**values))
            return file_of(connection.execute(sa.select(table).where(table.c.id == values["id"])).one())

    # ---- looking

    def get(self, tenant: str, file_id: str, *, param: str | None = None) -> StoredFile:
        """Raises FileNotFound."""
        table = tables.files
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(table).where(_live(tenant), table.c.id == file_id)).first()
        if row is None or self._has_expired(file_of(row)):
            raise FileNotFound(param=param)
        return file_of(row)

    def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        asc: bool = False,
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        table = tables.files
        not_expired = table.c.expires_at.is_(None) | (table.c.expires_at > self._wall())
        query = sa.select(table).where(_live(tenant), not_expired)
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        with reading(self._engine) as connection:
            start = job_rows.position(connection, table, table.c.tenant == tenant, after)
            rows, more = job_rows.page(connection, query, table.c.seq, after=start, limit=limit, asc=asc)
            return Page(tuple(map(file_of, rows)), more)

    def content(self, file: StoredFile) -> Iterator[bytes]:
        """The file's bytes in chunks; each `next` blocks."""
        key = blob_key(file.tenant, file.sha256)
        for start in range(0, file.num_bytes, CHUNK_BYTES):
            yield self._store.get_range(key, start, CHUNK_BYTES)

    def fetch(self, tenant: str, pinned: PinnedFile, path: Path) -> None:
        """Write a pinned file's content to `path` and check its digest. Raises StoreError, ContentLost for good."""
        try:
            self._store.download(blob_key(tenant, pinned.sha256), path, max_bytes=pinned.num_bytes)
        except ObjectNotFound as exc:
            raise ContentLost(f"The stored content of {pinned.id} is missing.") from exc
        except ObjectTooLarge as exc:
            raise ContentLost(f"The stored content of {pinned.id} is not what was uploaded.") from exc
        if sha256_of(path) != pinned.sha256:
            raise ContentLost(f"The stored content of {pinned.id} is not what was uploaded.")

    # ---- deleting

    def delete(self, tenant: str, file_id: str) -> None:
        """Unlist the file; its content goes with it unless another file or a live job needs it. Raises FileNotFound."""
        self.get(tenant, file_id)
        self._drop(tenant, file_id)

    def sweep(self) -> int:
        """Delete what has expired; return how many files. Any process, any time."""
        table = tables.files
        due = sa.select(table.c.tenant, table.c.id).where(~table.c.is_deleted, table.c.expires_at <= self._wall())
        with reading(self._engine) as connection:
            rows = connection.execute(due.limit(1000)).all()
        for tenant, file_id in rows:
            self._drop(tenant, file_id)
        return len(rows)

    def _drop(self, tenant: str, file_id: str) -> None:
        table = tables.files
        mine = _live(tenant) & (table.c.id == file_id)
        with writing(self._engine) as connection:
            job_rows.lock_tenant(connection, tenant)  # no job is being made of it
            sha256 = connection.execute(sa.select(table.c.sha256).where(mine)).scalar()
            if sha256 is None:
                return
            connection.execute(sa.update(table).where(mine).values(is_deleted=True))
        try:
            self._collector.collect(tenant, [sha256])
        except StoreError:
            with writing(self._engine) as connection:  # listed again: who deletes it again deletes its content, too
                connection.execute(sa.update(table).where(table.c.id == file_id).values(is_deleted=False))
            raise
        logger.info("file deleted", extra={"action": "file_deleted", "file": file_id})

    def collect_unpinned(self) -> int:
        """Drop the pins of jobs that are over, and content that was deleted while they held it; return how many pins.

        Any process, any time.
        """
        jobs, pins = tables.jobs, tables.job_files
        query = sa.select(jobs.c.tenant, pins.c.job_id, pins.c.sha256).join(jobs, jobs.c.id == pins.c.job_id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.where(jobs.c.status.in_(_OVER)).limit(500)).all()
        for tenant, job_id, sha256 in rows:
            if not self._needed(tenant, {sha256}):
                self._collector.collect(tenant, [sha256])
            with writing(self._engine) as connection:
                pin = (pins.c.job_id == job_id) & (pins.c.sha256 == sha256)
                connection.execute(sa.delete(pins).where(pin))
        return len(rows)

    def _needed(self, tenant: str, asked: Set[str]) -> Set[str]:
        """Those of `asked` that a listed file has or a live job pins."""
        with reading(self._engine) as connection:
            return {sha256 for sha256 in asked if _is_needed(connection, tenant, sha256)}

    def _has_expired(self, file: StoredFile) -> bool:
        return file.expires_at is not None and file.expires_at <= self._wall()


def check_purpose(purpose: str) -> None:
    """Raises RequestInvalid for a purpose that no route here has a use for."""
    if purpose != TRAINING_PURPOSE:
        raise RequestInvalid(f"Only files of the purpose '{TRAINING_PURPOSE}' are taken here.", param="purpose")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def file_of(row: sa.Row[Any]) -> StoredFile:
    return StoredFile(**{name: row._mapping[name] for name in StoredFile.__slots__})


def _live(tenant: str) -> sa.ColumnElement[bool]:
    return (tables.files.c.tenant == tenant) & ~tables.files.c.is_deleted


def _is_needed(connection: Connection, tenant: str, sha256: str) -> bool:
    files, jobs, pins = tables.files, tables.jobs, tables.job_files
    listed = sa.select(files.c.id).where(_live(tenant), files.c.sha256 == sha256)
    pinned = sa.select(jobs.c.id).join(pins, pins.c.job_id == jobs.c.id)
    pinned = pinned.where(jobs.c.tenant == tenant, pins.c.sha256 == sha256, jobs.c.status.not_in(_OVER))
    return any(connection.execute(query.limit(1)).first() is not None for query in (listed, pinned))
