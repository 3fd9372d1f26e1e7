"""What the door lets in, as plain facts, and the limits it checks against. No I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.manifest import AdapterConfig, BaseModelSpec, FileFact

BYTES_PER_FP32 = 4


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Caps on what a tenant may send. All are checked before anything of the declared size is allocated."""

    max_rank: int = 64  # of any module
    max_scale: float = 128.0  # alpha / r, or alpha / sqrt(r) for rsLoRA
    max_file_bytes: int = 512 << 20  # of the weights; `weights_cap` is the number that counts
    max_header_bytes: int = 1 << 20  # of the safetensors header
    max_metadata_bytes: int = 16 << 10  # keys and values of the header's __metadata__
    max_config_bytes: int = 64 << 10
    max_config_depth: int = 8  # nested objects and lists, the outer one counted

    def weights_cap(self, base: BaseModelSpec) -> int:
        """Bytes that a weights file may have: what the base's shapes allow, and never above `max_file_bytes`."""
        return min(self.max_file_bytes, max_weights_bytes(base, self.max_rank, self.max_header_bytes))


@dataclass(frozen=True, slots=True)
class TensorFact:
    """One tensor of a safetensors file whose header has been checked against the file's size."""

    name: str
    dtype: str  # "F32", "F16" or "BF16"
    shape: tuple[int, ...]
    start: int  # absolute byte offsets in the file
    end: int


@dataclass(frozen=True, slots=True)
class ModuleFact:
    """One adapted linear: delta W = scaling * B @ A."""

    path: str  # a key of BaseModelSpec.linears
    rank: int
    scaling: float
    a: TensorFact  # [rank, in_features]
    b: TensorFact  # [out_features, rank]


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter that passed the door: what it is, where its tensors lie, and what to tell its owner."""

    config: AdapterConfig
    config_bytes: bytes  # as stored
    modules: tuple[ModuleFact, ...]  # at least one, in the order of the base's linears
    rank: int  # the largest of any module
    weights: FileFact
    config_file: FileFact
    digest: str  # see `adapters.door.behaviour_digest`
    warnings: tuple[str, ...]  # "<code>" or "<code>: <detail>"


def max_weights_bytes(base: BaseModelSpec, max_rank: int, header_bytes: int = 1 << 20) -> int:
    """Size of the largest adapter that fits `base`: every linear at `max_rank` in fp32, and a full header."""
    features = sum(in_features + out_features for in_features, out_features in base.linears.values())
    return 8 + header_bytes + BYTES_PER_FP32 * max_rank * features
