"""Whose job is next: tenants in turns, a tenant's own jobs by priority and age. Plain Python, no SQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job."""

    id: str
    tenant: str
    priority: int
    seq: int


def claim_order(
    waiting: Iterable[Waiting], *, running: Mapping[str, int], turns: Mapping[str, int]
) -> Iterator[Waiting]:
    """Yield jobs in the order in which they would be claimed if none ended meanwhile.

    Each turn goes to the tenant with the fewest running jobs; among those, to the one served longest ago. So a tenant
    with a thousand jobs delays another's first job by one at most. `running`: jobs at work per tenant. `turns`: when
    each tenant was last served, larger is later.
    """
    by_tenant: dict[str, list[Waiting]] = {}
    for job in waiting:
        by_tenant.setdefault(job.tenant, []).append(job)
    for jobs in by_tenant.values():
        jobs.sort(key=lambda job: (-job.priority, job.seq), reverse=True)  # the next one is at the end
    at_work = {tenant: running.get(tenant, 0) for tenant in by_tenant}
    served = {tenant: turns.get(tenant, 0) for tenant in by_tenant}
    now = max(turns.values(), default=0)
    while by_tenant:
        tenant = min(by_tenant, key=lambda name: (at_work[name], served[name], by_tenant[name][-1].seq))
        yield by_tenant[tenant].pop()
        now += 1
        at_work[tenant] += 1
        served[tenant] = now
        if not by_tenant[tenant]:
            del by_tenant[tenant]
