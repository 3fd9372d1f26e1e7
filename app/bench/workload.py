"""What a benchmark asks for: how many adapters, which requests, in which order. Fixed by the seed; no torch.

Every system under test gets the same jobs. Prompts are random token ids, so nothing is known beforehand and no two
prompts share a beginning; answers have one length, since no end token stops them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.errors import LodgerError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("offline", "http", "both", "none")
BASELINES = ("none", "peft-mixed", "peft-swap", "all")
TRAINING = ("off", "on", "both")
ADAPTER_NAME = "bench"  # of each tenant's one adapter
SWAP_REQUESTS = 4  # of a round that PEFT answers one at a time: its speed does not depend on how many there are
REQUESTS_PER_STREAM = 2  # where --requests is not given


class BenchOptionInvalid(LodgerError):
    """This value cannot be measured; `param` is the option."""

    code = "invalid_value"


class BenchFailed(LodgerError):
    """The benchmark could not be completed; nothing it measured counts."""

    code = "bench_failed"


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """The options of `lodger bench` that say what is measured. Tokens, requests and rows as the names say."""

    adapters: int | None = None  # None: as many as requests are concurrent
    rank: int = 16
    targets: tuple[str, ...] = TARGETS
    concurrency: tuple[int, ...] = (8, 16)
    requests: int | None = None  # a round; None: twice the concurrency
    prompt_tokens: tuple[int, int] = (64, 64)  # shortest and longest
    output_tokens: int = 64
    zipf: float = 0.0  # exponent of the adapters' popularity; 0: they take turns
    cold_share: float = 0.0  # of the requests, each for an adapter of its own that nobody has loaded
    mode: str = "offline"
    baseline: str = "none"
    rounds: int = 5
    stream: bool = True  # over HTTP
    train: str = "off"
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # at which training is measured; 1: a full batch, never idle
    training_shares: tuple[float, ...] = ()  # none: LODGER_TRAINING_SHARE alone
    cold_store_delay_s: float = 0.0  # 0: not measured
    seed: int = 0

    @property
    def systems(self) -> tuple[str, ...]:
        """What runs, in the order of each round."""
        ours = {"offline": ("offline",), "http": ("http",), "both": ("offline", "http"), "none": ()}[self.mode]
        peers = ("peft-mixed", "peft-swap") if self.baseline == "all" else (self.baseline,)
        return ours + tuple(peer for peer in peers if peer != "none")

    @property
    def max_tokens_each(self) -> int:
        return self.prompt_tokens[1] + self.output_tokens

    def adapters_at(self, concurrency: int) -> int:
        return concurrency if self.adapters is None else self.adapters

    @property
    def most_adapters(self) -> int:
        return max(map(self.adapters_at, self.concurrency))

    def requests_at(self, concurrency: int) -> int:
        return self.requests or REQUESTS_PER_STREAM * concurrency

    def num_cold_at(self, concurrency: int) -> int:
        """Cold requests in one round."""
        return round(self.cold_share * self.requests_at(concurrency))

    def check(self, *, max_context: int, max_rank: int, pool_rows: int, object_timeout_s: float) -> None:
        """Raise BenchOptionInvalid for the first value that cannot be, naming the option."""
        for option, problem in _problems(self, max_context, max_rank, pool_rows, object_timeout_s):
            raise BenchOptionInvalid(f"{option}: {problem}", param=option)


def _problems(
    s: WorkloadSpec, max_context: int, max_rank: int, pool_rows: int, object_timeout_s: float
) -> list[tuple[str, str]]:
    """(option, why not) of everything that is wrong."""
    shortest, longest = s.prompt_tokens
    tests: list[tuple[bool, str, str]] = [
        (s.adapters is not None and s.adapters < 0, "--adapters", "a number from 0 on, or 'same'"),
        (s.adapters is not None and s.adapters > 9999, "--adapters", "at most 9999"),
        (s.rank < 1, "--rank", "at least 1"),
        (s.rank > max_rank, "--rank", f"{s.rank} is above LODGER_MAX_RANK ({max_rank})"),
        (s.rank > pool_rows, "--rank", f"{s.rank} is above LODGER_POOL_RANK ({pool_rows})"),
        (not s.targets, "--targets", "at least one linear"),
        (bool(set(s.targets) - set(TARGETS)), "--targets", f"choose from {', '.join(TARGETS)}, or 'all'"),
        (not s.concurrency, "--concurrency", "at least one number"),
        (min(s.concurrency, default=1) < 1, "--concurrency", "every number is at least 1"),
        (max(s.concurrency, default=1) > 4096, "--concurrency", "at most 4096"),
        (len(set(s.concurrency)) < len(s.concurrency), "--concurrency", "a number stands there twice"),
        (s.requests is not None and s.requests < 1, "--requests", "at least 1"),
        (
            s.requests is not None and s.requests < max(s.concurrency, default=1),
            "--requests",
            f"{s.requests} requests cannot keep {max(s.concurrency, default=1)} streams busy (--concurrency)",
        ),
        (shortest < 1, "--prompt-tokens", "at least 1"),
        (longest < shortest, "--prompt-tokens", "a range goes from the shorter to the longer"),
        (s.output_tokens < 2, "--output-tokens", "at least 2: one token has no inter-token latency"),
        (
            longest + s.output_tokens > max_context,
            "--output-tokens",
            f"{longest} prompt and {s.output_tokens} output tokens exceed the base's context of {max_context}",
        ),
        (not 0 <= s.zipf <= 10, "--zipf", "a number from 0 to 10"),
        (not 0 <= s.cold_share <= 1, "--cold-share", "a share from 0 to 1"),
        (
            s.adapters == 0 and s.cold_share < 1 and s.zipf > 0,
            "--zipf",
            "without adapters there is no popularity to skew",
        ),
        (s.mode not in MODES, "--mode", f"one of {', '.join(MODES)}"),
        (s.baseline not in BASELINES, "--baseline", f"one of {', '.join(BASELINES)}"),
        (s.train not in TRAINING, "--train", f"one of {', '.join(TRAINING)}"),
        (s.train == "off" and s.loads != WorkloadSpec().loads, "--loads", "goes with --train on or both"),
        (s.train == "off" and bool(s.training_shares), "--training-shares", "goes with --train on or both"),
        (not s.loads or not all(0 < load <= 1 for load in s.loads), "--loads", "numbers above 0, at most 1"),
        (len(set(s.loads)) < len(s.loads), "--loads", "a number stands there twice"),
        (not all(0 < x <= 0.9 for x in s.training_shares), "--training-shares", "numbers above 0, at most 0.9"),
        (len(set(s.training_shares)) < len(s.training_shares), "--training-shares", "a number stands there twice"),
        (s.rounds < 1, "--rounds", "at least 1"),
        (not 0 <= s.cold_store_delay_s <= 60, "--cold-store-delay", "0 to 60 seconds"),
        (
            s.cold_store_delay_s >= object_timeout_s,
            "--cold-store-delay",
            f"no object would come within LODGER_S3_OBJECT_TIMEOUT_S ({object_timeout_s:g})",
        ),
        (s.seed < 0, "--seed", "0 or more"),
        (
            s.mode == "none" and s.baseline == "none" and s.cold_store_delay_s == 0 and s.train == "off",
            "--mode",
            "'none' needs something else to measure: --baseline, --train or --cold-store-delay",
        ),
        (not s.stream and "http" not in s.systems, "--no-stream", "only the HTTP mode streams: --mode http or both"),
    ]
    return [(option, problem) for is_wrong, option, problem in tests if is_wrong]


@dataclass(frozen=True, slots=True)
class Job:
    """One request. `adapter` is a label (`warm-0003`, `cold-0007`), None for the base."""

    index: int
    adapter: str | None
    prompt: tuple[int, ...]
    output_tokens: int

    @property
    def is_cold(self) -> bool:
        return self.adapter is not None and self.adapter.startswith("cold-")


@dataclass(frozen=True, slots=True)
class Extra:
    """A request beside the measured streams, `at_s` after the beginning."""

    at_s: float
    job: Job


def warm_labels(count: int) -> tuple[str, ...]:
    return tuple(f"warm-{i:04d}" for i in range(count))


def cold_labels(first: int, count: int) -> tuple[str, ...]:
    return tuple(f"cold-{i:04d}" for i in range(first, first + count))


def make_jobs(spec: WorkloadSpec, concurrency: int, vocab_size: int, cold: Sequence[str] = ()) -> tuple[Job, ...]:
    """One round's requests; the same for the same arguments but for the names of its cold adapters."""
    rng = random.Random(f"{spec.seed}/{concurrency}")
    count = spec.requests_at(concurrency)
    chosen: list[str | None] = list(_choices(rng, spec, spec.adapters_at(concurrency), count))
    for place, label in zip(sorted(rng.sample(range(count), spec.num_cold_at(concurrency))), cold, strict=True):
        chosen[place] = label
    lengths = [rng.randint(*spec.prompt_tokens) for _ in range(count)]
    return tuple(
        Job(i, adapter, tuple(rng.randrange(vocab_size) for _ in range(length)), spec.output_tokens)
        for i, (adapter, length) in enumerate(zip(chosen, lengths, strict=True))
    )


def warm_up_jobs(spec: WorkloadSpec, labels: Sequence[str], vocab_size: int) -> tuple[Job, ...]:
    """One short request for each adapter, or for the base where there are none."""
    rng = random.Random(f"{spec.seed}/warm-up")
    names: Sequence[str | None] = labels or (None,)
    tokens = min(spec.output_tokens, 4)
    length = spec.prompt_tokens[0]
    return tuple(
        Job(i, name, tuple(rng.randrange(vocab_size) for _ in range(length)), tokens) for i, name in enumerate(names)
    )


def _choices(rng: random.Random, spec: WorkloadSpec, adapters: int, count: int) -> Sequence[str | None]:
    """Who is asked: in turns, so that neighbours differ, or drawn by popularity 1 / rank^zipf."""
    if adapters == 0:
        return [None] * count
    labels = warm_labels(adapters)
    if spec.zipf == 0:
        return list(itertools.islice(itertools.cycle(labels), count))
    return rng.choices(labels, weights=zipf_weights(adapters, spec.zipf), k=count)


def zipf_weights(count: int, exponent: float) -> list[float]:
    return [1 / (i + 1) ** exponent for i in range(count)]


def by_adapter(jobs: Sequence[Job]) -> Mapping[str | None, int]:
    """How many requests each adapter gets."""
    counts: dict[str | None, int] = {}
    for job in jobs:
        counts[job.adapter] = counts.get(job.adapter, 0) + 1
    return counts
