"""Answers that are given again: what a client repeats under one Idempotency-Key is done once.

A key is a tenant's own and is remembered for a day. It is claimed before the work begins, with a fingerprint of what
was asked; the claim is dropped when the work fails, since then a repetition may well succeed. All methods block and are
thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import metadata, writing
from app.errors import CallInProgress, RequestInvalid

REMEMBERED_S = 24 * 3600.0
# After this long without an answer, whoever claimed the key is taken for dead. Longer than any call that is remembered.
CLAIM_S = 900.0
KEY_REUSED = "This Idempotency-Key was used with another request body. Use a new key."

keys_table = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("tenant", sa.String(63), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("claimed_at", sa.Float(53), nullable=False),
    sa.Column("answer", sa.JSON(none_as_null=True)),  # null while the call is at work
)


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """What a call answered."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


class IdempotencyKeys:
    """The keys of all tenants."""

    def __init__(self, engine: Engine, *, wall: Callable[[], float] = time.time) -> None:
        self._engine, self._wall = engine, wall

    def claim(self, tenant: str, key: str, fingerprint: str) -> KeptAnswer | None:
        """What the same call answered before; None when it is the caller's to do, who then says `keep` or `release`.

        Raises RequestInvalid (`idempotency_key_reused`) for another fingerprint, CallInProgress.
        """
        now = self._wall()
        row = {"tenant": tenant, "key": key, "fingerprint": fingerprint, "claimed_at": now}
        try:
            with writing(self._engine) as connection:
                self._forget_old(connection, tenant, now)
                known = connection.execute(sa.select(keys_table).where(_is(tenant, key))).first()
                if known is None:
                    connection.execute(sa.insert(keys_table).values(row))
                    return None
        except sa.exc.IntegrityError:  # somebody else's claim was committed between the two
            raise CallInProgress from None
        if known.fingerprint != fingerprint:
            raise RequestInvalid(KEY_REUSED, code="idempotency_key_reused", param="Idempotency-Key")
        if known.answer is None:
            raise CallInProgress
        return KeptAnswer(**known.answer)

    def keep(self, tenant: str, key: str, answer: KeptAnswer) -> None:
        """Remember what the claimed call answered."""
        values = {"status": answer.status, "body": dict(answer.body), "headers": dict(answer.headers)}
        with writing(self._engine) as connection:
            connection.execute(sa.update(keys_table).where(_is(tenant, key)).values(answer=values))

    def release(self, tenant: str, key: str) -> None:
        """The claimed call failed: the next one with this key begins anew."""
        with writing(self._engine) as connection:
            connection.execute(sa.delete(keys_table).where(_is(tenant, key), keys_table.c.answer.is_(None)))

    @staticmethod
    def _forget_old(connection: Connection, tenant: str, now: float) -> None:
        columns = keys_table.c
        is_old = columns.claimed_at < now - REMEMBERED_S
        is_dead = columns.answer.is_(None) & (columns.claimed_at < now - CLAIM_S)
        connection.execute(sa.delete(keys_table).where(columns.tenant == tenant, is_old | is_dead))


def _is(tenant: str, key: str) -> sa.ColumnElement[bool]:
    return (keys_table.c.tenant == tenant) & (keys_table.c.key == key)
