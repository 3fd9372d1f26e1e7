"""Names and facts of adapters: what an adapter is called, what it is made of, which base it fits. No torch, no I/O.

Object keys (`<prefix>` belongs to the store and never appears here):

    tenants/<tenant>/blobs/<sha256>                                   create-only
    tenants/<tenant>/adapters/<name>/versions/<n>.json                manifest, create-only; n is zero-padded to 8
    tenants/<tenant>/adapters/<name>/aliases/<alias>/<seq>.json       append-only; the newest entry is the pointer
    tenants/<tenant>/adapters/<name>/adapter_config.json, adapter_model.safetensors   a plain PEFT directory
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ALIAS_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,30}")
VERSION_PATTERN = re.compile(r"v[1-9][0-9]{0,7}")
RESERVED_NAMES = frozenset({"base", "default", "__base__"})
DEFAULT_ALIAS = "live"

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter's identity. Every cache (disk, host, pool, prefix KV) is keyed by `key`, never by a name."""

    tenant: str
    name: str
    digest: str  # 64 hex characters, see `adapter_digest`

    @property
    def key(self) -> tuple[str, str]:
        """(tenant, digest): equal bytes of two tenants stay two cache entries."""
        return (self.tenant, self.digest)


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """What an adapter must fit: the base's identity and the shapes of its target linears."""

    id: str  # the served name, e.g. "smollm2-135m-instruct"
    digest: str  # 64 hex: weights, quantization and config of the base as served
    aliases: tuple[str, ...]  # other spellings that `base_model_name_or_path` may carry
    linears: Mapping[str, tuple[int, int]]  # "model.layers.0.self_attn.q_proj" -> (in_features, out_features)

    @property
    def target_kinds(self) -> frozenset[str]:
        """Last parts of the linears' paths, e.g. {"q_proj", "down_proj"}."""
        return frozenset(path.rsplit(".", 1)[1] for path in self.linears)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a PEFT LoRA config that Lodger honours; made by `adapters.door` alone, from checked values."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class FileFact:
    """One stored file: its blob is `tenants/<tenant>/blobs/<sha256>`."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An immutable, numbered publication of an adapter. What a `Request` carries, and what the loader fetches by."""

    tenant: str
    name: str
    version: int
    digest: str
    config: FileFact
    weights: FileFact
    rank: int  # the largest rank of any module: rows it takes in the rank pool
    applied_modules: int
    base_id: str
    base_digest: str
    created_at: float  # Unix seconds
    source: str  # "upload", "import" or "training"
    renderer_digest: str | None = None  # of the chat renderer it was trained with; None for foreign adapters
    parent: str | None = None  # digest of the adapter it was continued from
    job_id: str | None = None
    import_etags: tuple[str, str] | None = None  # (config, weights) of an imported plain directory
    publish_id: str = ""  # of the one call that wrote it: how a writer whose answer was lost knows its own manifest
    extra: Mapping[str, Any] = field(default_factory=dict)  # training parameters and metrics

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.tenant, self.name, self.digest)

    @property
    def label(self) -> str:
        """The name an answer carries: `support@v3`."""
        return f"{self.name}@v{self.version}"

    @property
    def blobs(self) -> frozenset[str]:
        """The sha256 of its files."""
        return frozenset({self.config.sha256, self.weights.sha256})

    def to_json(self) -> bytes:
        return canonical_json({"schema": 1, **asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> AdapterManifest:
        """Raises ValueError, KeyError or TypeError on a body that is no manifest of schema 1."""
        body = json.loads(data)
        if body.pop("schema", None) != 1:
            raise ValueError("unknown manifest schema")
        return cls.from_dict(body)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AdapterManifest:
        """The manifest whose `dataclasses.asdict`, perhaps through JSON, `fields` are. Raises KeyError or TypeError."""
        body = dict(fields)
        body["config"], body["weights"] = FileFact(**body["config"]), FileFact(**body["weights"])
        if body.get("import_etags") is not None:
            body["import_etags"] = tuple(body["import_etags"])
        return cls(**body)


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no blanks, UTF-8: one value, one byte string."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def adapter_digest(config: bytes, weights_sha256: str) -> str:
    """sha256 over the length-framed config bytes and the weights' own sha256 (hex in, hex out)."""
    h = hashlib.sha256(b"lodger-adapter-v1\0")
    h.update(len(config).to_bytes(8, "big") + config + bytes.fromhex(weights_sha256))
    return h.hexdigest()


def is_adapter_name(name: str) -> bool:
    return NAME_PATTERN.fullmatch(name) is not None and name not in RESERVED_NAMES


def is_alias(name: str) -> bool:
    return (
        ALIAS_PATTERN.fullmatch(name) is not None
        and VERSION_PATTERN.fullmatch(name) is None
        and not name.startswith("ckpt-")
    )


def tenant_prefix(tenant: str) -> str:
    return f"tenants/{tenant}/"


def blob_key(tenant: str, sha256: str) -> str:
    return f"tenants/{tenant}/blobs/{sha256}"


def adapter_prefix(tenant: str, name: str) -> str:
    return f"tenants/{tenant}/adapters/{name}/"


def version_key(tenant: str, name: str, version: int) -> str:
    return f"{adapter_prefix(tenant, name)}versions/{version:08d}.json"


def alias_key(tenant: str, name: str, alias: str, seq: int) -> str:
    return f"{adapter_prefix(tenant, name)}aliases/{alias}/{seq:08d}.json"
