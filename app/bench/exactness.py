"""Speed from wrong tokens does not count: before anything is measured, both sides answer the same requests in fp32.

In bf16 the most likely token depends on the batch's shape, so equality is only asked of fp32, whatever is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.bench.figures import RoundTrace
from app.bench.workload import BenchFailed, Job

CHECKED_TOKENS = 16  # per request


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which a peer's answer differs from ours."""

    system: str
    request: int
    adapter: str | None
    at: int
    ours: int
    theirs: int

    def __str__(self) -> str:
        who = self.adapter or "the base"
        return (
            f"{self.system}: request {self.request} ({who}), token {self.at}: ours is {self.ours}, theirs {self.theirs}"
        )


def checked_jobs(jobs: Sequence[Job], concurrency: int) -> tuple[Job, ...]:
    """The first batch, with short answers."""
    return tuple(replace(job, output_tokens=min(job.output_tokens, CHECKED_TOKENS)) for job in jobs[:concurrency])


def differences(jobs: Sequence[Job], ours: RoundTrace, theirs: Mapping[str, RoundTrace]) -> list[Difference]:
    """One per request and system at most."""
    own = {trace.index: trace.tokens for trace in ours.requests}
    found = []
    for system, traces in theirs.items():
        answers = {trace.index: trace.tokens for trace in traces.requests}
        for job in jobs:
            pairs = list(zip(own[job.index], answers.get(job.index, ()), strict=False))
            wrong = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if wrong is not None:
                found.append(Difference(system, job.index, job.adapter, wrong, *pairs[wrong]))
            elif len(pairs) != job.output_tokens:
                found.append(Difference(system, job.index, job.adapter, len(pairs), -1, -1))
    return found


def require_equal(jobs: Sequence[Job], ours: RoundTrace, theirs: Mapping[str, RoundTrace]) -> int:
    """Return how many tokens were compared. Raises BenchFailed that names each difference."""
    if wrong := differences(jobs, ours, theirs):
        raise BenchFailed(
            "greedy fp32 tokens differ, so no speed counts:\n" + "\n".join(f"  {line}" for line in wrong[:20])
        )
    return sum(job.output_tokens for job in jobs) * len(theirs)
