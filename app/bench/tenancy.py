"""The benchmark's own world in a scratch directory: adapters, a store with them, tenants and keys.

Each adapter belongs to a tenant of its own name. Warm adapters have weights of their own; cold ones share one weights
file, which costs nothing in fairness, since every cache is keyed by tenant and content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.catalog import AdapterCatalog
from adapters.door import check_adapter
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, AdapterManifest, BaseModelSpec
from adapters.peft_format import write_peft_directory
from adapters.store import DirectoryStore
from app.bench.workload import ADAPTER_NAME, WorkloadSpec
from app.settings import Settings
from app.storage import door_limits

B_STD = 0.02  # answers then differ from the base's and from each other's, and stay finite


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Everything the systems are given. Labels are those of the jobs; picklable."""

    root: Path
    settings: Settings  # of the server and of the engine; the data directory is the scratch one
    manifests: Mapping[str, AdapterManifest]
    directories: Mapping[str, Path]  # PEFT directories, also of the cold ones
    keys: Mapping[str, str]  # API keys by label; "" is one for the base


def scratch_settings(settings: Settings, root: Path, *, base_dir: Path, max_sequences: int) -> Settings:
    """The user's settings with the store, database and caches of this run, and without prefix caching.

    The base's files stay where they are: the scratch data directory links to them.
    """
    data_dir = root / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    link = data_dir / "base"
    if not link.is_symlink():
        os.symlink(settings.data_dir / "base", link)
    changes = {
        "base_model": str(base_dir),
        "base_name": settings.base_id,
        "data_dir": data_dir,
        "store": (root / "store").as_uri(),
        "database_url": f"sqlite:///{data_dir / 'lodger.db'}",
        "prefix_caching": False,
        "max_sequences": max(settings.max_sequences, max_sequences),
        "max_batch_tokens": max(settings.max_batch_tokens, max_sequences),
        "max_waiting": max(settings.max_waiting, 2 * max_sequences),
    }
    return settings.model_copy(update=changes)


def furnish(
    root: Path, settings: Settings, spec: WorkloadSpec, base: BaseModelSpec, warm: Sequence[str], cold: Sequence[str]
) -> Tenancy:
    """Write the adapters and publish them. `settings` are the scratch ones."""
    scratch = root / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    store = DirectoryStore(root / "store")
    catalog = AdapterCatalog(store, base, door_limits(settings), check=check_adapter, scratch=scratch)
    directories: dict[str, Path] = {}
    for i, label in enumerate(warm):
        directories[label] = write_random_adapter(root / "adapters" / label, spec, base, seed=spec.seed * 100_003 + i)
    if cold:
        shared = write_random_adapter(root / "adapters" / "cold", spec, base, seed=spec.seed * 100_003 + 99_991)
        directories |= dict.fromkeys(cold, shared)
    manifests = {
        label: catalog.publish(
            label, ADAPTER_NAME, (path / CONFIG_FILE).read_bytes(), path / WEIGHTS_FILE, source="upload"
        )
        for label, path in directories.items()
    }
    return Tenancy(root, settings, manifests, directories, _make_keys(settings, directories))


def _make_keys(settings: Settings, labels: Mapping[str, Path]) -> dict[str, str]:
    from app.database import migrate, open_database
    from app.tenants import Tenants

    database = open_database(settings.database_url)
    migrate(database)
    tenants = Tenants(database)
    keys = {}
    for label in ("", *labels):
        tenant = label or "base-only"
        tenants.create(tenant)
        keys[label] = tenants.create_key(tenant).text
    database.dispose()
    return keys


def write_random_adapter(directory: Path, spec: WorkloadSpec, base: BaseModelSpec, *, seed: int) -> Path:
    """A PEFT directory with random weights in bf16, stored as an adapter trained in mixed precision would be."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for path, (features_in, features_out) in base.linears.items():
        if path.rsplit(".", 1)[1] in spec.targets:
            a = torch.randn(spec.rank, features_in, generator=generator) / features_in**0.5
            modules[path] = (a, B_STD * torch.randn(features_out, spec.rank, generator=generator))
    config = AdapterConfig(
        r=spec.rank,
        lora_alpha=2.0 * spec.rank,
        target_modules=tuple(sorted(spec.targets)),
        base_model_name_or_path=base.id,
    )
    write_peft_directory(directory, config, modules, torch.bfloat16)
    return directory
