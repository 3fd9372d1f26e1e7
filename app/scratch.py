"""A process's scratch directory: removed when the process ends, or by the next one if it could not do so itself.

Whoever lives holds a lock on its directory, which the system lets go of when a process dies, however it dies. So what a
killed process left behind (a job's dataset, half an upload) is told from what a neighbour is working on, also between
containers that share a volume.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = ".lock"


class Scratch:
    """`path` is this process's own, below `root`. Raises OSError when `root` cannot be written to."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with _held(root / LOCK):  # or a sweep might find a directory between its making and its locking
            _sweep(root)
            self.path = Path(tempfile.mkdtemp(prefix="process-", dir=root))
            self._lock = (self.path / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for as long as another process sweeps
        yield


def _sweep(root: Path) -> None:
    for directory in root.glob("process-*"):
        try:
            with (directory / LOCK).open("r+") as lock:
                if _is_free(lock):
                    shutil.rmtree(directory, ignore_errors=True)
                    logger.info("scratch swept", extra={"action": "scratch_swept", "directory": directory.name})
        except FileNotFoundError:
            shutil.rmtree(directory, ignore_errors=True)  # its owner died on the way in or out
        except OSError:
            logger.warning("scratch not swept", extra={"action": "scratch_not_swept", "directory": directory.name})


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
