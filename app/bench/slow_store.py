"""A blob store that makes every reader wait: what a far or overloaded S3 does to cold adapters."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from pathlib import Path

from adapters.store import BlobStore, ObjectInfo


class SlowStore:
    """Another store, each of whose objects takes `delay_s` longer to read. Writing and listing are left as they are."""

    def __init__(self, store: BlobStore, delay_s: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store = store
        self._sleep = sleep
        self._delay_s = delay_s

    def head(self, key: str) -> ObjectInfo:
        self._sleep(self._delay_s)
        return self._store.head(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._sleep(self._delay_s)
        return self._store.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self._sleep(self._delay_s)
        return self._store.get_range(key, start, length)

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        self._sleep(self._delay_s)
        return self._store.download(key, path, max_bytes=max_bytes)

    def put(self, key: str, data: bytes | Path) -> None:
        self._store.put(key, data)

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        return self._store.put_if_absent(key, data)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[ObjectInfo]:
        return self._store.list(prefix, after=after, limit=limit)

    def list_dirs(self, prefix: str) -> builtins.list[str]:
        return self._store.list_dirs(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def probe(self) -> builtins.list[str]:
        return self._store.probe()
