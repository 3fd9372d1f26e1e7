"""The machine and the versions beside the figures: numbers without them mean nothing."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from app.machine import available_cores

PACKAGES = ("lodger", "torch", "transformers", "bitsandbytes", "peft")
BUSY_PER_CORE = 0.5  # load average over one minute


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Taken before anything of ours runs."""

    cpu: str
    cores: int
    memory_bytes: int
    device: str  # the accelerator's name, or "cpu"
    load_average: float  # over one minute, at the start
    python: str
    versions: dict[str, str]
    started_at: float  # Unix seconds

    @property
    def is_busy(self) -> bool:
        return self.load_average > BUSY_PER_CORE * self.cores

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"is_busy": self.is_busy}


def machine_facts(device: str) -> MachineFacts:
    return MachineFacts(
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        device=device,
        load_average=os.getloadavg()[0],
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name))},
        started_at=time.time(),
    )


def rss_bytes(pid: int | None = None) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def process_age_s(pid: int | None = None) -> float:
    """Seconds since a process was started."""
    return time.time() - float(psutil.Process(pid).create_time())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
