"""Spec + counts -> numbers: the rules behind "auto", the adapter's size, and what a job will cost. No torch, no SQL.

The starting values and their reasons are QLoRA's and its successors': all linears, rank 16, alpha 32, a rate of 2e-4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapters.manifest import BaseModelSpec
from app.training.dataset_rows import Method
from app.training.fitting import PrepareOptions
from app.training.spec import Init, JobSpec, OnLong, OptimizerKind, Schedule, TrainOn

BASE_RATE = 2e-4
BASE_RATE_LARGE = 1e-4  # from LARGE_BASE_PARAMETERS on
BASE_RATE_DPO = 5e-5  # preferences overshoot at the supervised rate
LARGE_BASE_PARAMETERS = 33e9
ALPHA = 32.0
MANY_EXAMPLES = 10_000
FEW_EXAMPLES = 500
BYTES_PER_TRAINED = 16  # fp32 weight, gradient and two moments
BYTES_PER_TRAINED_8BIT = 10
MIN_8BIT_NUMBERS = 4096  # bitsandbytes keeps the moments of smaller tensors in fp32


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """What resolving needs to know of the base."""

    spec: BaseModelSpec
    max_context: int  # tokens
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_rank: int  # largest rank that may be served
    micro_batch_tokens: int  # most tokens of one pass, if no example is longer
    compute_bytes: int = 2  # of one activation value
    max_scale: float = 128.0  # largest scaling, alpha over rank, that may be served


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything a training run needs, nothing left to choose. Stored with the job and in the adapter's manifest."""

    method: Method
    # the adapter
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # last parts of module paths, sorted
    init: Init
    use_rslora: bool
    # the steps
    n_epochs: int
    batch_size: int  # examples of one optimizer step
    learning_rate_multiplier: float
    learning_rate: float
    schedule: Schedule
    warmup_ratio: float
    max_grad_norm: float
    optimizer: OptimizerKind
    total_steps: int
    max_steps: int | None
    seed: int
    beta: float | None  # dpo only
    # the data
    max_seq_length: int
    on_long: OnLong
    train_on: TrainOn
    # measuring and publishing
    eval_every: int | None  # steps; None is at the end of each epoch
    early_stop_patience: int  # epochs; 0 never stops early
    gate_min_improvement: float
    gate_hold: bool

    @property
    def warmup_steps(self) -> int:
        return max(1, math.ceil(self.warmup_ratio * self.total_steps)) if self.warmup_ratio > 0 else 0

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def steps_per_epoch(self, num_examples: int) -> int:
        return math.ceil(num_examples / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> TrainingConfig:
        typed = {"method": Method(body["method"]), "target_modules": tuple(body["target_modules"])}
        return cls(**{"optimizer": "adamw", **body, **typed})  # jobs from before there was a choice


def auto_epochs(num_examples: int) -> int:
    """OpenAI's published rule: three, more for few examples, fewer for very many."""
    if 3 * num_examples < 100:
        return min(25, 100 // max(1, num_examples))
    if 3 * num_examples > 25_000:
        return max(1, 25_000 // num_examples)
    return 3


def auto_batch_size(num_examples: int) -> int:
    return 16 if num_examples > MANY_EXAMPLES else min(8, math.ceil(num_examples / 10))


def base_rate(base: BaseModelSpec, method: Method) -> float:
    """The learning rate that the multiplier multiplies."""
    if method is Method.DPO:
        return BASE_RATE_DPO
    parameters = sum(inputs * outputs for inputs, outputs in base.linears.values())
    return BASE_RATE_LARGE if parameters >= LARGE_BASE_PARAMETERS else BASE_RATE


def possible_ranks(inherited: int | None, asked: int | None, max_rank: int) -> tuple[int, int]:
    """The rank that few and that many examples get; the same where it is inherited or asked for."""
    fixed = inherited or asked
    return (fixed, fixed) if fixed else (min(16, max_rank), min(32, max_rank))


def prepare_options(spec: JobSpec, base: TrainableBase) -> PrepareOptions:
    """What tokenizing needs; known before any count is."""
    asked = spec.training
    length = min(asked.max_seq_length or base.max_context, base.max_context)
    return PrepareOptions(spec.method, max_seq_length=length, on_long=asked.on_long, train_on=asked.train_on)


def resolve(spec: JobSpec, num_examples: int, base: TrainableBase) -> TrainingConfig:
    """Replace every "auto". `num_examples` are those trained on, without the held-out ones."""
    hyper, lora, asked, publish = spec.hyperparameters, spec.lora, spec.training, spec.publish
    epochs = hyper.n_epochs or auto_epochs(num_examples)
    batch = min(hyper.batch_size or auto_batch_size(num_examples), num_examples)
    multiplier = 1.0 if hyper.learning_rate_multiplier is None else hyper.learning_rate_multiplier
    inherited = spec.parent or {}
    few, many = possible_ranks(inherited.get("rank"), lora.rank, base.max_rank)
    rank = many if num_examples > MANY_EXAMPLES else few
    dropout = lora.dropout if lora.dropout is not None else (0.05 if num_examples < FEW_EXAMPLES else 0.0)
    steps = math.ceil(num_examples / batch) * epochs
    return TrainingConfig(
        method=spec.method,
        rank=rank,
        alpha=lora.alpha or ALPHA,
        dropout=dropout,
        target_modules=tuple(sorted(lora.target_modules or base.spec.target_kinds)),
        init=lora.init,
        use_rslora=lora.use_rslora,
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=multiplier,
        learning_rate=base_rate(base.spec, spec.method) * multiplier,
        schedule=asked.schedule,
        warmup_ratio=asked.warmup_ratio,
        max_grad_norm=asked.max_grad_norm or (0.3 if rank >= 64 else 1.0),
        optimizer=asked.optimizer,
        total_steps=min(steps, asked.max_steps) if asked.max_steps else steps,
        max_steps=asked.max_steps,
        seed=spec.seed,
        beta=(hyper.beta or 0.1) if spec.method is Method.DPO else None,
        max_seq_length=prepare_options(spec, base).max_seq_length,
        on_long=asked.on_long,
        train_on=asked.train_on,
        eval_every=asked.eval_every,
        early_stop_patience=asked.early_stop_patience,
        gate_min_improvement=publish.min_improvement,
        gate_hold=publish.hold,
    )


def lora_parameters(base: BaseModelSpec, rank: int, target_modules: tuple[str, ...]) -> int:
    """Trained numbers: rank x (in + out) of every target linear."""
    return sum(_factor_sizes(base, rank, target_modules))


def _factor_sizes(base: BaseModelSpec, rank: int, target_modules: tuple[str, ...]) -> list[int]:
    """Numbers in each factor: A is rank x in, B is out x rank."""
    shapes = (shape for path, shape in base.linears.items() if path.rsplit(".", 1)[1] in target_modules)
    return [rank * features for shape in shapes for features in shape]


def training_state_bytes(config: TrainingConfig, base: BaseModelSpec) -> int:
    """Weights, gradients and moments."""
    sizes = _factor_sizes(base, config.rank, config.target_modules)
    large = sum(size for size in sizes if config.optimizer == "adamw_8bit" and size >= MIN_8BIT_NUMBERS)
    return large * BYTES_PER_TRAINED_8BIT + (sum(sizes) - large) * BYTES_PER_TRAINED


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a job will take. Memory is what training adds to a serving process, without another copy of the base."""

    steps: int
    tokens: int  # of all epochs
    trainable_parameters: int
    peak_memory_bytes: int
    duration_s: float | None  # None until this server has measured its speed


def estimate(
    config: TrainingConfig,
    base: TrainableBase,
    *,
    num_examples: int,
    epoch_tokens: int,
    longest_tokens: int,
    tokens_per_s: float | None,
) -> CostEstimate:
    """Cost of a run of `total_steps`. `longest_tokens`: of one sequence; a micro-batch holds at least that many."""
    example_tokens = longest_tokens * (1 if config.beta is None else 2)  # a preference is two sequences
    at_once = max(example_tokens, min(base.micro_batch_tokens, config.batch_size * example_tokens))
    parameters = lora_parameters(base.spec, config.rank, config.target_modules)
    epochs_run = config.total_steps / config.steps_per_epoch(num_examples)
    tokens = round(epoch_tokens * epochs_run)
    widest = max((max(shape) for shape in base.spec.linears.values()), default=base.hidden_size)
    # Kept between layers: one hidden state per layer and token; within the layer at hand: about eight of its widest.
    per_token = base.compute_bytes * (base.num_layers * base.hidden_size + 8 * widest)
    logits = min(at_once, 256) * base.vocab_size * 4 * 2  # a chunk of fp32 logits and their gradient
    memory = training_state_bytes(config, base.spec) + at_once * per_token + logits
    duration = None if tokens_per_s is None else tokens / tokens_per_s
    return CostEstimate(config.total_steps, tokens, parameters, memory, duration)
