"""What the scheduler knows of tenants' limits: the last ones that were read for a request. Never blocks.

The API reads a tenant's limits before it submits anything, so a tenant with a request in the engine is known here.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from app.engine.queues import EVEN_SHARE, TenantShare
from app.tenants import TenantLimits

MAX_TENANTS = 10_000


class TenantShares:
    """Thread-safe; beyond MAX_TENANTS the one that was read longest ago is forgotten and has an even share."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._shares: OrderedDict[str, TenantShare] = OrderedDict()

    def note(self, tenant: str, limits: TenantLimits) -> None:
        """Remember what was just read; called by `Tenants.limits`."""
        with self._lock:
            self._shares[tenant] = TenantShare(max_waiting=limits.max_waiting, max_running=limits.max_running)
            self._shares.move_to_end(tenant)
            while len(self._shares) > MAX_TENANTS:
                self._shares.popitem(last=False)

    def __call__(self, tenant: str) -> TenantShare:
        """The tenant's share of the engine; asked in every step."""
        return self._shares.get(tenant, EVEN_SHARE)
