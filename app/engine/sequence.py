"""The engine's nouns: what a client asked (`Request`), its life (`Sequence`), a step's work (`Batch`), what it emits.

Plain Python without torch. `Request` and the events cross threads and are frozen; a `Sequence` belongs to the engine
thread.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from adapters.manifest import AdapterManifest

AdapterKey = tuple[str, str]  # (tenant, digest)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen. Values are checked at the API's edge; ranges in comments."""

    max_tokens: int = 16  # >= 1
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy; <= 2
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # [0, 1)
    presence_penalty: float = 0.0  # [-2, 2], over generated tokens, as OpenAI counts them
    frequency_penalty: float = 0.0  # [-2, 2], over generated tokens
    repetition_penalty: float = 1.0  # > 0, over prompt and generated tokens, as in transformers
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias in [-100, 100])
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()  # end the sequence; the id itself is emitted, its text is not shown
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; k: the chosen token's log-probability and the k most likely (0 <= k <= 20)
    prompt_logprobs: int | None = None  # the same for every prompt position but the first (echo)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence that a client asked for (`n > 1` is n requests)."""

    id: str
    tenant: str
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: SamplingParams
    adapter: AdapterManifest | None  # None is the base model
    arrival: float  # time.monotonic()
    deadline: float  # time.monotonic(); waiting past it ends with "deadline"
    eos_ids: frozenset[int] = frozenset()
    is_shared: bool = False  # the adapter is another tenant's, who lets this one use it


class FinishReason(enum.Enum):
    """Why a sequence ended; each request ends in exactly one."""

    STOP = "stop"  # an end-of-sequence or stop id, or a stop string found by the API
    LENGTH = "length"  # max_tokens or the context limit
    CANCELLED = "cancelled"  # the client left, or the API had enough
    DEADLINE = "deadline"  # not finished in time
    ERROR = "error"  # `error` says which


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural-log probability under the unmodified distribution, and the most likely alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Admitted:
    """The first event of a sequence that runs: its adapter is leased and its prompt is about to be computed."""

    request_id: str
    cached_tokens: int  # prompt tokens found in the prefix cache


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `prompt_logprobs` comes with the first one, if asked for (its first entry is None)."""

    request_id: str
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The one last event of a request."""

    request_id: str
    reason: FinishReason
    error: Exception | None = None  # of `app.errors` or `adapters.errors`
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """time.monotonic() at the borders of a request's life; None where it never got that far."""

    arrival: float
    admitted: float | None
    first_token: float | None
    finished: float
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    tier: str | None  # where the adapter was found: "pool", "host", "disk", "s3"; None for the base


Event = Admitted | Token | Finished


class Phase(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # queued; its adapter, if any, is not yet asked for or is ready
    FETCHING = "fetching"  # its adapter is on its way to host memory; blocks nobody
    RUNNING = "running"  # holds KV blocks and a lease
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's life in the engine. Mutable; the engine thread alone touches it."""

    request: Request
    tokens: list[int] = field(default_factory=list)  # prompt, then generated
    phase: Phase = Phase.WAITING
    num_computed: int = 0  # leading tokens whose K and V are in the cache; filled by the engine after each step
    blocks: list[int] = field(default_factory=list)  # KV block ids in order; filled by the scheduler
    has_lease: bool = False
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    admitted_at: float | None = None
    first_token_at: float | None = None
    num_preemptions: int = 0
    tier: str | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    sampler_state: object | None = None  # owned by the sampler: generator and token counts
    block_hashes: list[bytes] = field(default_factory=list)  # of leading full blocks; filled by the KV cache as needed
    num_committed: int = 0  # leading blocks that the KV cache has seen computed
    pending_hash: bytes | None = None  # the full block that is computed next; filled by the KV cache

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def adapter_key(self) -> AdapterKey | None:
        adapter = self.request.adapter
        return None if adapter is None else (adapter.tenant, adapter.digest)

    @property
    def needs_prompt_logits(self) -> bool:
        """True while prompt log-probabilities are owed: each prompt position must then be computed, none found."""
        return self.request.sampling.prompt_logprobs is not None and self.num_generated == 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step: tokens [start, start + count) of it are computed."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """True when the chunk ends at the sequence's last token, so the next one can be sampled."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs."""

    chunks: tuple[Chunk, ...]

    @property
    def num_decodes(self) -> int:
        """Sequences that get their next token from this step."""
        return sum(chunk.count == 1 for chunk in self.chunks)

    @property
    def has_prefill(self) -> bool:
        return self.num_decodes < len(self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Warmed:
    """What came of warming an adapter."""

    tier: str  # where it was found: "pool", "host", "disk" or "s3"
    is_resident: bool  # False when leases left no room in the pool: it waits in host memory
    is_pinned: bool  # False also when the pool's share for pins is used up
