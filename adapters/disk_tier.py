"""Adapter files on local disk under a byte budget: `<directory>/<tenant>/<sha256>`, each whole or absent.

Kept per tenant, not by sha256 alone: to know the digest of another tenant's file must not be enough to be served it.
A file arrives under a private name, is hashed by the caller, synced, renamed into place, and the directory is synced;
so whatever bears a sha256 as its name had those bytes. Readers get a private hard link, which nobody can take away.

Any thread may call. Several processes may share the directory: each sees the others' files when it looks for them or
at the next scan; a file that another process deleted is a miss. The order of use outlives a restart as files' mtimes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from adapters.errors import LocalDiskFailed
from adapters.lru import ByteLRU, Eviction, TierStats
from adapters.manifest import TENANT_PATTERN, FileFact

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PRIVATE = ".private-"  # no tenant can be called so
_SCAN_INTERVAL_S = 30.0

FileKey = tuple[str, str]  # (tenant, sha256)


def file_matches(path: Path, fact: FileFact) -> bool:
    """Whether the file has exactly the bytes of `fact`. Reads it whole, without holding the GIL while it hashes."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != fact.num_bytes:
            return False
        return hashlib.file_digest(file, "sha256").hexdigest() == fact.sha256


class DiskFile:
    """A file to read until `release` (or the end of the `with`). `path` is a private name, gone afterwards."""

    def __init__(self, path: Path, on_release: Callable[[], None]) -> None:
        self.path = path
        self._on_release: Callable[[], None] | None = on_release

    def release(self) -> None:
        """Give the lease back; the second time does nothing."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            self.path.unlink(missing_ok=True)
            on_release()

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Arrival:
    """A file on its way: write it to `path`, compare it with `file_matches`, `commit`. Leaving the `with` aborts."""

    def __init__(self, tier: DiskTier, tenant: str, fact: FileFact, path: Path, *, is_kept: bool) -> None:
        self.path = path
        self.is_kept = is_kept  # False: the tier has no room; the file lives until its reader releases it
        self._tier = tier
        self._tenant = tenant
        self._fact = fact
        self._is_open = True

    def commit(self) -> DiskFile:
        """Give the file its name and return it leased. Raises LocalDiskFailed; then the arrival is aborted."""
        assert self._is_open
        try:
            file = self._tier._settle(self._tenant, self._fact, self.path, is_kept=self.is_kept)
        except OSError as exc:
            self.abort()
            raise LocalDiskFailed() from exc
        self._is_open = False
        return file

    def abort(self) -> None:
        """Remove what has arrived; after a commit it does nothing."""
        if self._is_open:
            self._is_open = False
            self.path.unlink(missing_ok=True)
            if self.is_kept:
                self._tier._index.unreserve(self._fact.num_bytes)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.abort()


class DiskTier:
    """Invariant: kept files and reservations stay within the budget, and a leased file keeps its bytes."""

    def __init__(
        self,
        directory: Path,
        budget_bytes: int,
        *,
        spill: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`spill` takes files that the tier cannot keep (default: the same directory). Raises LocalDiskFailed."""
        self.directory = directory
        self._clock = clock
        # Held while names and index change together: an eviction must not unlink a name that was just given anew.
        self._lock = threading.Lock()
        self._index: ByteLRU[FileKey, Path] = ByteLRU(budget_bytes, on_evict=_unlink)
        self._claims = contextlib.ExitStack()
        try:
            self._private = self._claims.enter_context(_private_directory(directory))
            self._spill = self._private
            if spill is not None:
                self._spill = self._claims.enter_context(_private_directory(spill))
            with self._lock:
                self._scan()
        except OSError as exc:
            self._claims.close()
            raise LocalDiskFailed(f"The adapter cache's directory cannot be used: {exc.strerror}.") from exc

    def holds(self, tenant: str, sha256: str) -> bool:
        """True while the index has the file; does not count as a use, and another process may remove it."""
        return (tenant, sha256) in self._index

    def open(self, tenant: str, sha256: str) -> DiskFile | None:
        """Return the file leased, and count it as used now; None if it is not here. Its bytes are for you to check."""
        key, path, link = (tenant, sha256), self._path(tenant, sha256), self._private / uuid.uuid4().hex
        with self._lock:
            size = _size(path)
            if size is None:
                self._index.evict(key, Eviction.LRU)  # another process did
            elif key not in self._index:
                self._index.put(key, path, size)  # another process brought it
            if self._index.lease(key) is None:
                return None
            try:
                os.link(path, link, follow_symlinks=False)
                os.utime(link)
            except OSError:
                self._index.release(key)
                return None
        return DiskFile(link, lambda: self._release(key))

    def begin(self, tenant: str, fact: FileFact, *, keep: bool = True) -> Arrival:
        """Make room for a file about to be fetched. With `keep=False`, or no room, it is held for its reader only."""
        self._path(tenant, fact.sha256)
        with self._lock:
            if self._clock() - self._scanned_at > _SCAN_INTERVAL_S:
                self._scan()
            is_kept = keep and self._index.reserve(fact.num_bytes)
        directory = self._private if is_kept else self._spill
        return Arrival(self, tenant, fact, directory / uuid.uuid4().hex, is_kept=is_kept)

    def add(self, tenant: str, fact: FileFact, source: Path) -> bool:
        """Copy a local file in. False: no room, or it is not what `fact` says. Raises LocalDiskFailed."""
        with self.begin(tenant, fact) as arrival:
            if not arrival.is_kept:
                return False
            try:
                shutil.copyfile(source, arrival.path)
                if not file_matches(arrival.path, fact):
                    return False
            except OSError as exc:
                raise LocalDiskFailed() from exc
            arrival.commit().release()
            return True

    def drop(self, tenant: str, sha256: str, reason: Eviction) -> None:
        """Delete a file, now; who reads it can read on."""
        path = self._path(tenant, sha256)
        with self._lock:
            path.unlink(missing_ok=True)
            self._index.evict((tenant, sha256), reason)

    def drop_tenant(self, tenant: str) -> None:
        """Delete all of a tenant's files, also those that other processes brought."""
        directory = self._path(tenant, "0" * 64).parent
        with self._lock:
            for key in self._index.oldest_first():
                if key[0] == tenant:
                    self._index.evict(key, Eviction.ERASED)
            shutil.rmtree(directory, ignore_errors=True)

    def relieve(self, num_bytes: int) -> int:
        """Delete `num_bytes` of files used longest ago: the disk is full before the budget is. Returns bytes freed."""
        with self._lock:
            return self._index.shrink(num_bytes)

    def stats(self) -> TierStats:
        return self._index.stats()

    def check(self) -> None:
        """Raise AssertionError if the invariant is broken."""
        self._index.check()

    def close(self) -> None:
        """Remove the private directories; files stay for the next start."""
        self._claims.close()

    def _path(self, tenant: str, sha256: str) -> Path:
        if TENANT_PATTERN.fullmatch(tenant) is None or _SHA256.fullmatch(sha256) is None:
            raise ValueError("a file is named by its tenant and 64 hex characters")
        return self.directory / tenant / sha256

    def _release(self, key: FileKey) -> None:
        with self._lock:
            self._index.release(key)

    def _settle(self, tenant: str, fact: FileFact, arrived: Path, *, is_kept: bool) -> DiskFile:
        if not is_kept:
            return DiskFile(arrived, lambda: None)
        _sync(arrived)
        key, path = (tenant, fact.sha256), self._path(tenant, fact.sha256)
        staged = arrived.with_suffix(".staged")
        with self._lock:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                os.link(arrived, staged)  # the reader keeps `arrived`, whatever becomes of the name
                os.replace(staged, path)
            finally:
                staged.unlink(missing_ok=True)
            kept = self._index.put(key, path, fact.num_bytes, leased=True, reserved_bytes=fact.num_bytes)
            assert kept, "the room was reserved"
        file = DiskFile(arrived, lambda: self._release(key))
        with contextlib.suppress(OSError):  # the file is good; an unsynced name costs one fetch after a power cut
            _sync(path.parent)
            _sync(self.directory)
        return file

    def _scan(self) -> None:
        """Bring index and directory together; what the budget has no room for goes, oldest first."""
        self._scanned_at = self._clock()
        found: list[tuple[int, FileKey, Path, int]] = []
        for path in self.directory.glob("*/*"):
            key = (path.parent.name, path.name)
            with contextlib.suppress(OSError):
                status = path.stat(follow_symlinks=False)
                if TENANT_PATTERN.fullmatch(key[0]) and _SHA256.fullmatch(key[1]):
                    found.append((status.st_mtime_ns, key, path, status.st_size))
        present = {key for _, key, _, _ in found}
        for key in self._index.oldest_first():
            if key not in present:
                self._index.evict(key, Eviction.LRU)
        for _, key, path, size in sorted(found):
            if key not in self._index and not self._index.put(key, path, size):
                _unlink(key, path, Eviction.LRU)


@contextlib.contextmanager
def _private_directory(root: Path) -> Iterator[Path]:
    """Sweep what dead processes left in `root`, then make a directory with a lock held while this process lives."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / f"{_PRIVATE}{uuid.uuid4().hex}"
    owner = -1
    try:
        with (root / ".lock").open("ab") as gate:
            # One at a time, lest somebody sweep a directory between its making and its locking.
            fcntl.flock(gate, fcntl.LOCK_EX)
            for other in root.glob(f"{_PRIVATE}*"):
                _remove_if_dead(other)
            path.mkdir(mode=0o700)
            owner = os.open(path / "owner", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if owner >= 0:
            os.close(owner)


def _remove_if_dead(path: Path) -> None:
    """A process that ends, however it ends, loses its lock."""
    with contextlib.suppress(OSError):
        owner = os.open(path / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(owner)


def _size(path: Path) -> int | None:
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return None


def _unlink(key: FileKey, path: Path, reason: Eviction) -> None:
    if reason is not Eviction.SUPERSEDED:  # the new file has the old one's name
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
