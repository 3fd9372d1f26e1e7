"""A whole job beside serving on a GPU: same answers, same base, an adapter that learned, and no memory kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.engine.base_model import BaseModel
from app.training.job import JobStatus
from app.training.spec import Hyperparameters
from tests.engine_rig import Answer, Collector, random_prompt, request
from tests.gpu.conftest import LoadBase
from tests.trainer_rig import Rig, chat_row, directory_rig

pytestmark = pytest.mark.gpu

ROWS = [chat_row(number) for number in range(60)]
HYPER = Hyperparameters(n_epochs=3, batch_size=4, learning_rate_multiplier=20.0)
# Of log-probabilities: in bf16 a step's sums depend on which other sequences are in it.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}


@pytest.fixture(params=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, load_base: LoadBase) -> BaseModel:
    return load_base("nf4", request.param)


@pytest.fixture
def rig(base: BaseModel, tmp_path: Path) -> Iterator[Rig]:
    made = directory_rig(base, tmp_path)
    made.start()
    yield made
    made.close()


def ask(rig: Rig, name: str, prompt: list[int]) -> Answer:
    sink = Collector()
    rig.engine.submit(request(name, prompt, None, max_tokens=16), sink)
    deadline = time.monotonic() + 60
    while name not in sink.answers or sink.answers[name].finished is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return sink.answers[name]


def test_answers_and_base_are_the_same_beside_a_job(rig: Rig, base: BaseModel) -> None:
    before = base.checksums()
    prompt = random_prompt(40, base.shapes.vocab_size, 1)
    quiet = ask(rig, "quiet", prompt)
    job, asked = rig.create(ROWS, hyperparameters=HYPER), 0
    while not rig.get(job).status.is_over:
        answer = ask(rig, f"beside-{asked}", prompt)
        asked += 1
        same = next((n for n, (a, b) in enumerate(zip(answer.tokens, quiet.tokens, strict=True)) if a != b), 16)
        assert same == 16 or base.dtype != torch.float32
        for got, want in zip(answer.logprobs[:same], quiet.logprobs[:same], strict=True):
            assert abs(got - want) < TOLERANCE[str(base.dtype).removeprefix("torch.")]
    (done,) = rig.wait(job)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert asked > 1, "some answers were made while the job ran"
    assert base.checksums() == before


def test_job_learns_and_its_adapter_lies_in_host_memory(rig: Rig) -> None:
    (done,) = rig.wait(rig.create(ROWS, hyperparameters=HYPER), timeout_s=120)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.gate is not None
    assert done.gate["passed"], done.gate
    assert done.gate["loss"] < 0.9 * done.gate["base_loss"]
    (manifest,) = rig.catalog.versions(done.tenant, done.adapter_name)
    assert rig.loader.host(manifest) is not None


def test_a_job_leaves_no_memory_behind(rig: Rig, base: BaseModel) -> None:
    rig.wait(rig.create(ROWS[:20], hyperparameters=HYPER), timeout_s=120)  # libraries take what they keep
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(base.device)
    rig.wait(rig.create(ROWS[20:40], hyperparameters=HYPER), timeout_s=120)
    torch.cuda.synchronize()
    weights = sum(base.memory_bytes().values())
    assert torch.cuda.memory_allocated(base.device) - held < 0.1 * weights + (1 << 20)
    assert rig.trainer.counters.num_out_of_memory == 0
