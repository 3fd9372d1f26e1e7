"""Moving aliases: forward with a publication, by hand, back, and away. Every move appends an entry; none is rewritten.

Any thread or process; blocks on the store.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from adapters.errors import AdapterConflict, AdapterNotFound
from adapters.manifest import AdapterManifest
from adapters.records import AdapterRecord, AliasRevision, Records


def new_revision(
    version: int | None, settled: int, by: str, wall: Callable[[], float], restores: int | None = None
) -> AliasRevision:
    """An alias entry that waits for its sequence number."""
    return AliasRevision(0, version, settled, by, wall(), uuid.uuid4().hex, restores)


class Aliases:
    def __init__(self, records: Records, wall: Callable[[], float]) -> None:
        self._records = records
        self._wall = wall

    def advance(self, manifest: AdapterManifest, alias: str) -> None:
        """Point `alias` at a fresh publication, unless somebody has decided about it since.

        So a repeat does not undo a roll back, and of two racing publications the higher number stays.
        """

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            if manifest.version in record.deleted or (newest is not None and newest.settled >= manifest.version):
                return None
            return new_revision(manifest.version, manifest.version, "publish", self._wall)

        self._records.append(manifest.tenant, manifest.name, alias, decide)

    def set(self, tenant: str, name: str, alias: str, version: int, expected: int | None) -> None:
        """Raises AdapterNotFound, and AdapterConflict when the alias is not where it is expected (0: nowhere)."""
        before: int | None = None

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            nonlocal before
            if version not in record.versions:
                raise AdapterNotFound()
            before = self._records.target(record, alias)
            if expected is not None and before != (expected or None):
                raise AdapterConflict("The alias points elsewhere by now. Look again.", code="alias_moved")
            return None if before == version else new_revision(version, record.highest, "set", self._wall)

        self._records.append(tenant, name, alias, decide)
        # Whoever deletes a version looks at the aliases after burying it, and we at the tombstones after pointing.
        if version in self._records.read(tenant, name).deleted:
            self._take_back(tenant, name, alias, version, before)
            raise AdapterNotFound()

    def roll_back(self, tenant: str, name: str, alias: str) -> int:
        """Return the version gone back to. Raises AdapterNotFound, and AdapterConflict where history ends."""

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            if newest is None or newest.version is None:
                raise AdapterNotFound()
            past = _before(self._records.history(tenant, name, alias), newest, record)
            if past is None:
                raise AdapterConflict("There is no earlier version to go back to.", code="no_earlier_version")
            restores = past.seq if past.restores is None else past.restores
            return new_revision(past.version, record.highest, "roll_back", self._wall, restores)

        revision = self._records.append(tenant, name, alias, decide)
        assert revision is not None
        assert revision.version is not None
        return revision.version

    def delete(self, tenant: str, name: str, alias: str) -> bool:
        """Append an entry that points nowhere; False when there is nothing to delete."""
        pointed = False

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            nonlocal pointed
            if newest is None or newest.version is None:
                return None
            pointed = True
            return new_revision(None, record.highest, "delete", self._wall)

        self._records.append(tenant, name, alias, decide)
        return pointed

    def _take_back(self, tenant: str, name: str, alias: str, version: int, before: int | None) -> None:
        """Undo a pointer to a version that was deleted meanwhile, unless it has moved on by itself."""

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            if newest is None or newest.version != version:
                return None
            back = before if before in record.versions else None
            return new_revision(back, record.highest, "set", self._wall)

        self._records.append(tenant, name, alias, decide)


def _before(history: Sequence[AliasRevision], newest: AliasRevision, record: AdapterRecord) -> AliasRevision | None:
    """The last entry before `newest` (or before what it went back to) that names another version which still is."""
    position = newest.seq if newest.restores is None else newest.restores
    versions = set(record.versions)
    for entry in reversed(history):
        if entry.seq < position and entry.version in versions and entry.version != newest.version:
            return entry
    return None
