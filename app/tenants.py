"""Tenants, their limits and API keys: the tables, who may ask for what, and what an administrator changes.

Works on the database alone, so the command line needs no running server; a running one sees changes within a second,
since what it caches is older than `cache_ttl_s` never. All methods are thread-safe; all
block but `peek` and `peek_limits`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from adapters.manifest import TENANT_PATTERN
from app.api_keys import ApiKey, hash_key, is_right, new_key, read_key_id
from app.database import metadata, reading, writing
from app.errors import InvalidApiKey, RequestInvalid, TenantErased, TenantMismatch, TenantRequired
from app.ttl_cache import TtlCache

KeyKind = Literal["tenant", "service"]

tenants_table = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("erased_at", sa.Float(53)),  # a tombstone: the id is never given out again
    sa.Column("max_waiting", sa.BigInteger),
    sa.Column("max_running", sa.BigInteger),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("max_adapters", sa.BigInteger),
    sa.Column("max_storage_bytes", sa.BigInteger),
    sa.Column("max_jobs", sa.BigInteger),
    sa.Column("training_tokens_per_day", sa.BigInteger),
)
keys_table = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("all_tenants", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("expires_at", sa.Float(53)),
    sa.Column("revoked_at", sa.Float(53)),
)
key_tenants_table = sa.Table(
    "api_key_tenants",
    metadata,
    sa.Column("key_id", sa.ForeignKey(keys_table.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey(tenants_table.c.id), primary_key=True, index=True),
)


class TenantInvalid(RequestInvalid):
    """Tenant ids are 1 to 63 characters of a-z, 0-9 and dash, and begin with a letter or digit."""


class TenantExists(RequestInvalid):
    """There is such a tenant already. Choose another id."""


class TenantNotFound(RequestInvalid):
    """There is no such tenant. `lodger tenants list` shows those there are."""

    code = "not_found"


class KeyNotFound(RequestInvalid):
    """There is no such key. `lodger keys list` shows those there are."""

    code = "not_found"


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use; None is no limit, or in a tenant's own row: the server's default."""

    max_waiting: int | None = None  # requests in the queue
    max_running: int | None = None  # sequences in the batch
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and answer
    max_adapters: int | None = None
    max_storage_bytes: int | None = None  # of files and pending uploads; adapters may take as much again
    max_jobs: int | None = None  # unfinished fine-tuning jobs
    training_tokens_per_day: int | None = None  # of the jobs made in 24 hours; reached, no further job is made

    def over(self, defaults: TenantLimits) -> TenantLimits:
        """These limits, and the defaults' where these say nothing."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(defaults, **own)


LIMIT_NAMES = tuple(f.name for f in fields(TenantLimits))
NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and its own row of limits. Times in Unix seconds."""

    id: str
    created_at: float
    limits: TenantLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be shown of a key. A tenant key has exactly one tenant; a service key its list, or all."""

    id: str
    kind: KeyKind
    name: str
    tenants: tuple[str, ...]
    all_tenants: bool
    created_at: float
    expires_at: float | None
    revoked_at: float | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: one tenant, by one key."""

    tenant: str
    key_id: str
    kind: KeyKind


@dataclass(frozen=True, slots=True)
class _Allowed:
    caller: Caller
    expires_at: float | None


class Tenants:
    """The store of tenants and keys. Invariant: a cached answer is at most `cache_ttl_s` old."""

    def __init__(
        self,
        engine: Engine,
        *,
        defaults: TenantLimits = NO_LIMITS,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        cache_ttl_s: float = 0.5,
        cache_entries: int = 10_000,
        on_limits: Callable[[str, TenantLimits], None] | None = None,
    ) -> None:
        """`clock` is monotonic and ages the caches; `wall` is Unix time and decides whether a key has expired.

        `on_limits(tenant, limits)` is told of limits each time they are read anew.
        """
        self._on_limits = on_limits
        self._engine = engine
        self._defaults = defaults
        self._clock = clock
        self._wall = wall
        self._callers: TtlCache[tuple[str, str | None], _Allowed] = TtlCache(cache_entries, cache_ttl_s, clock)
        self._limits: TtlCache[str, TenantLimits] = TtlCache(cache_entries, cache_ttl_s, clock)

    # Who asks

    def authenticate(self, key: str, tenant: str | None = None) -> Caller:
        """Say who `key` speaks for; `tenant` is the X-Tenant-ID header, None where there is none.

        Raises InvalidApiKey, TenantRequired, TenantMismatch, TenantErased, DatabaseUnavailable.
        """
        caller = self.peek(key, tenant)
        if caller is not None:
            return caller
        asked_at = self._clock()
        key_id = read_key_id(key)
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(keys_table).where(keys_table.c.id == key_id)).one_or_none()
            is_ours = is_right(key, None if row is None else row.secret_sha256)
            if row is None or not is_ours or row.revoked_at is not None or self._is_past(row.expires_at):
                raise InvalidApiKey
            caller = Caller(self._choose_tenant(connection, row, tenant), row.id, row.kind)
        self._callers.put((hash_key(key), tenant), _Allowed(caller, row.expires_at), asked_at=asked_at)
        return caller

    def peek(self, key: str, tenant: str | None = None) -> Caller | None:
        """The same from the cache alone: never blocks; None when the database has to be asked."""
        allowed = self._callers.get((hash_key(key), tenant))
        return None if allowed is None or self._is_past(allowed.expires_at) else allowed.caller

    def _choose_tenant(self, connection: Connection, key: sa.Row[Any], asked: str | None) -> str:
        granted = set(_tenants_of(connection, [key.id]).get(key.id, ()))
        if key.kind == "service" and not asked:
            raise TenantRequired(param="X-Tenant-ID")
        tenant = asked or next(iter(granted), "")
        if tenant not in granted and not key.all_tenants:
            raise TenantMismatch(param="X-Tenant-ID")
        known = connection.execute(
            sa.select(tenants_table.c.erased_at).where(tenants_table.c.id == tenant)
        ).one_or_none()
        if known is None:  # a key of all tenants learns no more than one with a list
            raise TenantMismatch(param="X-Tenant-ID")
        if known.erased_at is not None:
            raise TenantErased
        return tenant

    def _is_past(self, moment: float | None) -> bool:
        return moment is not None and self._wall() >= moment

    # Tenants

    def create(self, tenant: str) -> Tenant:
        """Add a tenant. Raises TenantInvalid, TenantExists, and TenantErased for the id of an erased one."""
        if TENANT_PATTERN.fullmatch(tenant) is None:
            raise TenantInvalid(param="id")
        with writing(self._engine) as connection:
            lookup = sa.select(tenants_table.c.erased_at).where(tenants_table.c.id == tenant)
            found = connection.execute(lookup).one_or_none()
            if found is not None:
                raise TenantExists(param="id") if found.erased_at is None else TenantErased(param="id")
            new = Tenant(tenant, self._wall())
            try:
                connection.execute(tenants_table.insert().values(id=tenant, created_at=new.created_at))
            except sa.exc.IntegrityError:  # another process was first; only PostgreSQL gets here
                raise TenantExists(param="id") from None
        return new

    def get(self, tenant: str) -> Tenant:
        """Raises TenantNotFound, TenantErased."""
        with reading(self._engine) as connection:
            return _existing(connection, tenant)

    def list(self) -> list[Tenant]:
        """All tenants but the erased, by id."""
        query = sa.select(tenants_table).where(tenants_table.c.erased_at.is_(None)).order_by(tenants_table.c.id)
        with reading(self._engine) as connection:
            return [_tenant(row) for row in connection.execute(query)]

    def limits(self, tenant: str) -> TenantLimits:
        """What holds for a tenant: its own row over the server's defaults. Raises TenantNotFound, TenantErased."""
        known = self._limits.get(tenant)
        if known is None:
            asked_at = self._clock()
            known = self.get(tenant).limits.over(self._defaults)
            self._limits.put(tenant, known, asked_at=asked_at)
            if self._on_limits is not None:
                self._on_limits(tenant, known)
        return known

    def peek_limits(self, tenant: str) -> TenantLimits | None:
        """The same from the cache alone: never blocks; None when the database has to be asked."""
        return self._limits.get(tenant)

    def set_limits(self, tenant: str, /, **changes: int | None) -> Tenant:
        """Change a tenant's own row; None is the server's default again. Raises RequestInvalid, TenantNotFound."""
        for name, value in changes.items():
            if name not in LIMIT_NAMES:
                raise RequestInvalid(f"there is no limit called {name}; there are {', '.join(LIMIT_NAMES)}", param=name)
            if value is not None and not 0 <= value < 1 << 62:
                raise RequestInvalid("a limit is a number from 0 on, or null for the server's default", param=name)
        with writing(self._engine) as connection:
            before = _existing(connection, tenant)
            if changes:
                connection.execute(tenants_table.update().where(tenants_table.c.id == tenant).values(**changes))
        self._limits.clear()
        return replace(before, limits=replace(before.limits, **changes))

    def erase(self, tenant: str) -> None:
        """Delete every row of a tenant in every table, and leave a tombstone; its keys stop working.

        May be repeated. Its blobs are the catalog's to delete. Raises TenantNotFound.
        """
        with writing(self._engine) as connection:
            if connection.execute(sa.select(tenants_table.c.id).where(tenants_table.c.id == tenant)).first() is None:
                raise TenantNotFound(param="id")
            for table in _tables_with_tenant_rows(connection):
                connection.execute(table.delete().where(table.c.tenant == tenant))
            own = {"erased_at": self._wall(), **dict.fromkeys(LIMIT_NAMES)}
            connection.execute(tenants_table.update().where(tenants_table.c.id == tenant).values(**own))
        self._callers.clear()
        self._limits.clear()

    # Keys

    def create_key(self, tenant: str, *, name: str = "", expires_at: float | None = None) -> ApiKey:
        """Make a key of one tenant. Raises TenantNotFound, TenantErased."""
        return self._add_key("tenant", [tenant], all_tenants=False, name=name, expires_at=expires_at)

    def create_service_key(
        self, tenants: Sequence[str] | None, *, name: str = "", expires_at: float | None = None
    ) -> ApiKey:
        """Make a key that acts for several tenants; None is all, those to come included."""
        if tenants is not None and not tenants:
            raise RequestInvalid("a service key needs at least one tenant, or all", param="tenants")
        return self._add_key("service", tenants or [], all_tenants=tenants is None, name=name, expires_at=expires_at)

    def _add_key(
        self, kind: KeyKind, tenants: Sequence[str], *, all_tenants: bool, name: str, expires_at: float | None
    ) -> ApiKey:
        if len(name) > 128:
            raise RequestInvalid("a key's name has at most 128 characters", param="name")
        if self._is_past(expires_at):
            raise RequestInvalid("the key would have expired already", param="expires_at")
        key = new_key()
        with writing(self._engine) as connection:
            for tenant in tenants:
                _existing(connection, tenant)
            values = {"id": key.id, "kind": kind, "name": name, "secret_sha256": key.sha256, "all_tenants": all_tenants}
            times = {"created_at": self._wall(), "expires_at": expires_at}
            connection.execute(keys_table.insert().values(**values, **times))
            for tenant in dict.fromkeys(tenants):
                connection.execute(key_tenants_table.insert().values(key_id=key.id, tenant_id=tenant))
        return key

    def list_keys(self, tenant: str | None = None) -> Sequence[KeyInfo]:
        """Keys, oldest first: all, or those that may act for one tenant. Raises TenantNotFound, TenantErased."""
        query = sa.select(keys_table).order_by(keys_table.c.created_at, keys_table.c.id)
        with reading(self._engine) as connection:
            if tenant is not None:
                _existing(connection, tenant)
                linked = sa.select(key_tenants_table.c.key_id).where(key_tenants_table.c.tenant_id == tenant)
                query = query.where(sa.or_(keys_table.c.id.in_(linked), keys_table.c.all_tenants))
            rows = connection.execute(query).all()
            granted = _tenants_of(connection, [row.id for row in rows])
        return [_key_info(row, granted.get(row.id, ())) for row in rows]

    def revoke_key(self, key: str) -> KeyInfo:
        """End a key, named by its id or its whole text. May be repeated. Raises KeyNotFound."""
        key_id = read_key_id(key) or key.removeprefix("lk_")
        with writing(self._engine) as connection:
            row = connection.execute(sa.select(keys_table).where(keys_table.c.id == key_id)).one_or_none()
            if row is None:
                raise KeyNotFound(param="id")
            granted = _tenants_of(connection, [row.id]).get(row.id, ())
            revoked_at = self._wall() if row.revoked_at is None else row.revoked_at
            connection.execute(keys_table.update().where(keys_table.c.id == row.id).values(revoked_at=revoked_at))
        self._callers.clear()
        return replace(_key_info(row, granted), revoked_at=revoked_at)


def _existing(connection: Connection, tenant: str) -> Tenant:
    row = connection.execute(sa.select(tenants_table).where(tenants_table.c.id == tenant)).one_or_none()
    if row is None:
        raise TenantNotFound(f"there is no tenant {tenant!r}: `lodger tenants list` shows those there are", param="id")
    if row.erased_at is not None:
        raise TenantErased(param="id")
    return _tenant(row)


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.id, row.created_at, TenantLimits(**{name: getattr(row, name) for name in LIMIT_NAMES}))


def _key_info(row: sa.Row[Any], tenants: Iterable[str]) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        kind=row.kind,
        name=row.name,
        tenants=tuple(tenants),
        all_tenants=row.all_tenants,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


def _tenants_of(connection: Connection, key_ids: Sequence[str]) -> dict[str, list[str]]:
    """The tenants that each key is linked to, by id."""
    table = key_tenants_table.c
    query = sa.select(table.key_id, table.tenant_id).where(table.key_id.in_(key_ids)).order_by(table.tenant_id)
    found: dict[str, list[str]] = {}
    for key_id, tenant in connection.execute(query):
        found.setdefault(key_id, []).append(tenant)
    return found


def _tables_with_tenant_rows(connection: Connection) -> list[sa.Table]:
    """Every table with a `tenant` column, as the database has them: no owner of a table can forget to be erased."""
    present = sa.MetaData()
    present.reflect(connection)
    return [table for table in reversed(present.sorted_tables) if "tenant" in table.c]
