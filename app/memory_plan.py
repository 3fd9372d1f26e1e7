"""How much memory a base takes to serve and to train, from its config alone. Arithmetic; nothing is loaded. GB = 1e9.

Weights: NF4 with double quantization is 4.127 bits each: 4, a block of 64 shares an 8-bit scale (0.125), and 256 blocks
a 32-bit one (0.002). Only the linears are quantized; embeddings, head and norms stay in 16 bits. Training
state is 16 bytes a trained parameter (fp32 weight, gradient, two moments). Activations are those of a layer-wise step:
one hidden state a layer and token, and one layer's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
HALF = 2  # bytes
STATE_BYTES = 16  # of a trained parameter
HEAD_CHUNK = 1024  # label positions whose logits exist at a time on a GPU
RESERVE_BYTES = 1.2e9  # what the driver, the kernels and the allocator take
MEMORIES_GB = (16, 24, 48, 80)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a Llama-like decoder that decide its memory."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool  # the head is the embedding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json. Raises KeyError for what is no Llama-like decoder's."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of one layer's linears."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embedding, head and norms."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2) + self.hidden * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, rank: int, targets: frozenset[str] | None = None) -> int:
        chosen = [shape for name, shape in self.linears.items() if targets is None or name in targets]
        return self.layers * sum(rank * (i + o) for i, o in chosen)

    @property
    def nf4_bytes(self) -> float:
        """The base as it serves: linears in NF4, the rest in 16 bits."""
        return self.linear_parameters * NF4_BITS / 8 + self.other_parameters * HALF

    @property
    def half_bytes(self) -> float:
        return self.parameters * HALF

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * HALF

    def activation_bytes(self, tokens: int) -> float:
        """Of one micro-step: what is kept of each layer, one layer recomputed with its graph, and a chunk of logits."""
        kept = self.layers * self.hidden * HALF
        one_layer = 8 * self.intermediate * HALF
        return tokens * (kept + one_layer) + min(tokens, HEAD_CHUNK) * self.vocab * 4 * 2


@dataclass(frozen=True, slots=True)
class Training:
    """Bytes of one way to train."""

    name: str
    weights: float
    state: float  # of what is trained: weight, gradient, moments
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.state + self.activations


def trainings(shape: ModelShape, *, rank: int, tokens: int) -> tuple[Training, Training, Training]:
    """QLoRA, LoRA and full fine-tuning side by side, with micro-batches of `tokens`."""
    adapter, activations = shape.adapter_parameters(rank) * STATE_BYTES, shape.activation_bytes(tokens)
    # Full fine-tuning in mixed precision: the 16 bytes hold the fp32 weights, and a 16-bit copy computes.
    return (
        Training("QLoRA", shape.nf4_bytes, adapter, activations),
        Training("LoRA", shape.half_bytes, adapter, activations),
        Training("full", shape.half_bytes, shape.parameters * STATE_BYTES, activations),
    )


def pool_bytes(shape: ModelShape, rows: int) -> float:
    """The rank pool of serving: rows of A and B for every linear."""
    return shape.adapter_parameters(rows) * HALF


def tokens_that_fit(memory_bytes: float, fixed_bytes: float, bytes_per_token: float) -> int:
    """0 when not even the fixed part fits."""
    room = memory_bytes - RESERVE_BYTES - fixed_bytes
    return max(0, int(room / bytes_per_token))


def longest_step(shape: ModelShape, training: Training, memory_bytes: float) -> int:
    """Tokens of the largest micro-batch that fits: the logits' share stops growing at a chunk."""
    chunk = shape.activation_bytes(HEAD_CHUNK) - shape.activation_bytes(0)
    per_token = shape.activation_bytes(HEAD_CHUNK + 1) - shape.activation_bytes(HEAD_CHUNK)
    fixed = training.weights + training.state + (chunk - HEAD_CHUNK * per_token)
    fits = tokens_that_fit(memory_bytes, fixed, per_token)
    if fits >= HEAD_CHUNK:
        return fits
    return tokens_that_fit(memory_bytes, training.weights + training.state, chunk / HEAD_CHUNK)
