"""A worker process that kills or stops itself at a named point of its work; run by `test_kill`.

    python -m tests.real.kill_points BASE DIRECTORY DATABASE_URL run [--kill LABEL:N | --stop LABEL:N] [--log FILE]

Points are the calls that change something outside the process (each before and after) and the engine's quanta. The
job lies in the database; the worker ends when no job is left.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from adapters.store import DirectoryStore
from app.engine.base_model import BaseModel, load_base_model, use_threads
from app.training.job import Job
from app.training.spec import Hyperparameters, LoraOptions, PublishOptions
from tests.trainer_rig import Rig, chat_row

LEASE_S = 1.0
STATE_EVERY_S = 0.05  # so that most steps write a durable state
STORE_WRITES = ("put", "put_if_absent", "delete")
QUEUE_WRITES = (
    "claim",
    "record_metrics",
    "save_state",
    "add_checkpoint",
    "begin_publish",
    "succeed",
)
TENANT = "acme"


class Points:
    """Counts points by label; at the chosen one the process is killed or stopped, as by the operating system."""

    def __init__(self, at: tuple[str, int] | None, number: signal.Signals, log: Path | None) -> None:
        self._at, self._signal, self._log = at, number, log
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, label: str) -> None:
        with self._lock:
            self._seen[label] += 1
            here = (label, self._seen[label])
            if self._log is not None:
                with self._log.open("a") as log:
                    log.write(f"{label}:{here[1]}\n")
        if here == self._at:
            os.kill(os.getpid(), self._signal)

    def wrap(self, owner: Any, names: tuple[str, ...], prefix: str) -> None:
        """Put a point before and after each of the owner's methods."""
        for name in names:
            setattr(owner, name, self._around(getattr(owner, name), f"{prefix}.{name}"))

    def _around(self, method: Any, label: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.reach(f"{label}.before")
            result = method(*args, **kwargs)
            self.reach(f"{label}.after")
            return result

        return call


def load(base: Path, directory: Path) -> BaseModel:
    use_threads(1)
    return load_base_model(
        str(base), directory / "base-data", name="tiny", quantization="none", dtype="float32", device="cpu"
    )


def make_rig(base: BaseModel, directory: Path, database_url: str) -> Rig:
    store = DirectoryStore(directory / "store")
    return Rig(base, directory, store, database_url, lease_s=LEASE_S, state_every_s=STATE_EVERY_S)


def create_job(rig: Rig) -> Job:
    """About twenty steps with everything in them: held-out set, dropout, checkpoints, a name of its own."""
    return rig.create(
        [chat_row(n) for n in range(52)],
        tenant=TENANT,
        seed=5,
        hyperparameters=Hyperparameters(n_epochs=2, batch_size=6, learning_rate_multiplier=20.0),
        lora=LoraOptions(rank=4, dropout=0.1),
        publish=PublishOptions(name="killed"),
    )


def work(rig: Rig, points: Points) -> None:
    """Run until no job is left."""
    points.wrap(rig.store, STORE_WRITES, "store")
    points.wrap(rig.queue, QUEUE_WRITES, "queue")
    quantum = rig.trainer.quantum

    def counted() -> None:
        points.reach("quantum")
        quantum()

    rig.trainer.quantum = counted  # type: ignore[method-assign]
    rig.start()
    while any(not job.status.is_over for job in rig.jobs.list(TENANT).items):
        time.sleep(0.05)
    # Whoever was stopped and is woken now comes to its end here.
    until = time.monotonic() + 10
    while rig.trainer.num_active and time.monotonic() < until:
        time.sleep(0.02)
    rig.close()


def _point(text: str) -> tuple[str, int]:
    label, _, number = text.rpartition(":")
    return label, int(number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("database_url")
    parser.add_argument("--kill", type=_point)
    parser.add_argument("--stop", type=_point)
    parser.add_argument("--log", type=Path)
    asked = parser.parse_args()
    rig = make_rig(load(asked.base, asked.directory), asked.directory, asked.database_url)
    number = signal.SIGKILL if asked.kill else signal.SIGSTOP
    work(rig, Points(asked.kill or asked.stop, number, asked.log))


if __name__ == "__main__":
    main()
