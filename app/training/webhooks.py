"""Webhooks: endpoints that tenants name, and signed messages to them when a job is over. At least once each.

A message is put in the outbox in the transaction that ends the job (`job_rows.move`), so it exists if and only if the
job is over; `deliver` sends what is due, for `app.training.courier`. All calls block; thread-safe.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import reading, writing
from app.errors import RateLimited, RequestInvalid
from app.training import job_rows, tables
from app.training.job import new_id
from app.training.job_rows import WEBHOOK_EVENTS, Page
from app.training.webhook_post import PostFailed, UrlRefused, check_url, post

logger = logging.getLogger(__name__)

EVENT_TYPES = tuple(WEBHOOK_EVENTS.values())
SECRET_PREFIX = "whsec_"
OLD_SECRET_S = 24 * 3600.0
RETRY_AFTER_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 6 * 3600.0)  # then the message is given up
MAX_ENDPOINTS = 20  # of one tenant

Post = Callable[[str, bytes, Mapping[str, str]], int]  # url, body, headers -> status


class EndpointNotFound(RequestInvalid):
    """There is no such webhook endpoint."""

    code = "not_found"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a tenant wants to be told. The secret is shown when it is made, never again."""

    id: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str
    created_at: float
    updated_at: float

    def __repr__(self) -> str:
        return f"Endpoint(id={self.id!r})"

    @property
    def secret_hint(self) -> str:
        return f"{SECRET_PREFIX}…{self.secret[-4:]}"


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """What an update names; None stays as it is."""

    name: str | None = None
    url: str | None = None
    event_types: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class DueMessage:
    """A message to be sent now, after so many attempts."""

    id: str
    num_attempts: int
    endpoint_id: str
    tenant: str


class Webhooks:
    """Endpoints of all tenants, and the sending."""

    def __init__(self, engine: Engine, *, send: Post = post, wall: Callable[[], float] = time.time) -> None:
        self._engine, self._send, self._wall = engine, send, wall

    # ---- endpoints

    def create(self, tenant: str, name: str, url: str, event_types: Sequence[str]) -> Endpoint:
        """Raises RequestInvalid, RateLimited (`quota_exceeded`)."""
        _check(url, event_types)
        table, now, endpoint_id = tables.webhook_endpoints, self._wall(), new_id("we_")
        with writing(self._engine) as connection:
            job_rows.lock_tenant(connection, tenant)
            count = sa.select(sa.func.count()).select_from(table).where(table.c.tenant == tenant)
            if connection.execute(count).scalar_one() >= MAX_ENDPOINTS:
                raise RateLimited(f"A tenant has at most {MAX_ENDPOINTS} webhook endpoints.", code="quota_exceeded")
            values = {"id": endpoint_id, "tenant": tenant, "name": name, "url": url, "secret": _new_secret()}
            types = list(dict.fromkeys(event_types))
            row = sa.insert(table).values(**values, event_types=types, created_at=now, updated_at=now)
            connection.execute(row)
            return _load(connection, tenant, endpoint_id)

    def get(self, tenant: str, endpoint_id: str) -> Endpoint:
        with reading(self._engine) as connection:
            return _load(connection, tenant, endpoint_id)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page[Endpoint]:
        table = tables.webhook_endpoints
        mine = table.c.tenant == tenant
        with reading(self._engine) as connection:
            start = job_rows.position(connection, table, mine, after)
            query = sa.select(table).where(mine)
            rows, more = job_rows.page(connection, query, table.c.seq, after=start, limit=limit, asc=False)
            return Page(tuple(map(_endpoint, rows)), more)

    def update(self, tenant: str, endpoint_id: str, change: EndpointChange) -> Endpoint:
        before = self.get(tenant, endpoint_id)
        url = before.url if change.url is None else change.url
        event_types = before.event_types if change.event_types is None else tuple(dict.fromkeys(change.event_types))
        _check(url, event_types)
        name = before.name if change.name is None else change.name
        if (name, url, event_types) == (before.name, before.url, before.event_types):
            return before
        values = {"name": name, "url": url, "event_types": list(event_types), "updated_at": self._wall()}
        return self._write(tenant, endpoint_id, values)

    def delete(self, tenant: str, endpoint_id: str) -> None:
        """Messages still due to it are dropped with it."""
        table = tables.webhook_endpoints
        mine = (table.c.tenant == tenant) & (table.c.id == endpoint_id)
        with writing(self._engine) as connection:
            if connection.execute(sa.delete(table).where(mine)).rowcount == 0:
                raise EndpointNotFound

    def rotate_secret(self, tenant: str, endpoint_id: str, *, keep_old: bool) -> Endpoint:
        """Make a new secret. With `keep_old`, messages are signed with both for 24 hours."""
        before, now = self.get(tenant, endpoint_id), self._wall()
        old = {"old_secret": before.secret, "old_secret_until": now + OLD_SECRET_S}
        none = {"old_secret": None, "old_secret_until": None}
        values = {"secret": _new_secret(), "updated_at": now, **(old if keep_old else none)}
        return self._write(tenant, endpoint_id, values)

    def _write(self, tenant: str, endpoint_id: str, values: Mapping[str, Any]) -> Endpoint:
        table = tables.webhook_endpoints
        mine = (table.c.tenant == tenant) & (table.c.id == endpoint_id)
        with writing(self._engine) as connection:
            connection.execute(sa.update(table).where(mine).values(**values))
            return _load(connection, tenant, endpoint_id)

    # ---- sending

    def test(self, tenant: str, endpoint_id: str, event_type: str) -> int:
        """Send a sample now; return the endpoint's status. Raises RequestInvalid when it cannot be reached."""
        _check_types([event_type])
        table = tables.webhook_endpoints
        with reading(self._engine) as connection:
            _load(connection, tenant, endpoint_id)
            row = connection.execute(sa.select(table).where(table.c.id == endpoint_id)).one()
        message_id, now = new_id("evt_"), self._wall()
        body = {"id": message_id, "object": "event", "type": event_type, "created_at": int(now)}
        data = json.dumps(body | {"data": {"id": "ftjob-sample"}}).encode()
        try:
            return self._send(row.url, data, self._headers(row, message_id, data))
        except (UrlRefused, PostFailed) as exc:
            message = "The endpoint cannot be reached."
            raise RequestInvalid(message, param="url", code="webhook_unreachable") from exc

    def due(self, limit: int = 1000) -> Sequence[DueMessage]:
        """The oldest message of each endpoint whose time has come. Any number of processes may look and deliver."""
        table = tables.webhook_deliveries
        due = (table.c.status == "due") & (table.c.due_at <= self._wall())
        first = sa.select(sa.func.min(table.c.seq)).where(due).group_by(table.c.endpoint_id)
        query = sa.select(table.c.id, table.c.num_attempts, table.c.endpoint_id, table.c.tenant)
        with reading(self._engine) as connection:
            rows = connection.execute(query.where(table.c.seq.in_(first)).order_by(table.c.seq).limit(limit)).all()
        return [DueMessage(*row) for row in rows]

    def deliver(self, message: DueMessage) -> bool:
        """One attempt; False when another process makes it. The next one's time is set first: if this process dies,
        another sends the message again."""
        message_id, num_attempts = message.id, message.num_attempts
        table, endpoints = tables.webhook_deliveries, tables.webhook_endpoints
        same = (table.c.id == message_id) & (table.c.num_attempts == num_attempts)
        is_last = num_attempts >= len(RETRY_AFTER_S)
        again = {"status": "given_up"} if is_last else {"due_at": self._wall() + RETRY_AFTER_S[num_attempts]}
        with writing(self._engine) as connection:
            taken = connection.execute(sa.update(table).where(same).values(num_attempts=num_attempts + 1, **again))
            if taken.rowcount == 0:
                return False  # another process has it
            query = sa.select(table.c.body, endpoints).join(endpoints, endpoints.c.id == table.c.endpoint_id)
            row = connection.execute(query.where(table.c.id == message_id)).first()
        if row is None:
            return False
        if self._attempt(row, message_id):
            with writing(self._engine) as connection:
                connection.execute(sa.update(table).where(table.c.id == message_id).values(status="done"))
        elif is_last:
            logger.warning("webhook given up", extra={"action": "webhook_given_up", "endpoint": row.id})
        return True

    def _attempt(self, row: sa.Row[Any], message_id: str) -> bool:
        data = row.body.encode()
        try:
            status = self._send(row.url, data, self._headers(row, message_id, data))
        except (UrlRefused, PostFailed) as exc:
            logger.info("webhook failed", extra={"action": "webhook_failed", "endpoint": row.id, "cause": str(exc)})
            return False
        return 200 <= status < 300

    def _headers(self, row: sa.Row[Any], message_id: str, body: bytes) -> dict[str, str]:
        """Signed afresh at each attempt, since receivers refuse old timestamps; the id stays."""
        now = self._wall()
        keys = [row.secret]
        if row.old_secret is not None and row.old_secret_until is not None and now < row.old_secret_until:
            keys.append(row.old_secret)
        return {
            "content-type": "application/json",
            "user-agent": "lodger",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now)),
            "webhook-signature": " ".join(sign(key, message_id, int(now), body) for key in keys),
        }


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """`v1,<base64>`: HMAC-SHA256 of `id.timestamp.body` under the decoded secret, as Standard Webhooks has it."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def _new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _check(url: str, event_types: Sequence[str]) -> None:
    try:
        check_url(url)
    except UrlRefused as exc:
        raise RequestInvalid(f"This URL cannot be used: {exc}.", param="url") from exc
    _check_types(event_types)


def _check_types(event_types: Sequence[str]) -> None:
    if unknown := next((name for name in event_types if name not in EVENT_TYPES), None):
        message = f"There is no event type {unknown[:64]!r} here; there are {', '.join(EVENT_TYPES)}."
        raise RequestInvalid(message, param="event_types")
    if not event_types:
        raise RequestInvalid("Name at least one event type.", param="event_types")


def _load(connection: Connection, tenant: str, endpoint_id: str) -> Endpoint:
    table = tables.webhook_endpoints
    row = connection.execute(sa.select(table).where(table.c.tenant == tenant, table.c.id == endpoint_id)).first()
    if row is None:
        raise EndpointNotFound
    return _endpoint(row)


def _endpoint(row: sa.Row[Any]) -> Endpoint:
    values = {name: row._mapping[name] for name in Endpoint.__slots__}
    return Endpoint(**{**values, "event_types": tuple(values["event_types"])})
