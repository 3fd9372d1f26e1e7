"""`kill -9` at seeded points: the same weights and one version. A stopped worker that wakes changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.engine.base_model import BaseModel
from app.training.job import InvalidJobState, Job, JobError, JobStatus
from app.training.reaper import Reaper
from tests.real.kill_points import LEASE_S, TENANT, create_job, load, make_rig
from tests.real.postgres import clean_database, postgres_url
from tests.tiny import build_base
from tests.trainer_rig import Rig

__all__ = ["postgres_url"]

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

NUM_POINTS = 20
NUM_POINTS_POSTGRES = 6
# Each of these is among the points, whatever the seed: inside a step, a state half-written and written, a checkpoint,
# and every stage of the publication.
ALWAYS = (
    "store.put.after",
    "queue.save_state.before",
    "queue.add_checkpoint.before",
    "queue.begin_publish.after",
    "store.put_if_absent.after",
    "queue.succeed.before",
    "queue.succeed.after",
)


class Workers:
    """The process that forks workers."""

    def __init__(self, base_dir: Path, directory: Path) -> None:
        command = [sys.executable, "-m", "tests.real.kill_points", str(base_dir), str(directory)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._running: set[int] = set()
        self.log = directory / "workers.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, **message: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log.read_text()[-4000:]
        if "start" in message:
            self._running.add(int(answer))
        else:
            self._running.discard(message["wait"])
        return int(answer)

    def close(self) -> None:
        for pid in self._running:  # a test that failed leaves a stopped one
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@dataclass
class Ground:
    """Where workers work, and a rig of the test's own to look with."""

    workers: Workers
    directory: Path
    database_url: str
    rig: Rig
    job: Job

    def start(self, **options: str) -> int:
        asked = {"directory": str(self.directory), "database_url": self.database_url, **options}
        return self.workers.ask(start=asked)

    def run(self, **options: str) -> int:
        """Start a worker and wait for its end; its exit code."""
        return self.workers.ask(wait=self.start(**options))

    @property
    def log(self) -> str:
        return self.workers.log.read_text()[-4000:]

    def outcome(self) -> tuple[str, str]:
        """(status, sha256 of the published weights); there must be exactly one version, and the alias on it."""
        job = self.rig.get(self.job)
        self.rig.catalog.forget(TENANT, "killed")
        (manifest,) = self.rig.catalog.versions(TENANT, "killed")
        assert manifest.job_id == job.id
        assert manifest.version == job.adapter_version
        assert self.rig.catalog.aliases(TENANT, "killed") == {"live": manifest.version}
        steps = [step for step, _ in self.rig.jobs.metrics(job.id)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(self.rig.files.list(TENANT, purpose="fine-tune-results").items) == 1
        return job.status.value, manifest.weights.sha256


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load(base_dir, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workers(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    made = Workers(base_dir, tmp_path_factory.mktemp("workers"))
    yield made
    made.close()


MakeGround = Callable[[str | None], Ground]


@pytest.fixture
def make_ground(base: BaseModel, workers: Workers, tmp_path: Path) -> Iterator[MakeGround]:
    made: list[Rig] = []

    def make(database_url: str | None = None) -> Ground:
        directory = tmp_path / f"ground-{len(made)}"
        directory.mkdir()
        url = database_url or f"sqlite:///{directory / 'lodger.db'}"
        rig = make_rig(base, directory, url)
        made.append(rig)
        return Ground(workers, directory, url, rig, create_job(rig))

    yield make
    for rig in made:
        rig.loader.close()


def whole_run(ground: Ground) -> tuple[str, list[str]]:
    """The weights of a run that nobody disturbs, and the points that it passes."""
    log = ground.directory / "points.log"
    assert ground.run(log=str(log)) == 0, ground.log
    status, weights = ground.outcome()
    assert status == "succeeded"
    return weights, log.read_text().split()


def chosen(points: list[str], count: int, seed: int) -> list[str]:
    """`count` points: one of each that always belongs, the rest anywhere between claim and end."""
    pick = random.Random(seed)
    first = points.index("queue.claim.after:1")
    later = points[first:]
    wanted = [pick.choice([p for p in later if p.rpartition(":")[0] == label]) for label in ALWAYS][:count]
    return wanted + pick.sample([p for p in later if p not in wanted], count - len(wanted))


def test_killed_anywhere_ends_with_the_same_weights_and_one_version(make_ground: MakeGround) -> None:
    weights, points = whole_run(make_ground(None))
    for point in chosen(points, NUM_POINTS, seed=1):
        ground = make_ground(None)
        assert ground.run(kill=point) in (-signal.SIGKILL, 0), ground.log  # 0: this run passed no such point
        assert ground.run() == 0, ground.log
        assert ground.outcome() == ("succeeded", weights), point


def test_stopped_worker_that_wakes_cannot_publish(make_ground: MakeGround) -> None:
    ground = make_ground(None)
    sleeper = ground.start(stop="queue.begin_publish.after:1")
    wait_until_stopped(sleeper)
    assert ground.run() == 0, ground.log
    before = ground.outcome()
    os.kill(sleeper, signal.SIGCONT)
    assert ground.workers.ask(wait=sleeper) == 0, ground.log
    assert ground.outcome() == before
    assert before[0] == "succeeded"


def test_worker_that_wakes_after_the_job_failed_leaves_no_version(make_ground: MakeGround) -> None:
    ground = make_ground(None)
    sleeper = ground.start(stop="queue.begin_publish.after:1")
    wait_until_stopped(sleeper)
    reaper = Reaper(ground.rig.queue, lease_s=LEASE_S)
    until = time.monotonic() + 30
    while not reaper.sweep():
        assert time.monotonic() < until
        time.sleep(0.1)
    with pytest.raises(InvalidJobState):  # for all that is known here, the version may be live
        ground.rig.jobs.cancel(TENANT, ground.job.id)
    other = ground.rig.queue.claim("other")
    assert other is not None
    ground.rig.queue.fail(other, JobError("server_error", "this worker has a bug"))
    os.kill(sleeper, signal.SIGCONT)
    assert ground.workers.ask(wait=sleeper) == 0, ground.log
    assert ground.rig.get(ground.job).status is JobStatus.FAILED
    assert ground.rig.catalog.versions(TENANT, "killed") == []


def wait_until_stopped(pid: int, timeout_s: float = 90) -> None:
    until = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_killed_on_postgresql_ends_the_same(make_ground: MakeGround, postgres_url: str) -> None:
    weights, points = whole_run(make_ground(clean_database(postgres_url)))
    for point in chosen(points, NUM_POINTS_POSTGRES, seed=2):
        ground = make_ground(clean_database(postgres_url))
        assert ground.run(kill=point) in (-signal.SIGKILL, 0), ground.log
        assert ground.run() == 0, ground.log
        assert ground.outcome() == ("succeeded", weights), point
