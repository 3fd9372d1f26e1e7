"""What the store of tenants and keys must do on every database. Subclass TenantContract, give it a `database`."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from app.database import head_revision, metadata, migrate, reading, writing
from app.errors import (
    AccessDenied,
    InvalidApiKey,
    RequestInvalid,
    TenantErased,
    TenantMismatch,
    TenantRequired,
)
from app.tenants import (
    Caller,
    KeyNotFound,
    TenantExists,
    TenantInvalid,
    TenantLimits,
    TenantNotFound,
    Tenants,
    key_tenants_table,
    keys_table,
    tenants_table,
)

TTL_S = 0.5


class Clocks:
    """A monotonic clock and a wall clock that only move when told."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 100.0, 1_800_000_000.0


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def tenants(database: sa.Engine, clocks: Clocks) -> Tenants:
    migrate(database)
    with writing(database) as connection:
        for table in (key_tenants_table, keys_table, tenants_table):
            connection.execute(table.delete())
    return _open(database, clocks)


def _open(database: sa.Engine, clocks: Clocks, **kwargs: object) -> Tenants:
    return Tenants(
        database, clock=lambda: clocks.monotonic, wall=lambda: clocks.wall, cache_ttl_s=TTL_S, **kwargs  # type: ignore[arg-type]
    )  # fmt: skip


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(AccessDenied) as caught:
        call()
    return caught.value.code


class TenantContract:
    def test_a_tenants_key_speaks_for_that_tenant(self, tenants: Tenants) -> None:
        tenants.create("acme")
        key = tenants.create_key("acme")
        assert tenants.authenticate(key.text) == Caller("acme", key.id, "tenant")
        assert tenants.authenticate(key.text, "acme") == Caller("acme", key.id, "tenant")

    def test_a_tenants_key_with_another_tenants_id_is_refused(self, tenants: Tenants) -> None:
        tenants.create("acme")
        tenants.create("acme-corp")
        key = tenants.create_key("acme")
        for other in ("acme-corp", "nobody", "ACME", "acme/", "a"):
            with pytest.raises(TenantMismatch):
                tenants.authenticate(key.text, other)

    def test_keys_that_are_not_ours_are_refused(self, tenants: Tenants) -> None:
        tenants.create("acme")
        right = tenants.create_key("acme").text
        wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
        other_id = "lk_" + "a" * 12 + right[15:]
        for text in ("", "lk_", wrong, other_id, right + "x", " " + right, right.upper(), "sk-" + "x" * 40, "lk_é_x"):
            with pytest.raises(InvalidApiKey):
                tenants.authenticate(text)

    def test_the_database_holds_no_key(self, tenants: Tenants, database: sa.Engine) -> None:
        tenants.create("acme")
        key = tenants.create_key("acme", name="laptop")
        secret = key.text.rsplit("_", 1)[1]
        with reading(database) as connection:
            stored = [str(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table))]
        assert any("laptop" in row for row in stored)
        assert not any(secret in row for row in stored)
        assert secret not in repr(key)

    def test_keys_are_long_random_and_of_one_form(self, tenants: Tenants) -> None:
        tenants.create("acme")
        keys = [tenants.create_key("acme") for _ in range(50)]
        assert len({key.text for key in keys}) == len({key.id for key in keys}) == 50
        assert all(re.fullmatch(rf"lk_{key.id}_[0-9A-Za-z]{{43}}", key.text) for key in keys)

    def test_a_service_key_acts_for_its_list_alone(self, tenants: Tenants) -> None:
        for name in ("acme", "beta", "gamma"):
            tenants.create(name)
        key = tenants.create_service_key(["acme", "beta"])
        assert tenants.authenticate(key.text, "beta") == Caller("beta", key.id, "service")
        with pytest.raises(TenantRequired):
            tenants.authenticate(key.text)
        for other in ("gamma", "nobody"):  # nothing tells a foreign tenant from one that is not there
            assert _refusal(lambda other=other: tenants.authenticate(key.text, other)) == "tenant_mismatch"  # type: ignore[misc]

    def test_a_service_key_of_all_acts_for_tenants_to_come(self, tenants: Tenants) -> None:
        key = tenants.create_service_key(None)
        assert _refusal(lambda: tenants.authenticate(key.text, "later")) == "tenant_mismatch"
        tenants.create("later")
        assert tenants.authenticate(key.text, "later").tenant == "later"

    def test_a_service_key_needs_tenants(self, tenants: Tenants) -> None:
        with pytest.raises(RequestInvalid):
            tenants.create_service_key([])
        with pytest.raises(TenantNotFound):
            tenants.create_service_key(["nobody"])
        assert tenants.list_keys() == []

    def test_a_key_stops_when_it_expires_though_it_was_cached(self, tenants: Tenants, clocks: Clocks) -> None:
        tenants.create("acme")
        key = tenants.create_key("acme", expires_at=clocks.wall + 10)
        clocks.wall += 9.9
        assert tenants.authenticate(key.text).tenant == "acme"
        clocks.wall += 0.1
        with pytest.raises(InvalidApiKey):
            tenants.authenticate(key.text)
        with pytest.raises(RequestInvalid):
            tenants.create_key("acme", expires_at=clocks.wall)

    def test_a_revocation_by_another_process_holds_within_the_cache_time(
        self, tenants: Tenants, database: sa.Engine, clocks: Clocks
    ) -> None:
        tenants.create("acme")
        key = tenants.create_key("acme")
        server = _open(database, clocks)
        server.authenticate(key.text)
        tenants.revoke_key(key.id)
        assert server.authenticate(key.text).tenant == "acme"  # cached
        assert server.peek(key.text) is not None
        clocks.monotonic += TTL_S + 0.01
        assert server.peek(key.text) is None
        with pytest.raises(InvalidApiKey):
            server.authenticate(key.text)

    def test_an_own_revocation_holds_at_once(self, tenants: Tenants) -> None:
        tenants.create("acme")
        first, second = tenants.create_key("acme"), tenants.create_key("acme")
        tenants.authenticate(first.text)
        tenants.revoke_key(first.text)  # by its text or its id
        with pytest.raises(InvalidApiKey):
            tenants.authenticate(first.text)
        assert tenants.authenticate(second.text).tenant == "acme"
        with pytest.raises(KeyNotFound):
            tenants.revoke_key("nobody")

    def test_revoking_again_keeps_the_first_moment(self, tenants: Tenants, clocks: Clocks) -> None:
        tenants.create("acme")
        key = tenants.create_key("acme")
        first = tenants.revoke_key(key.id).revoked_at
        clocks.wall += 5
        assert tenants.revoke_key(key.id).revoked_at == first
        assert [info.revoked_at for info in tenants.list_keys("acme")] == [first]

    def test_a_cached_answer_is_for_the_same_header_only(self, tenants: Tenants) -> None:
        tenants.create("acme")
        tenants.create("beta")
        key = tenants.create_service_key(["acme"])
        tenants.authenticate(key.text, "acme")
        assert tenants.peek(key.text, "beta") is None
        assert _refusal(lambda: tenants.authenticate(key.text, "beta")) == "tenant_mismatch"

    @pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a.b", "a/b", "a" * 64, "../x", "a\n", "ä"])
    def test_tenant_ids_are_plain(self, tenants: Tenants, name: str) -> None:
        with pytest.raises(TenantInvalid):
            tenants.create(name)

    def test_a_tenant_is_made_once_though_many_try(self, tenants: Tenants) -> None:
        def create(_: int) -> bool:
            try:
                tenants.create("acme")
            except TenantExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(create, range(8))) == 1
        assert [tenant.id for tenant in tenants.list()] == ["acme"]

    def test_own_limits_lie_over_the_servers(self, tenants: Tenants, database: sa.Engine, clocks: Clocks) -> None:
        tenants.create("acme")
        server = _open(database, clocks, defaults=TenantLimits(max_running=4, tokens_per_minute=1000))
        assert server.limits("acme") == TenantLimits(max_running=4, tokens_per_minute=1000)
        tenants.set_limits("acme", max_running=0, max_adapters=7)
        clocks.monotonic += TTL_S + 0.01
        assert server.limits("acme") == TenantLimits(max_running=0, tokens_per_minute=1000, max_adapters=7)
        tenants.set_limits("acme", max_running=None)
        clocks.monotonic += TTL_S + 0.01
        assert server.limits("acme").max_running == 4

    def test_limits_that_make_no_sense_are_refused(self, tenants: Tenants) -> None:
        tenants.create("acme")
        for changes in ({"max_runing": 3}, {"max_running": -1}, {"max_storage_bytes": 1 << 62}):
            with pytest.raises(RequestInvalid):
                tenants.set_limits("acme", **changes)
        with pytest.raises(TenantNotFound):
            tenants.set_limits("nobody", max_running=3)
        assert tenants.get("acme").limits == TenantLimits()

    def test_an_erased_tenant_leaves_a_tombstone(self, tenants: Tenants) -> None:
        tenants.create("acme")
        tenants.create("beta")
        own, service = tenants.create_key("acme"), tenants.create_service_key(["acme", "beta"])
        tenants.authenticate(own.text)
        tenants.set_limits("acme", max_running=1)
        tenants.erase("acme")
        tenants.erase("acme")
        for call in (
            lambda: tenants.authenticate(own.text),
            lambda: tenants.authenticate(service.text, "acme"),
            lambda: tenants.create("acme"),
            lambda: tenants.create_key("acme"),
            lambda: tenants.limits("acme"),
        ):
            with pytest.raises(TenantErased):
                call()
        assert tenants.authenticate(service.text, "beta").tenant == "beta"
        assert [tenant.id for tenant in tenants.list()] == ["beta"]
        with pytest.raises(TenantNotFound):
            tenants.erase("nobody")

    def test_erasing_deletes_the_tenants_rows_in_tables_that_this_module_does_not_know(
        self, tenants: Tenants, database: sa.Engine
    ) -> None:
        foreign = sa.MetaData()
        things = sa.Table(
            "things", foreign, sa.Column("id", sa.Integer, primary_key=True), sa.Column("tenant", sa.String(63))
        )
        parts = sa.Table("parts", foreign, sa.Column("thing", sa.ForeignKey(things.c.id, ondelete="CASCADE")))
        for name in ("acme", "beta"):
            tenants.create(name)
        with writing(database) as connection:
            foreign.create_all(connection)
            connection.execute(things.insert(), [{"id": 1, "tenant": "acme"}, {"id": 2, "tenant": "beta"}])
            connection.execute(parts.insert(), [{"thing": 1}, {"thing": 2}])
        tenants.erase("acme")
        with reading(database) as connection:
            assert connection.execute(sa.select(things.c.id)).scalars().all() == [2]
            assert connection.execute(sa.select(parts.c.thing)).scalars().all() == [2]
        with writing(database) as connection:
            foreign.drop_all(connection)

    def test_listing_shows_what_a_key_may_do_and_never_the_key(self, tenants: Tenants) -> None:
        for name in ("acme", "beta"):
            tenants.create(name)
        own = tenants.create_key("acme", name="laptop")
        listed, everybody = tenants.create_service_key(["beta", "acme"]), tenants.create_service_key(None)
        shown = {info.id: info for info in tenants.list_keys()}
        assert shown[own.id].tenants == ("acme",)
        assert shown[listed.id].tenants == ("acme", "beta")
        assert shown[everybody.id].all_tenants
        assert {info.id for info in tenants.list_keys("beta")} == {listed.id, everybody.id}
        assert all(key.text.rsplit("_", 1)[1] not in str(shown) for key in (own, listed, everybody))

    def test_migrating_again_changes_nothing(self, tenants: Tenants, database: sa.Engine) -> None:
        migrate(database)
        with reading(database) as connection:
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == head_revision()

    def test_the_migrations_make_the_tables_that_the_modules_declare(
        self, tenants: Tenants, database: sa.Engine
    ) -> None:
        declared = {table.name for table in (tenants_table, keys_table, key_tenants_table)}
        with database.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"include_name": lambda name, kind, _: kind != "table" or name in declared}
            )
            own = [tenants_table, keys_table, key_tenants_table]
            assert [change for change in compare_metadata(context, metadata) if _concerns(change, own)] == []


def _concerns(change: object, tables: list[sa.Table]) -> bool:
    """True when an autogenerate difference is about one of `tables`."""
    return any(f"'{table.name}'" in str(change) for table in tables)
