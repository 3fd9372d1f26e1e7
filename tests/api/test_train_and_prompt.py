"""The whole loop through the official client, against a real server process: file, job, events, result, prompt."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pandas
import pytest

from tests.api.test_openai_client import ADMIN_KEY, wait_ready
from tests.tiny import BASE_NAME, build_base
from tests.trainer_rig import chat_row

PROMPT: Any = [{"role": "user", "content": "red north?"}]


@dataclass
class TrainingServer:
    url: str
    key: str
    process: subprocess.Popen[bytes]

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    directory = tmp_path_factory.mktemp("training-server")
    base = build_base(directory / "base")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {
        "BASE_MODEL": base,
        "BASE_NAME": BASE_NAME,
        "DATA_DIR": directory / "data",
        "QUANTIZATION": "none",
        "DTYPE": "float32",
        "DEVICE": "cpu",
        "THREADS": 1,
        "PORT": port,
        "KV_CACHE_BYTES": 32 << 20,
        "ADMIN_KEY": ADMIN_KEY,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LODGER_")}
    environment = kept | {f"LODGER_{name}": str(value) for name, value in settings.items()}
    log = directory / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "app", "serve"], env=environment, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process, log)
        admin = httpx.Client(base_url=url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
        assert admin.post("/admin/tenants", json={"id": "acme"}).status_code == 201
        created = admin.post("/admin/keys", json={"tenant": "acme"})
        yield TrainingServer(url, created.json()["key"], process)
    finally:
        process.terminate()
        process.wait(60)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def greedy(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=PROMPT, temperature=0, max_tokens=12)
    return answer.choices[0].message.content or ""


def wait_over(client: openai.OpenAI, job_id: str, timeout_s: float = 120) -> Any:
    until = time.monotonic() + timeout_s
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < until, job
        time.sleep(0.05)
    return job


@pytest.fixture(scope="module")
def trained(server: TrainingServer) -> Any:
    """A job that has succeeded, and its answer within a second."""
    client = server.openai()
    base_answer = greedy(client, BASE_NAME)
    file = client.files.create(file=("train.jsonl", jsonl([chat_row(n) for n in range(60)])), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 30}
    job = client.fine_tuning.jobs.create(
        model=BASE_NAME,
        training_file=file.id,
        seed=11,
        suffix="loop",
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"lora": {"rank": 8}, "publish": {"name": "acme/colours"}},
    )
    done = wait_over(client, job.id)
    started = time.monotonic()
    answer = greedy(client, "colours")
    assert time.monotonic() - started < 1.0
    assert done.status == "succeeded", done.error
    assert answer != base_answer
    return done


def test_job_ends_with_a_model_that_answers_by_every_name(server: TrainingServer, trained: Any) -> None:
    client = server.openai()
    answer = greedy(client, trained.fine_tuned_model)
    assert answer == greedy(client, "colours") == greedy(client, "acme/colours@live") == greedy(client, "colours@v1")
    assert trained.fine_tuned_model in [model.id for model in client.models.list()]
    assert trained.trained_tokens > 0
    assert trained.hyperparameters.n_epochs == 3


def test_events_tell_the_story_and_page_without_loss(server: TrainingServer, trained: Any) -> None:
    events = list(server.openai().fine_tuning.jobs.list_events(trained.id, limit=3))[::-1]
    assert len({event.id for event in events}) == len(events)
    messages = [event.message for event in events]
    assert messages[0].startswith("Created fine-tuning job")
    assert messages[-1] == "The job has successfully completed"
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == list(range(1, len(steps) + 1))
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics[-1]["full_valid_loss"] < 0.7 * metrics[0]["valid_loss"]  # type: ignore[index]


def test_checkpoints_can_be_prompted_by_their_names(server: TrainingServer, trained: Any) -> None:
    client = server.openai()
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id))
    assert [point.step_number for point in checkpoints] == sorted(
        (point.step_number for point in checkpoints), reverse=True
    )
    assert len(checkpoints) == 3
    for point in checkpoints:
        assert greedy(client, point.fine_tuned_model_checkpoint)
        assert point.metrics.full_valid_loss is not None


def test_result_file_is_plain_csv_with_a_line_per_step(server: TrainingServer, trained: Any) -> None:
    content = server.openai().files.content(trained.result_files[0]).read()
    assert content.splitlines()[0] == b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    table = pandas.read_csv(io.BytesIO(content))
    assert list(table.step) == list(range(1, len(table) + 1))
    assert table.train_loss.notna().all()
    assert table.valid_loss.iloc[-1] < table.train_loss.iloc[0]


def test_next_job_of_the_name_becomes_its_next_version(server: TrainingServer, trained: Any) -> None:
    client = server.openai()
    file = client.files.create(file=("more.jsonl", jsonl([chat_row(n) for n in range(20)])), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 5}
    job = client.fine_tuning.jobs.create(
        model="colours@v1",  # goes on from there
        training_file=file.id,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"publish": {"name": "colours", "alias": "candidate"}},
    )
    done = wait_over(client, job.id)
    assert done.status == "succeeded", done.error
    assert greedy(client, "colours@v2") == greedy(client, done.fine_tuned_model)
    assert greedy(client, "colours") == greedy(client, "colours@v1")
