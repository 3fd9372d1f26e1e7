"""What this machine offers, for the settings' defaults; and the one thing asked of its allocator."""

from __future__ import annotations

import ctypes
import ipaddress
import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # control groups v2: "<microseconds|max> <period>"


# glibc's mallopt(3): freed memory is given back beyond the first; blocks from the second on are mapped on their own.
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 256 << 20
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 32 << 20  # the largest that glibc takes


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


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one; does nothing with another C library.

    By default it hands the activations of a long prefill back to the system and faults them in again, page by page:
    512 tokens of SmolLM2 took 1.43 s instead of 1.27 s.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
