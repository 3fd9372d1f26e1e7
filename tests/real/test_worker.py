"""`lodger worker` beside a server that does not train: one takes the job, the other serves what comes of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.test_openai_client import ADMIN_KEY, wait_ready
from tests.api.test_train_and_prompt import greedy, jsonl, wait_over
from tests.tiny import BASE_NAME, build_base
from tests.trainer_rig import chat_row

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@dataclass
class Cluster:
    """A server and its workers on one database and store."""

    directory: Path
    environment: dict[str, str]
    url: str = ""
    key: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: str, **settings: object) -> subprocess.Popen[bytes]:
        environment = self.environment | {f"LODGER_{name}": str(value) for name, value in settings.items()}
        with (self.directory / f"{command}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "app", command], env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    base = build_base(tmp_path / "base")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {
        "BASE_MODEL": base,
        "BASE_NAME": BASE_NAME,
        "STORE": (tmp_path / "store").as_uri(),
        "DATABASE_URL": f"sqlite:///{tmp_path / 'lodger.db'}",
        "QUANTIZATION": "none",
        "DTYPE": "float32",
        "DEVICE": "cpu",
        "THREADS": 1,
        "KV_CACHE_BYTES": 32 << 20,
        "ADMIN_KEY": ADMIN_KEY,
        "JOB_LEASE_S": 3,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LODGER_")}
    made = Cluster(tmp_path, kept | {f"LODGER_{name}": str(value) for name, value in settings.items()})
    made.url = f"http://127.0.0.1:{port}"
    try:
        server = made.start("serve", TRAINING="off", PORT=port, DATA_DIR=tmp_path / "serving")
        wait_ready(made.url, server, tmp_path / "serve-0.log")
        admin = httpx.Client(base_url=made.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
        assert admin.post("/admin/tenants", json={"id": "acme"}).status_code == 201
        made.key = admin.post("/admin/keys", json={"tenant": "acme"}).json()["key"]
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


def test_job_moves_from_worker_to_worker_and_the_server_answers(cluster: Cluster) -> None:
    client = cluster.client()
    file = client.files.create(file=("train.jsonl", jsonl([chat_row(n) for n in range(60)])), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 12, "batch_size": 6, "learning_rate_multiplier": 20}
    job = client.fine_tuning.jobs.create(
        model=BASE_NAME,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"publish": {"name": "colours"}, "training": {"early_stop": {"patience": 0}}},
    )
    time.sleep(2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"  # nobody there who trains
    first = cluster.start("worker", DATA_DIR=cluster.directory / "worker-1")
    until = time.monotonic() + 120
    while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id, limit=5).data):
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    given_back = client.fine_tuning.jobs.retrieve(job.id)
    assert given_back.status in ("queued", "succeeded")
    second = cluster.start("worker", DATA_DIR=cluster.directory / "worker-2")
    done = wait_over(client, job.id)
    assert done.status == "succeeded", done.error
    assert greedy(client, "colours") == greedy(client, done.fine_tuned_model)
    steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "metrics"]  # type: ignore[index]
    assert steps == sorted(set(steps), reverse=True)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 0
