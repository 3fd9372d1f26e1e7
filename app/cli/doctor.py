"""`lodger doctor`: looks at everything that serving needs and says, one line per fault, what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from app.cli.flags import with_settings
from app.machine import available_cores
from app.settings import PACKAGED_BASE, Settings
from app.settings_sources import ConfigurationError, LoadedSettings, mask_password

EXIT_CONFIGURATION = 78
MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    text: str
    is_fault: bool = False


def register(app: typer.Typer) -> None:
    app.command()(doctor)


@with_settings()
def doctor(loaded: LoadedSettings) -> None:
    """Check settings, packages, disk, store, database, device and base model; exit code 78 on any fault."""
    num_faults = 0
    for name, check in CHECKS.items():
        for finding in check(loaded.settings):
            num_faults += finding.is_fault
            print(f"{'FAULT' if finding.is_fault else 'ok':5}  {name:9}  {finding.text}", flush=True)
    if num_faults:
        print(f"lodger: {num_faults} fault{'s' if num_faults > 1 else ''}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)


def _check_settings(settings: Settings) -> Iterator[Finding]:
    for fault in settings.listening_faults():
        yield Finding(fault, is_fault=True)
    if settings.threads > available_cores():
        text = f"LODGER_THREADS is {settings.threads}, but {available_cores()} cores are at hand: more is much slower"
        yield Finding(text, is_fault=True)
    if settings.s3_endpoint_url and settings.store.startswith("file:"):
        text = f"LODGER_S3_ENDPOINT_URL has no effect on {settings.store}: set LODGER_STORE=s3://bucket/prefix"
        yield Finding(text, is_fault=True)
    yield Finding("each one is known and valid")


def _check_packages(settings: Settings) -> Iterator[Finding]:
    ours = Path(__file__).resolve().parents[2] / "adapters"
    found = importlib.util.find_spec("adapters")
    if found is None or found.origin is None or Path(found.origin).resolve().parent != ours:
        text = (
            "`import adapters` finds another package: uninstall the distribution called adapters, then `make install`"
        )
        yield Finding(text, is_fault=True)
    if importlib.util.find_spec("kernels"):
        text = "the package kernels makes bitsandbytes ask a model hub when it is imported: pip uninstall kernels"
        yield Finding(text, is_fault=True)
    if settings.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding("bitsandbytes is missing: `make install`, or LODGER_QUANTIZATION=none", is_fault=True)
    yield Finding(f"Python {sys.version.partition(' ')[0]}")


def _check_disk(settings: Settings) -> Iterator[Finding]:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(settings.data_dir, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        yield Finding(f"{settings.data_dir} cannot be written: choose another LODGER_DATA_DIR", is_fault=True)
        return
    free = shutil.disk_usage(settings.data_dir).free
    text = f"{settings.data_dir} has {_size(free)} free"
    if free < MIN_FREE_BYTES:
        yield Finding(f"{text}: make room, or choose another LODGER_DATA_DIR", is_fault=True)
    elif free < settings.disk_cache_bytes:
        yield Finding(f"{text}; LODGER_DISK_CACHE_BYTES allows {_size(settings.disk_cache_bytes)}, so lower that")
    else:
        yield Finding(text)


def _check_store(settings: Settings) -> Iterator[Finding]:
    from adapters.errors import StoreError
    from app.storage import open_store

    try:
        problems = open_store(settings).probe()
    except StoreError as exc:
        problems = [f"{settings.store}: {exc} Check LODGER_STORE."]
    yield from (Finding(problem, is_fault=True) for problem in problems)
    if not problems:
        yield Finding(f"{settings.store}, create-only writes hold")


def _check_database(settings: Settings) -> Iterator[Finding]:
    from app.cli.stores import open_tenants

    try:
        tenants = open_tenants(settings)
        num_tenants, num_keys = len(tenants.list()), len(tenants.list_keys())
    except ConfigurationError as exc:
        yield from (Finding(f"{fault}: check LODGER_DATABASE_URL", is_fault=True) for fault in exc.faults)
        return
    yield Finding(f"{mask_password(settings.database_url)}, tenants: {num_tenants}, keys: {num_keys}")
    if num_tenants == 0:
        yield Finding("nobody can ask yet: lodger tenants create NAME; lodger keys create NAME")


def _check_device(settings: Settings) -> Iterator[Finding]:
    import torch

    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        text = f"LODGER_DEVICE is cuda, and torch {torch.__version__} finds none: set auto, or mend driver and torch"
        yield Finding(text, is_fault=True)
    elif settings.device != "cpu" and not has_cuda and shutil.which("nvidia-smi"):
        text = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it: make clean install"
        yield Finding(text, is_fault=True)
    elif has_cuda and settings.device != "cpu":
        yield Finding(f"cuda, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    else:
        yield Finding(f"cpu, {settings.threads} threads, torch {torch.__version__}")


def _check_base(settings: Settings) -> Iterator[Finding]:
    from app.engine.base_files import BaseModelMissing
    from app.engine.base_model import BaseModelUnsupported
    from app.engine.base_spec import read_base_spec

    if settings.base_model != PACKAGED_BASE and not Path(settings.base_model).is_dir():
        yield Finding(f"{settings.base_model} is asked of the model hub at the first start, and then kept")
        return
    try:
        spec = read_base_spec(
            settings.base_model, settings.data_dir, name=settings.base_name, quantization=settings.quantization
        )
    except (BaseModelMissing, BaseModelUnsupported, OSError, ValueError) as exc:
        yield Finding(f"{settings.base_model}: {exc}: check LODGER_BASE_MODEL", is_fault=True)
        return
    yield Finding(f"{spec.id}, {len(spec.linears)} target linears, {settings.quantization}, digest {spec.digest[:12]}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"


CHECKS: dict[str, Callable[[Settings], Iterator[Finding]]] = {
    "settings": _check_settings,
    "packages": _check_packages,
    "disk": _check_disk,
    "store": _check_store,
    "database": _check_database,
    "device": _check_device,
    "base": _check_base,
}
