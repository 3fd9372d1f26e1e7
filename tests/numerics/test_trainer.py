"""Whole jobs on a tiny base: against a plain PEFT loop, through pauses, neighbours, and everything that goes wrong."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import app.training.trainer as trainer_module
from adapters.errors import AdapterRankTooLarge, StoreUnavailable
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest, blob_key
from adapters.weights import LoraPair
from app.engine.base_model import BaseModel, load_base_model
from app.training import job_thread
from app.training.adapter import new_adapter
from app.training.batching import BatchOrder, ExampleSizes, micro_batches
from app.training.checkpoint import sweep_states
from app.training.config import TrainingConfig
from app.training.dataset_rows import Method
from app.training.evaluate import GreedySampler
from app.training.job import Job, JobStatus, StepMetrics
from app.training.micro_step import Part, PartResult, micro_step
from app.training.optimizer import AdapterOptimizer, RateSchedule
from app.training.prepare import TrainingSet
from app.training.spec import Hyperparameters, LoraOptions, PublishOptions, TrainingOptions
from app.training.work_queue import ClaimedJob
from tests.engine_rig import random_prompt
from tests.tiny import build_base
from tests.trainer_rig import Rig, chat_row, directory_rig, preference_row

FEW = [chat_row(n) for n in range(14)]
FAST = Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=20.0)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    data = tmp_path_factory.mktemp("data")
    return load_base_model(str(base_dir), data, name="tiny", quantization="none", dtype="float32", device="cpu")


@pytest.fixture
def rig(base: BaseModel, tmp_path: Path) -> Iterator[Rig]:
    made = directory_rig(base, tmp_path)
    made.start()
    yield made
    made.close()


def published(rig: Rig, job: Job) -> dict[str, LoraPair]:
    """The factors of the job's one version, from the store."""
    (manifest,) = [m for m in rig.catalog.versions(job.tenant, job.adapter_name) if m.job_id == job.id]
    return rig.room.output.fetch(manifest, rig.room.scratch)


def assert_same(one: dict[str, LoraPair], other: dict[str, LoraPair], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for path, pair in one.items():
        for got, want in ((pair.a, other[path].a), (pair.b, other[path].b)):
            if tolerance:
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(got, want), path


# ---- what comes out


def plain_loop(
    base_dir: Path, base: BaseModel, config: TrainingConfig, data: TrainingSet
) -> tuple[dict[str, LoraPair], list[float]]:
    """The same job with PEFT and torch: whole batches, autograd through everything. Weights, and each step's loss."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), lora)
    modules: dict[str, Any] = {path: model.base_model.model.get_submodule(path) for path in base.lora.paths}
    start = new_adapter(base, config)
    for index, path in enumerate(base.lora.paths):
        modules[path].lora_A["default"].weight.data.copy_(start.pairs[index].a)
        modules[path].lora_B["default"].weight.data.copy_(start.pairs[index].b)
    parameters = [
        m
        for path in base.lora.paths
        for m in (modules[path].lora_A["default"].weight, modules[path].lora_B["default"].weight)
    ]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    order = BatchOrder(data.train.num_tokens, batch_size=config.batch_size, seed=config.seed)
    schedule = RateSchedule(config.schedule, config.learning_rate, config.warmup_steps, config.total_steps)
    reported = []
    for step in range(config.total_steps):
        batch = [data.train[int(position)][0] for position in order.batch(step)]
        losses = []
        for sequence in batch:
            ids = torch.tensor(sequence.ids.astype("int64"))[None]
            at = torch.tensor(np.array(sequence.labels).nonzero()[0])
            losses.append(F.cross_entropy(model(input_ids=ids).logits[0, at - 1], ids[0, at], reduction="sum"))
        loss = torch.stack(losses).sum() / sum(sequence.num_labels for sequence in batch)
        reported.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
    trained = {
        path: LoraPair(m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach(), config.scaling)
        for path, m in modules.items()
    }
    return trained, reported


def test_whole_job_equals_a_plain_peft_loop_and_leaves_the_base_alone(rig: Rig, base_dir: Path) -> None:
    before = rig.base.checksums()
    job = rig.create(FEW, hyperparameters=FAST)
    (done,) = rig.wait(job)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.config is not None
    assert done.config.total_steps == 8
    data = rig.fine_tuning.prepare(done.tenant, done.spec)
    want, losses = plain_loop(base_dir, rig.base, done.config, data)
    assert_same(published(rig, done), want, 1e-4)
    # Adam forgives a wrong scale of the gradients; the losses do not: they are means over the step's label tokens.
    got = [values["train_loss"] for _, values in rig.jobs.metrics(done.id)]
    assert got == pytest.approx(losses, rel=1e-4)
    assert rig.base.checksums() == before
    assert done.trained_tokens == 2 * data.report.training.label_tokens
    assert done.total_tokens == 2 * data.report.training.tokens
    assert rig.store.list(f"tenants/{done.tenant}/training/") == []


def test_preference_job_learns_the_preference(rig: Rig) -> None:
    rows = [preference_row(n) for n in range(60)]
    hyperparameters = Hyperparameters(n_epochs=2, batch_size=6, learning_rate_multiplier=10.0, beta=0.5)
    (done,) = rig.wait(rig.create(rows, method=Method.DPO, hyperparameters=hyperparameters))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.gate is not None
    assert done.gate["base_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert done.gate["loss"] < 0.5
    metrics = dict(rig.jobs.metrics(done.id))
    assert metrics[max(metrics)]["full_valid_mean_token_accuracy"] > 0.8


def test_served_adapter_is_the_stored_one_before_and_after_the_caches_are_wiped(rig: Rig) -> None:
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    manifest = rig.catalog.resolve(done.tenant, done.adapter_name)
    prompts = [random_prompt(12, 290, seed) for seed in range(3)]
    sampler = GreedySampler(rig.engine, eos_ids=frozenset(), max_context=512)

    def answers(adapter: AdapterManifest | None) -> list[tuple[int, ...]]:
        got = sampler.start(done.tenant, adapter, prompts, max_tokens=12).result(30)
        assert not any(answer.failed for answer in got)
        return [answer.tokens for answer in got]

    warm = answers(manifest)
    assert rig.loader.snapshot().loads["s3"] == 0
    rig.engine.unload(manifest.ref.key).result(10)
    rig.loader.forget_tenant(done.tenant)
    assert answers(manifest) == warm
    assert rig.loader.snapshot().loads["s3"] == 1
    assert answers(None) != warm


# ---- interruptions


def uninterrupted(base: BaseModel, directory: Path, rows: Sequence[Any], **asked: Any) -> dict[str, LoraPair]:
    rig = directory_rig(base, directory)
    rig.start()
    try:
        (done,) = rig.wait(rig.create(rows, **asked))
        return published(rig, done)
    finally:
        rig.close()


LONGER = Hyperparameters(n_epochs=6, batch_size=4, learning_rate_multiplier=20.0)
DROPOUT = LoraOptions(rank=4, dropout=0.2)


def test_job_goes_on_bit_equal_in_another_process_and_after_a_pause(base: BaseModel, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"hyperparameters": LONGER, "lora": DROPOUT}
    want = uninterrupted(base, tmp_path / "whole", FEW, **asked)
    first = directory_rig(base, tmp_path / "cut")
    first.start()
    job = first.create(FEW, **asked)
    first.wait(job, until=lambda job: job.step >= 3)
    first.close()
    assert first.get(job).status is JobStatus.QUEUED
    assert first.get(job).worker is None
    second = directory_rig(base, tmp_path / "cut")
    second.start()
    try:
        second.wait(job, until=lambda job: job.step >= 12)
        second.jobs.pause(job.tenant, job.id)
        (paused,) = second.wait(job, until=lambda job: job.status is JobStatus.PAUSED)
        assert paused.state is not None
        assert paused.state["step"] >= 12
        second.jobs.resume(job.tenant, job.id)
        (done,) = second.wait(job)
        assert done.status is JobStatus.SUCCEEDED, done.error
        assert_same(published(second, done), want, 0)
        steps = [step for step, _ in second.jobs.metrics(job.id)]
        assert steps == list(range(1, len(steps) + 1))
        messages = second.messages(job)
        assert f"Job paused at step {paused.state['step']}" in messages
        assert f"Job resumed from step {paused.state['step']}" in messages
        assert len([m for m in messages if m.startswith("Checkpoint created")]) == 6
    finally:
        second.close()


def test_cancelled_job_stops_and_leaves_nothing(rig: Rig) -> None:
    job = rig.create(FEW, hyperparameters=replace(LONGER, n_epochs=50))
    rig.wait(job, until=lambda job: job.step >= 2)
    rig.jobs.cancel(job.tenant, job.id)
    deadline_jobs = [rig.create(FEW, hyperparameters=FAST)]
    rig.wait(*deadline_jobs)  # the trainer goes on with others
    assert rig.get(job).status is JobStatus.CANCELLED
    assert rig.get(job).step < 100
    assert rig.catalog.versions(job.tenant, job.adapter_name) == []
    assert rig.store.list(f"tenants/{job.tenant}/training/{job.id}/") == []


def test_states_of_a_job_cancelled_while_it_was_paused_are_swept(rig: Rig) -> None:
    job = rig.create(FEW, hyperparameters=replace(LONGER, n_epochs=50))
    rig.wait(job, until=lambda job: job.step >= 2)
    rig.jobs.pause(job.tenant, job.id)
    rig.wait(job, until=lambda job: job.status is JobStatus.PAUSED)
    kept = f"tenants/{job.tenant}/training/{job.id}/"
    sweep_states(rig.jobs, rig.store, rig.room.scratch)
    assert rig.store.list(kept), "a paused job may be resumed"
    rig.jobs.cancel(job.tenant, job.id)
    sweep_states(rig.jobs, rig.store, rig.room.scratch)
    assert rig.store.list(kept) == []
    assert rig.jobs.left_states() == []


def test_listed_checkpoints_keep_their_files_and_dropped_ones_do_not(rig: Rig) -> None:
    (job,) = rig.wait(rig.create(FEW, tenant="initech", hyperparameters=replace(FAST, n_epochs=6)))
    assert job.status is JobStatus.SUCCEEDED, job.error
    listed = [AdapterManifest.from_dict(one.manifest) for one in rig.jobs.checkpoints(job.tenant, job.id).items]
    (version,) = rig.catalog.versions(job.tenant, job.adapter_name)
    assert len(listed) < 6
    assert version.blobs & {sha256 for one in listed for sha256 in one.blobs}, "the last checkpoint is the version"

    def stored() -> set[str]:
        prefix = blob_key(job.tenant, "")
        return {info.key.removeprefix(prefix) for info in rig.store.list(prefix)}

    files = {job.spec.training_file.sha256, rig.files.get(job.tenant, str(job.result_file)).sha256}
    of_checkpoints = {sha256 for one in listed for sha256 in one.blobs}
    assert stored() == files | of_checkpoints | version.blobs
    rig.catalog.delete(job.tenant, job.adapter_name)
    assert stored() == files | of_checkpoints


def test_draining_gives_jobs_back_while_answers_finish(base: BaseModel, tmp_path: Path) -> None:
    rig = directory_rig(base, tmp_path)
    rig.start()
    try:
        job = rig.create(FEW, hyperparameters=replace(LONGER, n_epochs=50))
        rig.wait(job, until=lambda job: job.step >= 2)
        sampler = GreedySampler(rig.engine, eos_ids=frozenset(), max_context=512)
        answer = sampler.start("acme", None, [random_prompt(8, 290, 1)], max_tokens=480)
        with ThreadPoolExecutor(1) as pool:
            drained = pool.submit(rig.engine.drain, 60.0)
            rig.wait(job, until=lambda job: job.worker is None)
            assert not answer.done(), "the answer was to outlast the job"
            assert drained.result()
        assert rig.engine.is_running
        assert len(answer.result(1)[0].tokens) == 480
        given_back = rig.get(job)
        assert given_back.status is JobStatus.QUEUED
        assert given_back.state is not None
    finally:
        rig.close()


# ---- neighbours


def test_jobs_that_share_micro_steps_end_as_they_would_alone(base: BaseModel, tmp_path: Path) -> None:
    # Few epochs of many steps: at the end of each a job waits for its files, and meets nobody.
    rows = {"acme": [chat_row(n) for n in range(40)], "globex": [chat_row(n) for n in range(5, 49)]}
    asked: dict[str, Any] = {"hyperparameters": FAST, "lora": DROPOUT}
    rig = directory_rig(base, tmp_path, micro_batch_tokens=1024)
    jobs = [rig.create(rows[tenant], tenant=tenant, **asked) for tenant in rows]
    rig.start_with(len(jobs))
    try:
        done = rig.wait(*jobs)
        assert [job.status for job in done] == [JobStatus.SUCCEEDED] * 2, [job.error for job in done]
        assert rig.trainer.counters.num_joint_parts > 10, rig.trainer.counters
        together = [published(rig, job) for job in done]
    finally:
        rig.close()
    for (tenant, own), got in zip(rows.items(), together, strict=True):
        alone = uninterrupted(base, tmp_path / tenant, own, tenant=tenant, **asked)
        assert_same(got, alone, 1e-5)


def test_tenant_with_two_jobs_makes_room_for_one_that_has_none(base: BaseModel, tmp_path: Path) -> None:
    rig = directory_rig(base, tmp_path, max_jobs=2)
    rig.start()
    try:
        long = replace(LONGER, n_epochs=50)
        both = [rig.create([chat_row(n + i) for n in range(12)], hyperparameters=long) for i in range(2)]
        rig.wait(*both, until=lambda job: job.step >= 2)
        (done,) = rig.wait(rig.create(FEW, tenant="globex", hyperparameters=FAST))
        assert done.status is JobStatus.SUCCEEDED
        first, second = map(rig.get, both)
        assert (first.status, first.worker is None) == (JobStatus.RUNNING, False), "the older one stays"
        assert any(message.startswith("Job returned to the queue at step") for message in rig.messages(second))
        rig.wait(second, until=lambda job: job.status is JobStatus.RUNNING)
        assert any(message.startswith("Job resumed from step") for message in rig.messages(second))
        deadline = time.monotonic() + 10
        while rig.trainer.num_active < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not any(message.startswith("Job returned") for message in rig.messages(first))
    finally:
        rig.close()


def test_base_answers_the_same_with_a_job_beside_it(rig: Rig) -> None:
    sampler = GreedySampler(rig.engine, eos_ids=frozenset(), max_context=512)
    prompts = [random_prompt(20, 290, seed) for seed in range(4)]
    alone = sampler.start("acme", None, prompts, max_tokens=24).result(30)
    job = rig.create(FEW, hyperparameters=LONGER)
    rig.wait(job, until=lambda job: job.status is JobStatus.RUNNING)
    beside = sampler.start("acme", None, prompts, max_tokens=24).result(30)
    assert [answer.tokens for answer in beside] == [answer.tokens for answer in alone]
    (done,) = rig.wait(job)
    assert done.status is JobStatus.SUCCEEDED


# ---- measuring, gate, stopping


def test_gate_holds_back_what_learned_nothing(rig: Rig) -> None:
    rows = [chat_row(n) for n in range(60)]
    hopeless = Hyperparameters(n_epochs=1, batch_size=10, learning_rate_multiplier=1e-6)
    (done,) = rig.wait(rig.create(rows, hyperparameters=hopeless))
    assert done.status is JobStatus.SUCCEEDED
    assert done.gate is not None
    assert not done.gate["passed"]
    assert done.adapter_version == 1
    assert rig.catalog.aliases(done.tenant, done.adapter_name) == {}
    assert any("was not moved" in message for message in rig.messages(done))


@torch.inference_mode()
def test_published_files_answer_in_peft_as_they_do_here(rig: Rig, base_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        (job,) = rig.wait(rig.create(FEW, tenant="umbrella", hyperparameters=FAST))
        assert job.status is JobStatus.SUCCEEDED, job.error
        (manifest,) = rig.catalog.versions(job.tenant, job.adapter_name)
        for name, fact in ((CONFIG_FILE, manifest.config), (WEIGHTS_FILE, manifest.weights)):
            rig.store.download(blob_key(job.tenant, fact.sha256), tmp_path / name, max_bytes=fact.num_bytes)
        theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    prompt = random_prompt(20, 290, 5)
    sampler = GreedySampler(rig.engine, eos_ids=frozenset(), max_context=512)
    (ours,) = sampler.start(job.tenant, manifest, [prompt], max_tokens=16).result(30)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(ours.tokens) == out[0, len(prompt) :].tolist()


def test_worse_version_does_not_take_the_alias_from_a_better_one(rig: Rig) -> None:
    rows, publish = [chat_row(n) for n in range(60)], PublishOptions(name="colours")
    good = Hyperparameters(n_epochs=3, batch_size=6, learning_rate_multiplier=30.0)
    weak = Hyperparameters(n_epochs=1, batch_size=12, learning_rate_multiplier=5.0)
    (first,) = rig.wait(rig.create(rows, hyperparameters=good, publish=publish))
    (second,) = rig.wait(rig.create(rows, hyperparameters=weak, publish=publish))
    assert first.gate is not None
    assert second.gate is not None
    assert first.gate["passed"], first.gate
    assert second.gate["live_loss"] == pytest.approx(first.gate["loss"], rel=1e-4)
    assert "above that of version 1" in second.gate["reason"]
    assert rig.catalog.aliases("acme", "colours") == {"live": 1}
    assert [m.version for m in rig.catalog.versions("acme", "colours")] == [1, 2]


def test_early_stop_publishes_the_best_epoch(rig: Rig) -> None:
    rows = [chat_row(n) for n in range(60)]
    eager = Hyperparameters(n_epochs=25, batch_size=10, learning_rate_multiplier=150.0)
    options = TrainingOptions(early_stop_patience=1, schedule="constant")
    (done,) = rig.wait(rig.create(rows, hyperparameters=eager, training=options))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.gate is not None
    losses = [v["full_valid_loss"] for _, v in rig.jobs.metrics(done.id) if "full_valid_loss" in v]
    assert len(losses) < 25
    assert losses[-1] > min(losses)
    assert done.gate["loss"] == pytest.approx(min(losses))
    assert any(message.startswith("Stopped early") for message in rig.messages(done))


def test_regression_file_is_measured_on_what_is_live_too(rig: Rig) -> None:
    publish = PublishOptions(name="kept")
    (first,) = rig.wait(rig.create(FEW, hyperparameters=FAST, publish=publish))
    assert first.gate is not None
    assert "regression_loss" not in first.gate
    regression = rig.upload(FEW)
    away = [chat_row(n) for n in range(40, 55)]  # other answers: this forgets what the first version learned
    strong = Hyperparameters(n_epochs=4, batch_size=4, learning_rate_multiplier=60.0)
    (second,) = rig.wait(rig.create(away, hyperparameters=strong, publish=publish, regression_file=regression))
    assert second.gate is not None
    assert second.gate["live_version"] == 1
    is_worse = second.gate["regression_loss"] > second.gate["regression_live_loss"]
    assert second.gate["passed"] == (not is_worse)
    # On what it was trained on, the first version is well below the base.
    assert second.gate["regression_live_loss"] < 6.0


# ---- faults


def test_store_that_fails_for_a_while_costs_time_and_nothing_else(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, base: BaseModel, tmp_path: Path
) -> None:
    want = uninterrupted(base, tmp_path / "sound", FEW, hyperparameters=FAST)
    monkeypatch.setattr(job_thread, "RETRY_AFTER_S", (0.01,) * 3)
    put, failures = rig.store.put, itertools.cycle([True, False, False])

    def flaky(key: str, data: bytes | Path) -> None:
        if next(failures):
            raise StoreUnavailable("down")
        put(key, data)

    monkeypatch.setattr(rig.store, "put", flaky)
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert_same(published(rig, done), want, 0)


def test_store_that_stays_away_gives_the_job_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_thread, "RETRY_AFTER_S", ())
    put = rig.store.put

    def down(key: str, data: bytes | Path) -> None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(rig.store, "put", down)
    job = rig.create(FEW, hyperparameters=FAST)
    rig.wait(job, until=lambda job: job.fence >= 5)  # claimed, given back, claimed again
    assert not rig.get(job).status.is_over
    monkeypatch.setattr(rig.store, "put", put)
    (done,) = rig.wait(job)
    assert done.status is JobStatus.SUCCEEDED, done.error


def test_data_that_is_gone_for_good_fails_the_job_and_says_so(rig: Rig) -> None:
    job = rig.create(FEW, hyperparameters=FAST)
    rig.store.delete(blob_key(job.tenant, job.spec.training_file.sha256))
    (done,) = rig.wait(job)
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert done.error.code == "stored_data_lost"
    assert job.spec.training_file.id in done.error.message


def test_state_is_stored_after_the_metrics_of_its_steps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait while one is written would be lost by whoever goes on from the state."""
    record, save, missing = rig.queue.record_metrics, rig.queue.save_state, []

    def slow(claim: ClaimedJob, metrics: Sequence[StepMetrics]) -> None:
        time.sleep(0.2)
        record(claim, metrics)

    def checked(claim: ClaimedJob, step: int, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        told = {step for step, _ in rig.jobs.metrics(claim.id)}
        missing.extend(set(range(1, step)) - told)  # the state's own step may still be settled
        return save(claim, step, state)

    monkeypatch.setattr(rig.queue, "record_metrics", slow)
    monkeypatch.setattr(rig.queue, "save_state", checked)
    object.__setattr__(rig.room, "state_every_s", 0.0)  # a state after every step
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert missing == []


MicroStep = Callable[..., Generator[None, None, list[PartResult]]]


def with_fault(fault: Callable[[Sequence[Part], int], list[PartResult] | None]) -> MicroStep:
    """`micro_step`, but where `fault` (given the parts and the number of training steps so far) raises or replaces."""
    made = [0]

    def step(base: BaseModel, parts: Sequence[Part], *, train: bool = True) -> Generator[None, None, list[PartResult]]:
        made[0] += train
        replaced = fault(parts, made[0]) if train else None
        results = yield from micro_step(base, parts, train=train)
        return results if replaced is None else replaced

    return step


def nan_result(parts: Sequence[Part]) -> list[PartResult]:
    return [PartResult(float("nan"), float("nan"), 1, 0, 1, 1) for _ in parts]


def test_passing_fault_costs_a_step_back_and_a_lasting_one_the_job(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, base: BaseModel, tmp_path: Path
) -> None:
    want = uninterrupted(base, tmp_path / "sound", FEW, hyperparameters=FAST)
    once = with_fault(lambda parts, made: nan_result(parts) if made == 6 else None)
    monkeypatch.setattr(trainer_module, "micro_step", once)
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert any("went back to step 4" in message for message in rig.messages(done))
    assert_same(published(rig, done), want, 0)
    monkeypatch.setattr(trainer_module, "micro_step", with_fault(lambda parts, made: nan_result(parts)))
    (failed,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error.code == "nan_loss"
    assert rig.catalog.versions(failed.tenant, failed.adapter_name) == []


def test_out_of_memory_halves_the_micro_batch_and_spares_everybody_else(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(limit: int) -> MicroStep:
        def fault(parts: Sequence[Part], made: int) -> None:
            rows = [s for part in parts for s in part.sequences]
            if len(rows) * max(len(s.ids) for s in rows) > limit:
                raise torch.OutOfMemoryError("no room")

        return with_fault(fault)

    monkeypatch.setattr(trainer_module, "micro_step", too_large(100))
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert "Memory ran out: a micro-batch now holds at most 128 tokens" in rig.messages(done)
    assert rig.trainer.counters.num_out_of_memory > 0
    monkeypatch.setattr(trainer_module, "micro_step", too_large(5))
    (failed,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"


def test_job_with_a_bug_fails_alone_and_says_whom_to_ask(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(parts: Sequence[Part], made: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(trainer_module, "micro_step", with_fault(bug))
    (failed,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert failed.error is not None
    assert failed.error.code == "server_error"
    assert failed.id in failed.error.message
    monkeypatch.undo()
    (done,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert done.status is JobStatus.SUCCEEDED


def test_fault_in_a_shared_step_ends_only_the_job_that_has_it_alone_too(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []

    def bug(parts: Sequence[Part], made: int) -> None:
        if len(parts) > 1:
            shared.append(len(parts))
        if shared and any(part.adapter.scaling == 5.0 for part in parts):  # from when they met on
            raise ZeroDivisionError

    monkeypatch.setattr(trainer_module, "micro_step", with_fault(bug))
    rig = directory_rig(base, tmp_path, micro_batch_tokens=1024)
    long = Hyperparameters(n_epochs=6, batch_size=4)
    loras = [LoraOptions(rank=4, alpha=alpha, dropout=0.0) for alpha in (8.0, 20.0)]
    jobs = [rig.create(FEW, hyperparameters=long, lora=lora) for lora in loras]
    rig.start_with(len(jobs))
    try:
        good, failed = rig.wait(*jobs)
    finally:
        rig.close()
    assert shared, "the jobs never met"
    assert good.status is JobStatus.SUCCEEDED, good.error
    assert failed.error is not None
    assert failed.error.code == "server_error"


def test_tenant_that_comes_later_begins_level_and_its_absence_earns_nothing(base: BaseModel, tmp_path: Path) -> None:
    trainer = directory_rig(base, tmp_path).trainer

    def job(tenant: str) -> Any:
        return SimpleNamespace(run=SimpleNamespace(tenant=tenant), tokens=0)

    old, new = job("acme"), job("globex")
    trainer._arrive(old)
    trainer._served["acme"] += 1000
    trainer._arrive(new)
    assert trainer._turn(new) == trainer._turn(old)
    trainer._served["globex"] += 10
    trainer._active.remove(new)
    trainer._arrive(job("globex"))
    assert trainer._turn(new) > trainer._turn(old)


def test_memory_that_runs_out_beside_the_steps_is_called_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: AdapterOptimizer, step: int) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(AdapterOptimizer, "step", full)
    (failed,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"


def test_adapter_that_the_door_refuses_says_why(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AdapterRankTooLarge

    monkeypatch.setattr(rig.room.output, "pack", refuse)
    (failed,) = rig.wait(rig.create(FEW, hyperparameters=FAST))
    assert failed.error is not None
    assert failed.error.code == AdapterRankTooLarge.code


def test_eva_init_begins_at_the_inputs_main_directions(rig: Rig) -> None:
    job = rig.create(
        FEW, hyperparameters=Hyperparameters(n_epochs=1, batch_size=14), lora=LoraOptions(rank=4, init="eva")
    )
    (done,) = rig.wait(job)
    assert done.status is JobStatus.SUCCEEDED, done.error
    data = rig.fine_tuning.prepare(done.tenant, done.spec)
    sizes = ExampleSizes.of(data.train)
    (first, *_) = micro_batches(np.arange(len(sizes)), sizes, max_tokens=rig.micro_batch_tokens)
    rows = [rig.base.body.embed_tokens(torch.tensor(np.array(data.train[p][0].ids), dtype=torch.long)) for p in first]
    norm = rig.base.body.layers[0].input_layernorm
    inputs = norm(torch.cat(rows)).float()
    path = "model.layers.0.self_attn.q_proj"
    assert done.config is not None
    # One step of a small rate moves A by at most the rate from where it began.
    got, want = published(rig, done)[path].a, torch.linalg.svd(inputs, full_matrices=False).Vh[:4]
    torch.testing.assert_close(got.abs(), want.abs(), atol=2 * done.config.learning_rate, rtol=1e-3)
