"""Two tenants train on real text at once, in one server, through the official client; what came of it, side by side.

Held-out loss against the base's, answers to prompts nobody trained on, and the memory that it took. Everything is
written to `build/two_jobs.md` and `build/two_jobs.png`.
"""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import openai
import pandas
import pytest
from matplotlib import pyplot

from tests.conftest import StartServer
from tests.real.public_text import bierce_rows, king_james_rows, question
from tests.server_process import ROOT, ServerProcess

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

NUM_TRAINED, NUM_HELD_OUT = 160, 24
WORDS = ("money", "war", "friend")
MODEL = "smollm2-135m-instruct"
REPORT, PLOT = ROOT / "build" / "two_jobs.md", ROOT / "build" / "two_jobs.png"
JOB_LIMIT_S = 1200
# Measured: 576 MiB. By calculation two jobs' weights, gradients and moments are 150, copies in durable states 150;
# the rest are activations and what the allocator keeps (256 at most). One more copy of the base would be 540 on top.
MEMORY_BOUND = 800 << 20


@dataclass(frozen=True)
class Outcome:
    """One tenant's job."""

    losses: pandas.DataFrame  # the result file
    base_loss: float
    loss: float  # held-out, of the published version
    minutes: float
    answers: dict[str, tuple[str, str]]  # by word: the base's, the new model's


def test_two_jobs_learn_their_texts_beside_each_other(
    start_server: StartServer, model_cache: Path, tmp_path: Path
) -> None:
    rows = {
        "bierce": bierce_rows(NUM_TRAINED + NUM_HELD_OUT),
        "king-james": king_james_rows(NUM_TRAINED + NUM_HELD_OUT),
    }
    if missing := [tenant for tenant, found in rows.items() if not found]:
        pytest.skip(f"the Debian package of {missing[0]} is not installed")
    own = {"database_url": f"sqlite:///{tmp_path / 'lodger.db'}", "store": (tmp_path / "store").as_uri()}
    server = start_server(model_cache, training="auto", threads=2, **own)
    clients = {tenant: connect(server, server.new_tenant(tenant)) for tenant in rows}
    for client in clients.values():
        ask(client, MODEL, "peace")  # what serving needs is there before memory is measured
    before = peak = resident_bytes(server)
    with ThreadPoolExecutor(len(rows)) as pool:
        jobs = {tenant: pool.submit(train, clients[tenant], tenant, found or []) for tenant, found in rows.items()}
        while not all(job.done() for job in jobs.values()):
            peak = max(peak, resident_bytes(server))
            time.sleep(0.2)
    outcomes = {tenant: job.result() for tenant, job in jobs.items()}
    grown = peak - before
    write_report(outcomes, grown)
    for tenant, outcome in outcomes.items():
        assert outcome.loss < 0.9 * outcome.base_loss, tenant
        assert all(mine != base for base, mine in outcome.answers.values()), tenant
    assert grown < MEMORY_BOUND, f"{grown >> 20} MiB: another copy of the base?"


def connect(server: ServerProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300)


def train(client: openai.OpenAI, tenant: str, rows: list[Any]) -> Outcome:
    files = []
    for name, part in (("train", rows[:NUM_TRAINED]), ("held-out", rows[NUM_TRAINED:])):
        content = "\n".join(map(json.dumps, part)).encode()
        files.append(client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune"))
    began = time.monotonic()
    hyperparameters: Any = {"n_epochs": 1, "batch_size": 4}
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=files[0].id,
        validation_file=files[1].id,
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"lora": {"rank": 16}, "publish": {"name": "voice"}},
    )
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        assert time.monotonic() - began < JOB_LIMIT_S, job
        time.sleep(1)
    minutes = (time.monotonic() - began) / 60
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    published: Any = job.model_extra["publish"]  # type: ignore[index]
    gate = published["gate"]["result"]
    assert gate["passed"], gate
    losses = pandas.read_csv(io.BytesIO(client.files.content(job.result_files[0]).content))
    answers = {word: (ask(client, MODEL, word), ask(client, job.fine_tuned_model, word)) for word in WORDS}
    return Outcome(losses, gate["base_loss"], gate["loss"], minutes, answers)


def ask(client: openai.OpenAI, model: str, word: str) -> str:
    messages: Any = [question(word)]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40)
    return " ".join((answer.choices[0].message.content or "").split())


def resident_bytes(server: ServerProcess) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(kibibytes) << 10


def write_report(outcomes: dict[str, Outcome], grown: int) -> None:
    REPORT.parent.mkdir(exist_ok=True)
    lines = ["| tenant | held-out loss, base | held-out loss, trained | minutes |", "| --- | --- | --- | --- |"]
    for tenant, o in outcomes.items():
        lines.append(f"| {tenant} | {o.base_loss:.2f} | {o.loss:.2f} | {o.minutes:.1f} |")
    lines += ["", "| prompt | answered by | answer |", "| --- | --- | --- |"]
    for word in WORDS:
        base = next(iter(outcomes.values())).answers[word][0]
        for who, answer in (("the base", base), *((tenant, o.answers[word][1]) for tenant, o in outcomes.items())):
            lines.append(f"| {question(word)['content']} | {who} | {answer.replace('|', chr(92) + '|')} |")
    lines += ["", f"With both jobs the server grew by at most {grown >> 20} MiB."]
    REPORT.write_text("\n".join(lines) + "\n")
    figure, panels = pyplot.subplots(1, len(outcomes), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (tenant, o) in zip(panels, outcomes.items(), strict=True):
        axis.plot(o.losses["step"], o.losses["train_loss"], linewidth=1, label="training")
        held_out = o.losses.dropna(subset=["valid_loss"])
        axis.plot(held_out["step"], held_out["valid_loss"], "o-", markersize=3, linewidth=1, label="held out, a batch")
        axis.axhline(o.base_loss, linestyle="--", color="grey", linewidth=1, label="held out, the base")
        axis.set(title=tenant, xlabel="step")
    panels[0].set_ylabel("loss, nats per label token")
    panels[-1].legend()
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)
