"""What the store says of an adapter: its manifests, the history of its aliases, its plain directory. Read and appended.

Every record is written once and never changed, so two writers can only lose a race for a number, never each other's
words. Below `tenants/<tenant>/adapters/<name>/`:

    versions/<n>.json         a manifest; the number stays taken for ever
    versions/<n>.deleted      its tombstone; what has one is no version any more
    aliases/<alias>/<seq>.json    what the alias points to from now on; the newest one counts

Parsed records are kept by key and ETag; caching listings is the catalog's. Any thread; blocks on the store.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from adapters.errors import AdapterConflict, AdapterDigestMismatch, AdapterNotFound, ObjectNotFound
from adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    adapter_prefix,
    alias_key,
    canonical_json,
    is_adapter_name,
    is_alias,
    tenant_prefix,
    version_key,
)
from adapters.remembered import KeyedLocks
from adapters.store import BlobStore, ObjectInfo

T = TypeVar("T")
U = TypeVar("U")

MAX_RECORD_BYTES = 4 << 20  # a manifest carries training metrics
LISTING_KEYS = 1000  # one page of S3; an adapter with more objects is read part by part
TENANT_LISTING_KEYS = 5000  # as much for a whole tenant's adapters
NUM_READERS = 8  # records read at a time where many are wanted

_VERSION_FILE = re.compile(r"versions/([0-9]{8})\.(json|deleted)")
_ALIAS_FILE = re.compile(r"aliases/([a-z0-9-]+)/([0-9]{8})\.json")


@dataclass(frozen=True, slots=True)
class AliasRevision:
    """One entry of an alias's history."""

    seq: int
    version: int | None  # None: the alias was deleted
    settled: int  # versions up to this number were decided upon: a publication of one of them does not move the alias
    by: str  # "publish", "import", "set", "roll_back" or "delete"
    at: float  # Unix seconds; for people, nothing is ordered by it
    write_id: str  # of the one call that wrote it: how a writer whose answer was lost knows its own entry
    restores: int | None = None  # the seq that a roll back went back to

    def to_json(self) -> bytes:
        return canonical_json({"schema": 1, **asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> AliasRevision:
        """Raises ValueError, KeyError or TypeError on a body that is no revision of schema 1."""
        body = json.loads(data)
        if body.pop("schema", None) != 1:
            raise ValueError("unknown alias schema")
        return cls(**body)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What one listing said of one adapter."""

    tenant: str
    name: str
    manifests: Mapping[int, ObjectInfo]  # by version, those of deleted ones included
    deleted: frozenset[int]
    revisions: Mapping[str, ObjectInfo]  # the newest entry of each alias
    files: Mapping[str, ObjectInfo]  # plain files right below the adapter's prefix, by name

    @property
    def versions(self) -> list[int]:
        return sorted(self.manifests.keys() - self.deleted)

    @property
    def highest(self) -> int:
        """The highest number ever given out."""
        return max((*self.manifests, *self.deleted), default=0)

    @property
    def has_directory(self) -> bool:
        return CONFIG_FILE in self.files or WEIGHTS_FILE in self.files

    @property
    def is_absent(self) -> bool:
        return not self.versions and not self.has_directory

    @property
    def etags(self) -> tuple[str, str] | None:
        """Of the plain directory's two files; None unless both are there."""
        if CONFIG_FILE in self.files and WEIGHTS_FILE in self.files:
            return self.files[CONFIG_FILE].etag, self.files[WEIGHTS_FILE].etag
        return None


def tombstone_key(tenant: str, name: str, version: int) -> str:
    return version_key(tenant, name, version).removesuffix("json") + "deleted"


def erased_key(tenant: str) -> str:
    """The tombstone of an erased tenant, whose id is never used again."""
    return f"{tenant_prefix(tenant)}erased"


def parse_record(tenant: str, name: str, objects: Iterable[ObjectInfo]) -> AdapterRecord:
    """Sort an adapter's objects, listed by key, into a record. What fits no pattern is none of ours."""
    prefix = adapter_prefix(tenant, name)
    manifests: dict[int, ObjectInfo] = {}
    deleted: set[int] = set()
    revisions: dict[str, ObjectInfo] = {}
    files: dict[str, ObjectInfo] = {}
    for info in objects:
        rest = info.key.removeprefix(prefix)
        if match := _VERSION_FILE.fullmatch(rest):
            if match[2] == "json":
                manifests[int(match[1])] = info
            else:
                deleted.add(int(match[1]))
        elif match := _ALIAS_FILE.fullmatch(rest):
            if is_alias(match[1]):
                revisions[match[1]] = info
        elif "/" not in rest:
            files[rest] = info
    return AdapterRecord(tenant, name, manifests, frozenset(deleted), revisions, files)


def tenant_erased() -> AdapterConflict:
    return AdapterConflict("This tenant was erased. Its id is not used again.", code="tenant_erased")


class Records:
    """Reads and appends records. Keeps up to `capacity` parsed ones."""

    def __init__(self, store: BlobStore, *, capacity: int = 20_000) -> None:
        self._store = store
        self._capacity = capacity
        self._parsed: OrderedDict[tuple[str, str], object] = OrderedDict()
        self._reading: KeyedLocks[tuple[str, str]] = KeyedLocks()
        self._lock = threading.Lock()

    def read(self, tenant: str, name: str) -> AdapterRecord:
        """List an adapter's objects: one call to the store for all but the largest."""
        prefix = adapter_prefix(tenant, name)
        objects = self._store.list(prefix, limit=LISTING_KEYS)
        if len(objects) == LISTING_KEYS:
            # A training run's whole folder, perhaps: read the parts that matter and none of its own.
            files = [info for info in objects if info.key.count("/") == prefix.count("/")]
            objects = [*files, *self._store.list(f"{prefix}aliases/"), *self._store.list(f"{prefix}versions/")]
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                objects.extend(self._find(prefix + file))
        return parse_record(tenant, name, objects)

    def read_all(self, tenant: str) -> list[AdapterRecord]:
        """The records of all of a tenant's adapters, by name: few calls unless there are thousands of objects."""
        prefix = f"{tenant_prefix(tenant)}adapters/"
        objects = self._store.list(prefix, limit=TENANT_LISTING_KEYS)
        if len(objects) == TENANT_LISTING_KEYS:
            names = [name for name in self._store.list_dirs(prefix) if is_adapter_name(name)]
            return self.read_many(lambda name: self.read(tenant, name), names)
        by_name: dict[str, list[ObjectInfo]] = {}
        for info in objects:
            by_name.setdefault(info.key.removeprefix(prefix).split("/", 1)[0], []).append(info)
        return [parse_record(tenant, name, by_name[name]) for name in sorted(by_name) if is_adapter_name(name)]

    def manifest(self, record: AdapterRecord, version: int) -> AdapterManifest:
        """Return a version's manifest, of a deleted one too. Raises AdapterNotFound, AdapterDigestMismatch."""
        info = record.manifests.get(version)
        if info is None:
            raise AdapterNotFound()
        manifest = self._parse(info, AdapterManifest.from_json)
        if (manifest.tenant, manifest.name, manifest.version) != (record.tenant, record.name, version):
            raise AdapterDigestMismatch("The stored manifest is another adapter's. Publish the adapter again.")
        return manifest

    def manifest_at(self, tenant: str, name: str, version: int) -> AdapterManifest | None:
        """Read a manifest that no listing has shown yet; None when there is none."""
        found = self._find(version_key(tenant, name, version))
        return self._parse(found[0], AdapterManifest.from_json) if found else None

    def manifests(self, record: AdapterRecord) -> list[AdapterManifest]:
        return self.read_many(lambda version: self.manifest(record, version), record.versions)

    def revision(self, record: AdapterRecord, alias: str) -> AliasRevision | None:
        info = record.revisions.get(alias)
        return None if info is None else self._parse(info, AliasRevision.from_json)

    def target(self, record: AdapterRecord, alias: str) -> int | None:
        """The version that the alias points to; None when there is no such alias or version any more."""
        revision = self.revision(record, alias)
        version = None if revision is None else revision.version
        return version if version in record.manifests and version not in record.deleted else None

    def aliases(self, record: AdapterRecord) -> dict[str, int]:
        targets = {alias: self.target(record, alias) for alias in sorted(record.revisions)}
        return {alias: version for alias, version in targets.items() if version is not None}

    def history(self, tenant: str, name: str, alias: str) -> list[AliasRevision]:
        """An alias's entries, oldest first."""
        objects = self._store.list(f"{adapter_prefix(tenant, name)}aliases/{alias}/")
        entries = [
            info for info in objects if _ALIAS_FILE.fullmatch(info.key.removeprefix(adapter_prefix(tenant, name)))
        ]
        return self.read_many(lambda info: self._parse(info, AliasRevision.from_json), entries)

    def append(
        self,
        tenant: str,
        name: str,
        alias: str,
        decide: Callable[[AdapterRecord, AliasRevision | None], AliasRevision | None],
    ) -> AliasRevision | None:
        """Append what `decide(record, newest entry)` says, or nothing when it says None.

        Whoever loses the race for a sequence number looks again and decides again. `decide` leaves `seq` to us.
        Raises AdapterConflict for an erased tenant.
        """
        tried: set[str] = set()
        while True:
            record = self.read(tenant, name)
            newest = self.revision(record, alias)
            if newest is not None and newest.write_id in tried:
                return newest  # our own write, whose answer was lost
            decided = decide(record, newest)
            if decided is None:
                return newest
            tried.add(decided.write_id)
            seq = 1 if newest is None else newest.seq + 1
            decided = replace(decided, seq=seq)
            key = alias_key(tenant, name, alias, seq)
            if self._store.put_if_absent(key, decided.to_json()):
                if self.is_erased(tenant):  # the eraser passed while we wrote
                    self._store.delete(key)
                    raise tenant_erased()
                return decided

    def kept_target(self, record: AdapterRecord, alias: str) -> int | None:
        """As `target`, without reading: None too when the entry is not kept."""
        revision = self._kept(record.revisions.get(alias))
        version = revision.version if isinstance(revision, AliasRevision) else None
        return version if version in record.manifests and version not in record.deleted else None

    def kept_manifest(self, record: AdapterRecord, version: int) -> AdapterManifest | None:
        manifest = self._kept(record.manifests.get(version))
        return manifest if isinstance(manifest, AdapterManifest) and version not in record.deleted else None

    def read_many(self, read: Callable[[U], T], what: Iterable[U]) -> list[T]:
        """Read several records, a few at a time: one after the other a cold store takes a round trip each."""
        items = list(what)
        if len(items) < 3:
            return [read(item) for item in items]
        with ThreadPoolExecutor(min(NUM_READERS, len(items)), "records") as readers:
            return list(readers.map(read, items))

    def is_erased(self, tenant: str) -> bool:
        return bool(self._find(erased_key(tenant)))

    def refuse_erased(self, tenant: str) -> None:
        if self.is_erased(tenant):
            raise tenant_erased()

    def forget_tenant(self, tenant: str) -> None:
        prefix = tenant_prefix(tenant)
        with self._lock:
            for kept_as in [kept_as for kept_as in self._parsed if kept_as[0].startswith(prefix)]:
                del self._parsed[kept_as]

    def _find(self, key: str) -> list[ObjectInfo]:
        try:
            return [self._store.head(key)]
        except ObjectNotFound:
            return []

    def _parse(self, info: ObjectInfo, parse: Callable[[bytes], T]) -> T:
        kept = self._kept(info)
        if kept is not None:
            return kept  # type: ignore[return-value]  # a key is always parsed the same way
        with self._reading.alone((info.key, info.etag)):  # of a herd, one reads
            kept = self._kept(info)
            if kept is not None:
                return kept  # type: ignore[return-value]
            data = self._store.get(info.key, max_bytes=MAX_RECORD_BYTES)
            try:
                parsed = parse(data)
            except (ValueError, KeyError, TypeError) as exc:
                raise AdapterDigestMismatch("A stored record is damaged. Publish the adapter again.") from exc
            with self._lock:
                self._parsed[(info.key, info.etag)] = parsed
                if len(self._parsed) > self._capacity:
                    self._parsed.popitem(last=False)
            return parsed

    def _kept(self, info: ObjectInfo | None) -> object | None:
        with self._lock:
            if info is None or (info.key, info.etag) not in self._parsed:
                return None
            self._parsed.move_to_end((info.key, info.etag))
            return self._parsed[(info.key, info.etag)]
