"""Put a checked adapter into host memory, ready for the rank pool: one block, scaling folded in, B transposed.

Reads by the offsets that the door checked; neither safetensors nor pickle takes part. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from adapters.checked import CheckedAdapter, TensorFact
from adapters.errors import AdapterDigestMismatch

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class HostModule:
    """One adapted linear in host memory: delta y = (x @ a.T) @ b. Views of the adapter's one block."""

    a: Tensor  # [r, I], the compute dtype
    b: Tensor  # [r, O], scaling * lora_B, transposed


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory, immutable. `modules` is keyed by the paths of `BaseModelSpec.linears`."""

    key: tuple[str, str]  # (tenant, digest)
    digest: str
    rank: int  # the largest of any module
    modules: Mapping[str, HostModule]
    num_bytes: int  # of the block


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's factors as PEFT and training hold them: delta W = scaling * b @ a."""

    a: Tensor  # [r, I]
    b: Tensor  # [O, r]
    scaling: float


@torch.no_grad()
def load_host_adapter(
    key: tuple[str, str],
    checked: CheckedAdapter,
    weights: Path,
    *,
    dtype: torch.dtype,
    pin_memory: bool = False,
) -> HostAdapter:
    """Read `weights`, the file that `checked` describes, in the compute `dtype`. Blocks on the disk.

    Raises AdapterDigestMismatch when the file is shorter than it was at the door.
    """
    sizes = [module.rank * (module.a.shape[1] + module.b.shape[0]) for module in checked.modules]
    block = _allocate(sum(sizes), dtype, pin_memory=pin_memory)
    modules = {}
    with weights.open("rb") as file:
        for module, part in zip(checked.modules, block.split_with_sizes(sizes), strict=True):
            # One module at a time: never a second copy of the whole adapter.
            pair = LoraPair(_read(file, module.a), _read(file, module.b), module.scaling)
            modules[module.path] = _fill(part, pair)
    return HostAdapter(key, checked.digest, checked.rank, modules, block.nbytes)


@torch.no_grad()
def pack_host_adapter(
    key: tuple[str, str], pairs: Mapping[str, LoraPair], *, dtype: torch.dtype, pin_memory: bool = False
) -> HostAdapter:
    """Copy factors that are in memory already (those of a finished training) into a `HostAdapter`."""
    sizes = [pair.a.numel() + pair.b.numel() for pair in pairs.values()]
    block = _allocate(sum(sizes), dtype, pin_memory=pin_memory)
    modules = {
        path: _fill(part, pair) for (path, pair), part in zip(pairs.items(), block.split_with_sizes(sizes), strict=True)
    }
    rank = max(pair.a.shape[0] for pair in pairs.values())
    return HostAdapter(key, key[1], rank, modules, block.nbytes)


def read_pairs(checked: CheckedAdapter, weights: Path) -> dict[str, LoraPair]:
    """Read the factors of the file that `checked` describes, unscaled and in fp32, by module path: to go on training.

    Raises AdapterDigestMismatch when the file is shorter than it was at the door.
    """
    with weights.open("rb") as file:
        return {
            module.path: LoraPair(_read(file, module.a).float(), _read(file, module.b).float(), module.scaling)
            for module in checked.modules
        }


def _allocate(num_elements: int, dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    return torch.empty(num_elements, dtype=dtype, device="cpu", pin_memory=pin_memory)


def _fill(part: Tensor, pair: LoraPair) -> HostModule:
    """Write a pair into its part of the block: every element of the part is written."""
    rank, in_features = pair.a.shape
    a = part[: rank * in_features].view(rank, in_features)
    b = part[rank * in_features :].view(rank, pair.b.shape[0])
    a.copy_(pair.a)
    # x @ (s * B @ A).T = (x @ A.T) @ (s * B).T. The product is made in fp32 and rounded once.
    b.copy_((pair.b.float() * pair.scaling).T)
    return HostModule(a, b)


def _read(file: BufferedReader, fact: TensorFact) -> Tensor:
    data = bytearray(fact.end - fact.start)
    file.seek(fact.start)
    if file.readinto(data) != len(data):
        raise AdapterDigestMismatch()
    return torch.frombuffer(data, dtype=_TORCH_DTYPES[fact.dtype]).view(fact.shape)
