"""What this machine offers, for the settings' defaults. Reads the system, changes nothing."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # control groups v2: "<microseconds|max> <period>"


def default_data_dir() -> Path:
    """`lodger` below XDG_DATA_HOME, or below ~/.local/share."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / "lodger"


def available_cores() -> int:
    """Cores this process may use: its affinity, and no more than its control group's quota pays for."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text("ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def default_host_cache_bytes() -> int:
    """4 GiB, but no more than a quarter of the machine's memory."""
    return min(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
