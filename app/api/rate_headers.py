"""What is left of a tenant's minute, as headers: on answers, and on the 429 that says it is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping

from app.rate_limits import Allowance


def rate_headers(allowances: Mapping[str, Allowance]) -> dict[str, str]:
    """`allowances`: by "requests" and "tokens"; what has no limit is not among them."""
    headers: dict[str, str] = {}
    for kind, allowance in allowances.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(allowance.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(allowance.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = duration(allowance.reset_s)
    return headers


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers write them: `1h2m3s`, `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
