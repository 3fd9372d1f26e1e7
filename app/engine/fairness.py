"""Who is served next: virtual token counters.

After Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588). Each tenant has one counter of the
work done for it, and who has had least is next. Tenants that always wait get service in proportion to their weights,
within a bound that does not grow with time. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class VirtualTokenCounters:
    """Invariant: an absence earns no credit; a tenant that begins to wait is level with those who wait already.

    There is one number for each tenant that ever asked, so memory is bounded by the tenants that have keys.
    """

    def __init__(self, weight: Callable[[str], float] = lambda tenant: 1.0) -> None:
        """`weight(tenant)` > 0: a tenant of weight 2 gets twice the service of one of weight 1."""
        self._weight = weight
        self._served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}  # requests that wait; a tenant with none is absent
        self._last_leaver: str | None = None  # the tenant that was the last to stop waiting

    def served(self, tenant: str) -> float:
        """Weighted tokens, comparable between tenants."""
        return self._served.get(tenant, 0.0)

    def arrive(self, tenant: str) -> None:
        """A request begins to wait; if it is its tenant's only one, the tenant is lifted to the least who waits."""
        if tenant not in self._waiting:
            self._served[tenant] = max(self.served(tenant), self._floor())
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def come_back(self, tenant: str) -> None:
        """A preempted request waits again. It was never away, so nothing is lifted."""
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A request waits no longer: it was admitted, or ended while it waited."""
        left = self._waiting[tenant] - 1
        if left:
            self._waiting[tenant] = left
        else:
            del self._waiting[tenant]
            self._last_leaver = tenant

    def charge_prompt(self, tenant: str, num_tokens: int) -> None:
        """Charge a prompt, once, when its sequence is admitted for the first time."""
        self._charge(tenant, INPUT_WEIGHT * num_tokens)

    def charge_output(self, tenant: str, num_tokens: int = 1) -> None:
        """Charge generated tokens, after the step that made them."""
        self._charge(tenant, OUTPUT_WEIGHT * num_tokens)

    def _charge(self, tenant: str, cost: float) -> None:
        self._served[tenant] = self.served(tenant) + cost / self._weight(tenant)

    def _floor(self) -> float:
        """The least counter of those who wait; when nobody does, the counter of who waited last."""
        if self._waiting:
            return min(self._served[tenant] for tenant in self._waiting)
        return 0.0 if self._last_leaver is None else self._served[self._last_leaver]
