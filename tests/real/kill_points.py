"""Workers that kill or stop themselves at a named point of their work; forked from one process, driven by `test_kill`.

    python -m tests.real.kill_points BASE DIRECTORY
    {"start": {"directory": …, "database_url": …, "kill": "LABEL:N", "stop": "LABEL:N", "log": FILE}} -> pid
    {"wait": pid}                                                                                     -> exit code

Each worker is a process of its own; forking spares it the imports and the loading of the base. Points are the calls
that change something outside the process (each before and after) and the engine's quanta. A worker ends when no job is
left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
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


def run_worker(base: BaseModel, asked: dict[str, Any]) -> None:
    kill, stop, log = (asked.get(name) for name in ("kill", "stop", "log"))
    number = signal.SIGKILL if kill else signal.SIGSTOP
    at = kill or stop
    label, _, count = (at or ":0").rpartition(":")
    points = Points((label, int(count)) if at else None, number, Path(log) if log else None)
    work(make_rig(base, Path(asked["directory"]), asked["database_url"]), points)


def start_worker(base: BaseModel, asked: dict[str, Any]) -> int:
    """Fork; the child never returns. This process has no threads but its own one."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run_worker(base, asked)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    base = load(Path(sys.argv[1]), Path(sys.argv[2]))
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        message = json.loads(line)
        if "start" in message:
            answer = start_worker(base, message["start"])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(message["wait"], 0)[1])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
