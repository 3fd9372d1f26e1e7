"""The adapter catalog for commands: the same one that a server uses, on the same store, without a server."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from adapters.manifest import BaseModelSpec
from app.scratch import Scratch
from app.settings import Settings
from app.settings_sources import ConfigurationError

if TYPE_CHECKING:
    from adapters.catalog import AdapterCatalog


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


def named_base(settings: Settings) -> BaseModelSpec:
    """The base by its name alone: enough to list, alias and erase, where nothing is checked against its shapes."""
    return BaseModelSpec(settings.base_id, digest="", aliases=(), linears={})


def open_catalog(settings: Settings, base: BaseModelSpec) -> AdapterCatalog:
    """Raises StoreError."""
    from adapters.catalog import AdapterCatalog
    from adapters.door import check_adapter
    from app.storage import door_limits, open_store

    scratch = Scratch(settings.data_dir / "scratch")
    atexit.register(scratch.close)
    return AdapterCatalog(open_store(settings), base, door_limits(settings), check=check_adapter, scratch=scratch.path)
