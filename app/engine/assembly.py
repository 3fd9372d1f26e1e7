"""Puts an engine together from a loaded base and a loader: for the server, the worker, the benchmark and the tests."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from adapters.layers import PoolTensors
from adapters.rank_pool import RankPool
from app.engine.attention import KVPool
from app.engine.base_model import BaseModel
from app.engine.engine import Engine
from app.engine.kv_cache import KVCache
from app.engine.model_runner import ModelRunner
from app.engine.queues import EVEN_SHARE, ShareOf
from app.engine.residency import Loader, Residency
from app.engine.sampler import Sampler
from app.engine.scheduler import Scheduler, SchedulerLimits

CUDA_BLOCK = 256  # tokens; the paged kernel loads pages of this size
KV_SHARE_OF_FREE = {"cuda": 0.8, "cpu": 0.15}  # of the memory that is free once the base and the pool are loaded
MAX_CPU_KV_BYTES = 2 << 30
# Tokens of each prompt that a step computes beside a majority that decodes. On two AVX2 cores one costs SmolLM2 2.7 ms,
# and a decode step about 90 ms: 32 double it. On a GPU a step of 512 is hardly longer than one of 8.
MAX_PREFILL_TOKENS = {"cpu": 32, "cuda": None}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine. Tokens, rows, sequences and bytes as the names say."""

    pool_rows: int = 256
    max_pinned_leaves_rows: int = 64  # pins must leave room for an adapter of the largest rank
    max_sequences: int = 32
    max_batch_tokens: int = 512
    max_prefill_tokens: int | None = None  # None: what suits the device
    max_waiting: int = 256
    block_size: int = 16
    kv_cache_bytes: int | None = None  # None: a share of what is free
    prefix_caching: bool = True
    latency_factor: float = 1.25
    training_share: float = 0.4
    placements_per_step: int = 2


def assemble_engine(
    base: BaseModel, loader: Loader, config: EngineConfig, share_of: ShareOf = lambda tenant: EVEN_SHARE
) -> Engine:
    """Allocate the pools and wire the engine; it is not started. Raises ValueError when the KV cache is too small."""
    shapes = base.shapes
    tensors = PoolTensors(base.spec.linears, config.pool_rows, dtype=base.dtype, device=base.device)
    block_size = _block_size(base, config)
    per_block = KVPool.bytes_per_block(
        layers=shapes.num_layers,
        block_size=block_size,
        kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        dtype=base.dtype,
    )
    budget = config.kv_cache_bytes or default_kv_bytes(base.device)
    # More blocks than all sequences at full length can hold are of no use.
    most = config.max_sequences * -(-shapes.max_context // block_size)
    num_blocks = min(budget // per_block, most)
    if num_blocks < 2:
        raise ValueError(f"kv_cache_bytes ({budget}) holds less than two blocks of {per_block} bytes")
    kv_pool = KVPool(
        layers=shapes.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        dtype=base.dtype,
        device=base.device,
    )
    pool = RankPool(config.pool_rows, never_pinned_rows=min(config.max_pinned_leaves_rows, config.pool_rows))
    kv = KVCache(num_blocks, block_size, config.prefix_caching, base_digest=base.spec.digest)
    limits = SchedulerLimits(
        max_context=shapes.max_context,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        max_prefill_tokens=config.max_prefill_tokens or MAX_PREFILL_TOKENS[base.device.type],
        max_waiting=config.max_waiting,
    )
    return Engine(
        make_residency=lambda post: Residency(
            pool, tensors, loader, post, placements_per_step=config.placements_per_step
        ),
        make_scheduler=lambda residency: Scheduler(kv, residency, limits, share_of),
        runner=ModelRunner(base, kv_pool, tensors, Sampler(shapes.vocab_size, base.device)),
        latency_factor=config.latency_factor,
        training_share=config.training_share,
    )


def default_kv_bytes(device: torch.device) -> int:
    """A share of the memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * KV_SHARE_OF_FREE["cuda"])
    return min(int(psutil.virtual_memory().available * KV_SHARE_OF_FREE["cpu"]), MAX_CPU_KV_BYTES)


def _block_size(base: BaseModel, config: EngineConfig) -> int:
    """The paged CUDA kernel wants whole pages of 256 tokens; elsewhere the configured size is used."""
    half = base.dtype in (torch.bfloat16, torch.float16)
    return CUDA_BLOCK if base.device.type == "cuda" and half else config.block_size
