"""The adapter catalog for commands: the same one that a server uses, on the same store, without a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.manifest import BaseModelSpec
from app.settings import Settings
from app.settings_sources import ConfigurationError

if TYPE_CHECKING:
    from adapters.catalog import AdapterCatalog

    from adapters.door import DoorLimits


def door_limits(settings: Settings) -> DoorLimits:
    from adapters.door import DoorLimits

    return DoorLimits(
        max_rank=settings.max_rank, max_scale=settings.max_scale, max_file_bytes=settings.max_adapter_bytes
    )


def base_spec(settings: Settings) -> BaseModelSpec:
    """What adapters must fit. Slow the first time. Raises ConfigurationError when there is no such base."""
    from app.engine.base_files import BaseModelMissing
    from app.engine.base_spec import read_base_spec

    try:
        return read_base_spec(
            settings.base_model,
            settings.data_dir,
            name=settings.base_name,
            revision=settings.base_revision,
            quantization=settings.quantization,
        )
    except BaseModelMissing as exc:
        raise ConfigurationError([f"LODGER_BASE_MODEL is {settings.base_model}: {exc}"]) from exc


def open_catalog(settings: Settings) -> AdapterCatalog:
    """Raises ConfigurationError, StoreError."""
    from adapters.catalog import AdapterCatalog

    from app.storage import open_store

    scratch = settings.data_dir / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return AdapterCatalog(open_store(settings), base_spec(settings), door_limits(settings), scratch=scratch)
