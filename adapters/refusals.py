"""Why loads fail, and for how long a failure is remembered so that it is not tried again for every request.

Plain book-keeping: the loader calls it under its own lock.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from adapters.errors import AdapterDigestMismatch, AdapterError, AdapterNotFound, AdapterRefused

# Error code -> reason in metrics. A code that is not here is a matter of the file's format.
FAILURE_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "model_not_found": "not_found",
        "adapter_digest_mismatch": "digest",
        "adapter_rank_invalid": "rank",
        "adapter_rank_too_large": "rank",
        "adapter_base_mismatch": "base_mismatch",
        "adapter_renderer_mismatch": "base_mismatch",
        "adapter_no_modules": "no_modules",
        "adapter_module_unknown": "no_modules",
        "adapter_values_not_finite": "nan",
        "adapter_norm_too_large": "nan",
        "adapter_quarantined": "nan",
        "adapter_unavailable": "s3",
    }
)
# What has no code of its own: `timeout` (the store's or ours), `overload` (too many loads), `disk`, `internal`.
OTHER_REASONS = ("format", "timeout", "overload", "disk", "internal")
REASONS = tuple(dict.fromkeys([*FAILURE_REASONS.values(), *OTHER_REASONS]))


def failure_reason(error: AdapterError) -> str:
    return FAILURE_REASONS.get(error.code, "format")


@dataclass(frozen=True, slots=True)
class NegativeTTL:
    """Seconds for which a failure is remembered. A refusal is remembered for good: the digest names the bytes."""

    not_found_s: float = 10.0
    unavailable_s: float = 2.0  # up to half as much again at random, so that replicas do not return together
    digest_s: float = 30.0  # an operator may put the right bytes back


class NegativeCache:
    """Adapters that could not be loaded. At most `max_keys` a tenant: one tenant's refusals push out no other's."""

    def __init__(
        self, ttl: NegativeTTL, clock: Callable[[], float], random: Callable[[], float], *, max_keys: int = 1000
    ) -> None:
        self._ttl = ttl
        self._clock = clock
        self._random = random  # [0, 1)
        self._max_keys = max_keys
        self._by_tenant: dict[str, OrderedDict[str, tuple[AdapterError, float]]] = {}

    def __len__(self) -> int:
        return sum(len(failures) for failures in self._by_tenant.values())

    def get(self, key: tuple[str, str]) -> AdapterError | None:
        """Return the failure that still holds for (tenant, digest)."""
        failures = self._by_tenant.get(key[0])
        if failures is None or key[1] not in failures:
            return None
        error, until = failures[key[1]]
        if self._clock() >= until:
            self.forget(key)
            return None
        return error

    def remember(self, key: tuple[str, str], error: AdapterError) -> None:
        failures = self._by_tenant.setdefault(key[0], OrderedDict())
        failures.pop(key[1], None)
        # A copy has no traceback, hence no frames that hold on to a file's bytes.
        failures[key[1]] = (copy.copy(error), self._clock() + self._seconds(error))
        while len(failures) > self._max_keys:
            failures.popitem(last=False)

    def forget(self, key: tuple[str, str]) -> None:
        failures = self._by_tenant.get(key[0])
        if failures is not None:
            failures.pop(key[1], None)
            if not failures:
                del self._by_tenant[key[0]]

    def forget_tenant(self, tenant: str) -> None:
        self._by_tenant.pop(tenant, None)

    def _seconds(self, error: AdapterError) -> float:
        if isinstance(error, AdapterRefused):
            return math.inf
        if isinstance(error, AdapterNotFound):
            return self._ttl.not_found_s
        if isinstance(error, AdapterDigestMismatch):
            return self._ttl.digest_s
        return self._ttl.unavailable_s * (1 + self._random() / 2)
