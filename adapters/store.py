"""Where blobs live: the protocol that all of Lodger stores through, and a store that is a plain directory.

Only create-if-absent is asked of a store, never compare-and-swap: AWS, MinIO and Ceph all have the first, and few agree
on the second. Nothing here knows what a key means. Calls block and may come from any thread of any process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from adapters.errors import (
    LocalDiskFailed,
    ObjectKeyInvalid,
    ObjectNotFound,
    ObjectTooLarge,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

MAX_KEY_BYTES = 900  # S3 allows 1,024, of which the store's own prefix takes some
MAX_SEGMENT_BYTES = 255  # the longest file name of common file systems
CHUNK_BYTES = 1 << 20
PROBE_KEY = (
    "tenants/.probe/create-only"  # no tenant can be called so; below tenants/ because roles may write there alone
)

_TEMP_DIR = ".tmp"
_TEMP_MAX_AGE_S = 24 * 3600.0
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no link is followed, no pipe waited for


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `etag` changes whenever the content does; nothing else may be read from it."""

    key: str
    size: int  # bytes
    etag: str


# Named, since inside a class with a method `list` the word no longer means the type.
ObjectInfos = list[ObjectInfo]
Names = list[str]
_Entries = list[tuple[str, os.stat_result | None]]


class BlobStore(Protocol):
    """Whole objects by key. Every method blocks, may be called from any thread and raises only StoreErrors.

    Keys are checked by `check_key`; a prefix is empty or ends in "/", so `acme/` never finds what is `acme-corp`'s.
    """

    def head(self, key: str) -> ObjectInfo:
        """Raises ObjectNotFound."""

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """Raises ObjectNotFound, and ObjectTooLarge for more than `max_bytes`."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return the object's bytes of [start, start + length) as far as they exist; b"" past its end."""

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        """Write the object to `path`, replacing it. Hashes nothing; on an error `path` may hold a part of it."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Store `data`, replacing what was there in one step."""

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """Store `data` unless the key exists. True: created, whole, by this call. Of racing writers one wins."""

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> ObjectInfos:
        """Return the objects below `prefix` whose keys come after the key `after`, sorted by UTF-8 key."""

    def list_dirs(self, prefix: str) -> Names:
        """Return the sorted names right below `prefix` that have objects below them."""

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""

    def probe(self) -> Names:
        """Try what Lodger needs and return a sentence per problem, with what to do. Leaves at most one tiny object."""


def check_key(key: str) -> str:
    """Return `key` if it is a safe object key, else raise ObjectKeyInvalid."""
    segments = key.split("/")
    if len(key.encode(errors="replace")) > MAX_KEY_BYTES or not all(map(_is_segment, segments)):
        raise ObjectKeyInvalid()
    if segments[0] == _TEMP_DIR:
        raise ObjectKeyInvalid(f"Keys below {_TEMP_DIR}/ are the store's own.")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or a safe key and a "/", else raise ObjectKeyInvalid."""
    if prefix:
        if not prefix.endswith("/"):
            raise ObjectKeyInvalid("A prefix is empty or ends in a slash.")
        check_key(prefix[:-1])
    return prefix


def is_key(key: str) -> bool:
    try:
        check_key(key)
    except ObjectKeyInvalid:
        return False
    return True


def _is_segment(segment: str) -> bool:
    try:
        num_bytes = len(segment.encode())
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form
        return False
    return 0 < num_bytes <= MAX_SEGMENT_BYTES and segment not in {".", ".."} and segment.isprintable()


def open_local(path: Path) -> BinaryIO:
    """Open a local file that is to be stored; raises LocalDiskFailed."""
    try:
        return path.open("rb")
    except OSError as exc:
        raise LocalDiskFailed(f"The local file to store cannot be read: {exc.strerror}.") from exc


def probe_create_only(store: BlobStore) -> list[str]:
    """Return why `store` cannot be published to: the create-only write is what keeps two writers apart."""
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    try:
        store.put_if_absent(PROBE_KEY, first)
        if store.put_if_absent(PROBE_KEY, second) or store.get(PROBE_KEY, max_bytes=64) == second:
            return [
                "The store overwrote an object it was told to create only (If-None-Match: *). Concurrent publications "
                "would be lost: use a store that supports conditional writes."
            ]
    except StoreError as exc:
        return [f"Cannot write and read back below tenants/: {exc} Grant get and put there."]
    return []


class DirectoryStore:
    """A store that is a directory: one file per object. Several processes may share it.

    Objects appear whole: each is written beside the tree, synced, and then linked (create-only) or renamed (replace)
    into place. Symbolic links and special files below the root are not objects: never followed, listed or read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._temp = root / _TEMP_DIR
        try:
            self._temp.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._sweep()
        except OSError as exc:
            raise _translated(exc) from exc

    def head(self, key: str) -> ObjectInfo:
        with self._leaf(key) as (parent, name):
            return _info(key, os.stat(name, dir_fd=parent, follow_symlinks=False))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._open(key) as (file, info):
            if info.size > max_bytes:
                raise ObjectTooLarge(f"The object has {info.size} bytes; at most {max_bytes} are read here.")
            return file.read(info.size)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._open(key) as (file, _):
            file.seek(start)
            return file.read(length)

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        with self._open(key) as (file, info):
            if info.size > max_bytes:
                raise ObjectTooLarge(f"The object has {info.size} bytes; at most {max_bytes} are read here.")
            try:
                with path.open("wb") as target:
                    shutil.copyfileobj(file, target, CHUNK_BYTES)
            except OSError as exc:
                raise LocalDiskFailed() from exc
            return info

    def put(self, key: str, data: bytes | Path) -> None:
        with self._written(data) as temp:
            self._place(key, temp, replace=True)

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        # Looking first spares writing a large blob that is there already; the link below is what decides.
        with contextlib.suppress(ObjectNotFound):
            self.head(key)
            return False
        with self._written(data) as temp:
            return self._place(key, temp, replace=False)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> ObjectInfos:
        check_prefix(prefix)
        with _translating():
            return list(itertools.islice(self._walk(prefix, after.encode()), limit))

    def list_dirs(self, prefix: str) -> Names:
        check_prefix(prefix)
        with _translating():
            names = sorted(name for name, status in self._entries(prefix) if status is None)
            return [name for name in names if next(self._walk(f"{prefix}{name}/", b""), None) is not None]

    def delete(self, key: str) -> None:
        try:
            with self._leaf(key) as (parent, name):
                os.unlink(name, dir_fd=parent)
                os.fsync(parent)
        except ObjectNotFound:
            return
        # Emptied directories go too, as they do in S3; one that another writer fills meanwhile refuses to.
        directory = (self.root / key).parent
        with contextlib.suppress(OSError):
            while directory != self.root:
                directory.rmdir()
                directory = directory.parent

    def probe(self) -> Names:
        problems = probe_create_only(self)
        if not problems:
            self.delete(PROBE_KEY)
        return problems

    def _sweep(self) -> None:
        """Remove what crashed writers left; nobody writes one object for a day."""
        oldest = time.time() - _TEMP_MAX_AGE_S
        for entry in os.scandir(self._temp):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _leaf(self, key: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """Open the key's directory part by part, so that no link can lead out of the root; yield (fd, last name)."""
        *parts, name = check_key(key).split("/")
        with _translating(), contextlib.ExitStack() as stack:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the root itself may be a link
            stack.callback(os.close, fd)
            for part in parts:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o750, dir_fd=fd)
                        os.fsync(fd)
                fd = os.open(part, _DIR_FLAGS, dir_fd=fd)
                stack.callback(os.close, fd)
            yield fd, name

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, ObjectInfo]]:
        with self._leaf(key) as (parent, name), os.fdopen(os.open(name, _READ_FLAGS, dir_fd=parent), "rb") as file:
            yield file, _info(key, os.fstat(file.fileno()))

    @contextlib.contextmanager
    def _written(self, data: bytes | Path) -> Iterator[Path]:
        """Yield a synced temporary file with `data` on the store's own file system; remove it afterwards."""
        temp = self._temp / uuid.uuid4().hex
        with _translating():
            try:
                with os.fdopen(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640), "wb") as file:
                    if isinstance(data, Path):
                        with open_local(data) as source:
                            shutil.copyfileobj(source, file, CHUNK_BYTES)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temp
            finally:
                temp.unlink(missing_ok=True)

    def _place(self, key: str, temp: Path, *, replace: bool) -> bool:
        while True:
            try:
                with self._leaf(key, create=True) as (parent, name):
                    if replace:
                        os.replace(temp, name, dst_dir_fd=parent)
                    else:
                        os.link(temp, name, dst_dir_fd=parent, follow_symlinks=False)
                    os.fsync(parent)
                    return True
            except FileExistsError:
                return False
            except ObjectNotFound as exc:
                # A deleter may remove an emptied directory between our making and our using it: make it again.
                if not isinstance(exc.__cause__, FileNotFoundError) or not temp.exists():
                    raise ObjectKeyInvalid("Something else stands where the object belongs.") from exc

    def _entries(self, prefix: str) -> _Entries:
        """What lies right below `prefix`, in the order of the keys that it stands for: name, and None or its status."""
        found: _Entries = []
        with contextlib.suppress(ObjectNotFound), self._leaf(f"{prefix}x") as (fd, _), os.scandir(fd) as entries:
            for entry in entries:
                is_dir = entry.is_dir(follow_symlinks=False)
                if (is_dir or entry.is_file(follow_symlinks=False)) and is_key(prefix + entry.name):
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was seen
                        found.append((entry.name, None if is_dir else entry.stat(follow_symlinks=False)))
        # A directory's keys begin with its name and a slash, which is how S3 orders them among their neighbours.
        return sorted(found, key=lambda item: (f"{item[0]}/" if item[1] is None else item[0]).encode())

    def _walk(self, prefix: str, after: bytes) -> Iterator[ObjectInfo]:
        for name, status in self._entries(prefix):
            key = prefix + name
            if status is None:
                below = f"{key}/".encode()
                if below > after or after.startswith(below):
                    yield from self._walk(f"{key}/", after)
            elif key.encode() > after:
                yield _info(key, status)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(status.st_mode):
        raise ObjectNotFound("There is something else than a regular file.")
    return ObjectInfo(key, status.st_size, f"{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ino:x}")


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    """Turn the file system's errors into ours; FileExistsError stays, since it is an answer here."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as exc:
        raise _translated(exc) from exc


def _translated(exc: OSError) -> StoreError:
    if exc.errno in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}:
        return ObjectNotFound()
    if exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StoreDenied("The store's directory may not be read or written by this user.")
    return StoreUnavailable(f"The store's directory failed: {os.strerror(exc.errno or 0)}.")
