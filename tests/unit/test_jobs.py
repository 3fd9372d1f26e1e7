"""Fine-tuning jobs: who may write what and when, turns between tenants, lost workers, repeated calls. On SQLite."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.manifest import BaseModelSpec
from app.database import metadata, migrate, open_database, writing
from app.errors import ModelNotFound, RateLimited, RequestInvalid
from app.training import tables
from app.training.config import TrainableBase, TrainingConfig, auto_batch_size, auto_epochs, estimate, resolve
from app.training.dataset_rows import Method
from app.training.figures import JOB_BUCKETS_S, TrainingFigures
from app.training.job import (
    TRANSITIONS,
    InvalidJobState,
    Job,
    JobError,
    JobNotFound,
    JobStatus,
    StaleFence,
    StepMetrics,
    Succeeded,
)
from app.training.jobs import JobStore, MetadataFilter, NewJob, result_csv
from app.training.permissions import Permissions
from app.training.reaper import Reaper
from app.training.spec import JobSpec, LoraOptions, PinnedFile, PublishOptions, TrainingOptions
from app.training.turns import Waiting, claim_order
from app.training.work_queue import ClaimedJob, Signal, WorkQueue

BASE = TrainableBase(
    BaseModelSpec("tiny", "0" * 64, (), {"model.layers.0.q_proj": (8, 8), "model.layers.0.up_proj": (8, 16)}),
    max_context=64,
    hidden_size=8,
    num_layers=1,
    vocab_size=32,
    max_rank=64,
    micro_batch_tokens=64,
)


class Wall:
    """A wall clock that jumps as it is told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A fresh database with both sides of jobs on it."""

    def __init__(self, database: Path) -> None:
        self.wall = Wall()
        self.engine = open_database(f"sqlite:///{database}")
        # What a power cut would lose is not tested here, and each fsync costs more than a test.
        sa.event.listen(self.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        self.jobs = JobStore(self.engine, wall=self.wall)
        self.queue = WorkQueue(self.engine, base_id="tiny", wall=self.wall)
        self._made = 0

    def file(self, tenant: str) -> PinnedFile:
        self._made += 1
        file_id = f"file-{self._made}"
        row = {"id": file_id, "tenant": tenant, "sha256": f"{self._made:064x}", "num_bytes": 1, "filename": "f"}
        row |= {"purpose": "fine-tune", "created_at": self.wall(), "is_deleted": False}
        with writing(self.engine) as connection:
            connection.execute(sa.insert(tables.files).values(**row))
        return PinnedFile(file_id, row["sha256"], 1)

    def new(self, tenant: str = "acme", **spec: Any) -> NewJob:
        job_spec = JobSpec(model="tiny", training_file=spec.pop("training_file", None) or self.file(tenant), **spec)
        return NewJob(job_spec, asked={"model": "tiny", "training_file": job_spec.training_file.id})

    def create(self, tenant: str = "acme", **spec: Any) -> Job:
        return self.jobs.create(tenant, self.new(tenant, **spec))

    def queued(self, tenant: str = "acme", **spec: Any) -> Job:
        job = self.create(tenant, **spec)
        claim = self.queue.claim_validation("validator")
        assert claim is not None
        assert claim.id == job.id
        self.queue.validated(claim, self.config(job), {"training": {}}, 1000)
        return self.jobs.get(tenant, job.id)

    def config(self, job: Job) -> TrainingConfig:
        return resolve(job.spec, 40, BASE)

    def running(self, tenant: str = "acme", **spec: Any) -> ClaimedJob:
        self.queued(tenant, **spec)
        claim = self.queue.claim("w1")
        assert claim is not None
        return claim

    def messages(self, job_id: str, tenant: str = "acme") -> list[str]:
        return [event.message for event in self.jobs.events(tenant, job_id, limit=100, asc=True).items]

    def status(self, job_id: str, tenant: str = "acme") -> JobStatus:
        return self.jobs.get(tenant, job_id).status


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database; a copy of it costs less than migrating once more."""
    path = tmp_path_factory.mktemp("migrated") / "lodger.db"
    engine = open_database(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()
    return path


@pytest.fixture
def world(migrated: Path, tmp_path: Path) -> Iterator[World]:
    made = World(Path(shutil.copy(migrated, tmp_path)))
    yield made
    made.engine.dispose()


DONE = Succeeded(adapter_version=3, trained_tokens=10, total_tokens=20, result_file="file-r", gate={"passed": True})


def test_migration_makes_the_declared_tables(world: World) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = world.engine
    ours = {"tables": lambda name, *_: name.startswith(("training_", "webhook_"))}
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, _: kind != "table" or ours["tables"](name or "")}
        )
        wanted = sa.MetaData(naming_convention=metadata.naming_convention)
        for table in metadata.sorted_tables:
            if ours["tables"](table.name):
                table.to_metadata(wanted)
        assert compare_metadata(context, wanted) == []


def test_life_of_a_job_is_told_in_events(world: World) -> None:
    claim = world.running()
    world.queue.record_metrics(claim, [StepMetrics(1, train_loss=1.5, valid_loss=2.0)])
    world.queue.add_checkpoint(claim, StepMetrics(1, train_loss=1.5), {"digest": "d"})
    name = world.queue.begin_publish(claim)
    world.queue.succeed(claim, DONE)
    job = world.jobs.get("acme", claim.id)
    assert (job.status, job.fine_tuned_model, job.adapter_version) == (JobStatus.SUCCEEDED, name, 3)
    assert name == f"ft:tiny:acme::{job.unique_id}"
    assert world.messages(claim.id) == [
        f"Created fine-tuning job: {claim.id}",
        f"Validating training file: {job.spec.training_file.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"Step 1/{job.total_steps}: training loss=1.50, validation loss=2.00",
        f"Checkpoint created at step 1 with Snapshot ID: {name}:ckpt-step-1",
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]


def test_spec_and_config_survive_the_database(world: World) -> None:
    spec = {
        "suffix": "x",
        "lora": LoraOptions(rank=4, target_modules=("q_proj",)),
        "training": TrainingOptions(max_steps=7),
        "publish": PublishOptions(name="support"),
    }
    job = world.queued(**spec)
    assert job.spec.lora == spec["lora"]
    assert job.spec.training == spec["training"]
    assert job.config == world.config(job)
    assert job.adapter_name == "support"


def test_held_back_alias_is_a_warning(world: World) -> None:
    claim = world.running()
    world.queue.begin_publish(claim)
    world.queue.succeed(claim, replace(DONE, gate={"passed": False, "reason": "no better than the base"}))
    warning = next(e for e in world.jobs.events("acme", claim.id).items if e.level == "warn")
    assert "no better than the base" in warning.message


def test_failure_carries_code_and_findings(world: World) -> None:
    job = world.create()
    claim = world.queue.claim_validation("w")
    assert claim is not None
    world.queue.fail(claim, JobError("invalid_training_file", "bad", "training_file"), data={"findings": [{"line": 1}]})
    failed = world.jobs.get("acme", job.id)
    assert failed.error == JobError("invalid_training_file", "bad", "training_file")
    assert failed.finished_at == world.wall()
    event = world.jobs.events("acme", job.id).items[0]
    assert (event.level, event.data) == ("error", {"findings": [{"line": 1}]})


# ---- fences


WRITES: dict[str, Callable[[WorkQueue, ClaimedJob], object]] = {
    "heartbeat": lambda queue, claim: queue.heartbeat(claim),
    "check": lambda queue, claim: queue.check(claim),
    "record_event": lambda queue, claim: queue.record_event(claim, "late"),
    "record_metrics": lambda queue, claim: queue.record_metrics(claim, [StepMetrics(9, train_loss=1.0)]),
    "save_state": lambda queue, claim: queue.save_state(claim, 9, {}),
    "add_checkpoint": lambda queue, claim: queue.add_checkpoint(claim, StepMetrics(9), {}),
    "paused": lambda queue, claim: queue.paused(claim),
    "begin_publish": lambda queue, claim: queue.begin_publish(claim),
    "succeed": lambda queue, claim: queue.succeed(claim, DONE),
    "fail": lambda queue, claim: queue.fail(claim, JobError("x", "y")),
    "release": lambda queue, claim: queue.release(claim),
}
TAKEN_AWAY: dict[str, Callable[[World, ClaimedJob], object]] = {
    "lost": lambda world, claim: world.queue.lose(claim.id, claim.fence, 0),
    "lost and claimed again": lambda world, claim: (
        world.queue.lose(claim.id, claim.fence, 0),
        world.queue.claim("w2"),
    ),
    "cancelled": lambda world, claim: world.jobs.cancel("acme", claim.id),
    "released": lambda world, claim: world.queue.release(claim),
    "succeeded": lambda world, claim: world.queue.succeed(claim, DONE),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("how", TAKEN_AWAY)
def test_worker_that_lost_its_job_writes_nothing(world: World, write: str, how: str) -> None:
    claim = world.running()
    TAKEN_AWAY[how](world, claim)
    before, story = world.jobs.get("acme", claim.id), world.messages(claim.id)
    with pytest.raises(StaleFence):
        WRITES[write](world.queue, claim)
    assert world.jobs.get("acme", claim.id) == before
    assert world.messages(claim.id) == story


def test_erased_job_is_a_stale_fence(world: World) -> None:
    claim = world.running()
    with writing(world.engine) as connection:
        connection.execute(sa.delete(tables.jobs))
    with pytest.raises(StaleFence):
        world.queue.heartbeat(claim)


def test_reaper_waits_a_whole_lease_of_its_own_clock(world: World) -> None:
    claim, clock = world.running(), Wall()
    reaper = Reaper(world.queue, lease_s=30, clock=clock)
    world.wall.now += 86_400  # wall clocks do not matter
    assert reaper.sweep() == []
    clock.now += 29.9
    assert reaper.sweep() == []
    world.queue.heartbeat(claim)
    clock.now += 0.2
    assert reaper.sweep() == []  # a new sign of life starts a new lease
    clock.now += 29.9
    assert reaper.sweep() == []
    clock.now += 0.2
    assert reaper.sweep() == [claim.id]
    assert world.status(claim.id) is JobStatus.QUEUED


def test_heartbeat_between_the_reapers_look_and_its_act_saves_the_job(world: World) -> None:
    claim = world.running()
    world.queue.heartbeat(claim)
    assert world.queue.lose(claim.id, claim.fence, 0) is False
    assert world.queue.heartbeat(claim) is Signal.GO_ON


def test_lost_job_goes_on_from_its_durable_state(world: World) -> None:
    claim = world.running()
    assert world.queue.save_state(claim, 5, {"key": "a"}) is None
    assert world.queue.save_state(claim, 8, {"key": "b"}) == {"key": "a", "step": 5}
    world.queue.lose(claim.id, claim.fence, 0)
    again = world.queue.claim("w2")
    assert again is not None
    assert again.job.state == {"key": "b", "step": 8}
    assert "The job's worker was lost; training continues from step 8" in world.messages(claim.id)


def test_job_that_kills_its_workers_fails_in_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.training.work_queue.MAX_LOST_WORKERS", 2)
    world.queued()
    for _ in range(3):
        claim = world.queue.claim("w")
        assert claim is not None
        world.queue.lose(claim.id, claim.fence, 0)
    error = world.jobs.get("acme", claim.id).error
    assert error is not None
    assert error.code == "server_error"
    assert claim.id in error.message


def test_step_that_runs_again_makes_no_second_event(world: World) -> None:
    claim = world.running()
    world.queue.record_metrics(claim, [StepMetrics(1, train_loss=1.0), StepMetrics(2, train_loss=0.9)])
    world.queue.lose(claim.id, claim.fence, 0)
    again = world.queue.claim("w2")
    assert again is not None
    world.queue.record_metrics(again, [StepMetrics(2, train_loss=0.9), StepMetrics(3, train_loss=float("nan"))])
    steps = [event.data["step"] for event in world.jobs.events("acme", claim.id, limit=50, asc=True).items
             if event.type == "metrics" and event.data]  # fmt: skip
    assert steps == [1, 2, 3]
    assert [values.get("train_loss") for _, values in world.jobs.metrics(claim.id)] == [1.0, 0.9, None]


# ---- pause, resume, cancel


@pytest.mark.parametrize("act", ["cancel", "pause", "resume"])
def test_repeated_call_is_the_same_as_one(world: World, act: str) -> None:
    job = world.queued()
    if act == "resume":
        world.jobs.pause("acme", job.id)
    once = getattr(world.jobs, act)("acme", job.id)
    story = world.messages(job.id)
    assert getattr(world.jobs, act)("acme", job.id) == once
    assert world.messages(job.id) == story


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
@pytest.mark.parametrize("act", ["cancel", "pause", "resume"])
def test_job_that_is_over_stays_so(world: World, end: str, act: str) -> None:
    claim = world.running()
    if end == "succeeded":
        world.queue.succeed(claim, DONE)
    elif end == "failed":
        world.queue.fail(claim, JobError("x", "y"))
    else:
        world.jobs.cancel("acme", claim.id)
    if act == "cancel" and end == "cancelled":
        assert world.jobs.cancel("acme", claim.id).status is JobStatus.CANCELLED
        return
    with pytest.raises(InvalidJobState):
        getattr(world.jobs, act)("acme", claim.id)
    assert world.status(claim.id).value == end


def test_running_job_pauses_once_its_state_is_durable(world: World) -> None:
    claim = world.running()
    assert world.jobs.pause("acme", claim.id).status is JobStatus.PAUSING
    assert world.queue.heartbeat(claim) is Signal.PAUSE
    world.queue.save_state(claim, 4, {})
    assert world.queue.paused(claim)
    assert world.status(claim.id) is JobStatus.PAUSED
    assert world.queue.claim("w2") is None
    world.jobs.resume("acme", claim.id)
    assert world.queue.claim("w2") is not None
    assert world.messages(claim.id)[-2:] == ["Job paused at step 4", "Job resumed from step 4"]


def test_job_resumed_before_it_paused_just_goes_on(world: World) -> None:
    claim = world.running()
    world.jobs.pause("acme", claim.id)
    assert world.jobs.resume("acme", claim.id).status is JobStatus.RUNNING
    assert world.queue.paused(claim) is False
    assert world.queue.heartbeat(claim) is Signal.GO_ON


def test_worker_lost_while_pausing_leaves_a_paused_job(world: World) -> None:
    claim = world.running()
    world.jobs.pause("acme", claim.id)
    world.queue.lose(claim.id, claim.fence, 0)
    assert world.status(claim.id) is JobStatus.PAUSED


def test_publishing_job_can_no_longer_be_cancelled(world: World) -> None:
    claim = world.running()
    world.queue.begin_publish(claim)
    for act in (world.jobs.cancel, world.jobs.pause):
        with pytest.raises(InvalidJobState):
            act("acme", claim.id)
    world.queue.succeed(claim, DONE)
    assert world.status(claim.id) is JobStatus.SUCCEEDED


@pytest.mark.parametrize("end", [
    lambda queue, claim: queue.release(claim),
    lambda queue, claim: queue.lose(claim.id, claim.fence, 0),
])  # fmt: skip
def test_job_given_back_while_it_published_may_be_live_and_is_not_cancelled(
    world: World, end: Callable[[WorkQueue, ClaimedJob], None]
) -> None:
    claim = world.running()
    world.queue.begin_publish(claim)
    end(world.queue, claim)
    assert world.status(claim.id) is JobStatus.QUEUED
    for act in (world.jobs.cancel, world.jobs.pause):
        with pytest.raises(InvalidJobState):
            act("acme", claim.id)
    again = world.queue.claim("w2")
    assert again is not None
    world.queue.succeed(again, DONE)
    assert world.status(claim.id) is JobStatus.SUCCEEDED


def test_only_what_happens_seldom_is_told_when_a_job_is_given_back(world: World) -> None:
    claim = world.running()
    before = world.messages(claim.id)
    for _ in range(3):  # a fault that stays
        world.queue.release(claim)
        claim = world.queue.claim("w")
        assert claim is not None
    assert world.messages(claim.id) == before
    world.queue.release(claim, is_told=True)
    assert world.queue.claim("w") is not None
    assert world.messages(claim.id)[len(before) :] == ["Job returned to the queue at step 0", "Job resumed from step 0"]


def test_validating_job_is_not_paused(world: World) -> None:
    job = world.create()
    with pytest.raises(InvalidJobState):
        world.jobs.pause("acme", job.id)


def test_every_status_can_be_reached_and_ends(world: World) -> None:
    reached = {JobStatus.VALIDATING}
    for _ in JobStatus:
        reached |= {to for status in reached for to in TRANSITIONS[status]}
    assert reached == set(JobStatus)
    assert {status for status in JobStatus if status.is_over} == {
        JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED
    }  # fmt: skip


# ---- turns


def test_tenant_starves_while_it_waits_and_has_nothing_at_work(world: World) -> None:
    assert world.queue.starved() == set()
    world.running()
    assert world.queue.starved() == set()
    world.queued()
    assert world.queue.starved() == set(), "its first job is at work"
    waiting = world.queued(tenant="bolt")
    assert world.queue.starved() == {waiting.id}
    world.create(tenant="bolt")
    assert world.queue.claim_validation("validator") is not None
    assert world.queue.starved() == {waiting.id}, "validating is no training"
    assert world.queue.claim("w") is not None
    assert world.queue.starved() == set()


def test_tenants_take_turns_whatever_they_queue(world: World) -> None:
    for tenant in ("acme", "acme", "acme", "bolt", "bolt"):
        world.queued(tenant)
    claims = [world.queue.claim("w") for _ in range(5)]
    assert [claim and claim.job.tenant for claim in claims] == ["acme", "bolt", "acme", "bolt", "acme"]
    assert world.queue.claim("w") is None


def test_priority_counts_only_among_ones_own_jobs(world: World) -> None:
    low = world.queued("acme")
    high = world.queued("acme", training=TrainingOptions(priority=9))
    other = world.queued("bolt")
    assert world.jobs.queue_positions() == {high.id: 1, other.id: 2, low.id: 3}
    claims = [world.queue.claim("w") for _ in range(3)]
    assert [claim and claim.id for claim in claims] == [high.id, other.id, low.id]


def test_tenant_with_a_running_job_waits_behind_one_without() -> None:
    waiting = [Waiting("a", "acme", 0, 1), Waiting("b", "bolt", 0, 2)]
    order = claim_order(waiting, running={"acme": 1}, turns={"bolt": 9, "acme": 1})
    assert [job.id for job in order] == ["b", "a"]


def test_many_workers_never_share_a_job(world: World) -> None:
    for _ in range(8):
        world.queued()
    taken: list[str] = []

    def work(name: str) -> None:
        while (claim := world.queue.claim(name)) is not None:
            taken.append(claim.id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 8


# ---- repeated creates, quotas


def test_same_idempotency_key_is_one_job(world: World) -> None:
    new = replace(world.new(), idempotency_key="k")
    first = world.jobs.create("acme", new)
    world.wall.now += 3600
    assert world.jobs.create("acme", new).id == first.id
    with pytest.raises(RequestInvalid) as reused:
        world.jobs.create("acme", replace(new, asked={"model": "other"}))
    assert reused.value.code == "idempotency_key_reused"
    theirs = replace(world.new("bolt"), idempotency_key="k")
    assert world.jobs.create("bolt", theirs).id != first.id
    world.wall.now += 86_400
    assert world.jobs.create("acme", new).id != first.id


def test_key_sent_fifty_times_at_once_is_one_job(world: World) -> None:
    new = replace(world.new(), idempotency_key="k")
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(world.jobs.create("acme", new).id)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 50
    assert len(set(ids)) == 1


def test_retry_of_an_identical_create_is_merged_and_said_so(world: World) -> None:
    new = world.new()
    first = world.jobs.create("acme", new)
    assert world.jobs.create("acme", replace(new, is_retry=True)).id == first.id
    assert world.jobs.events("acme", first.id).items[0].level == "warn"
    assert world.jobs.create("acme", new).id != first.id  # not said to be a retry
    world.wall.now += 61
    assert world.jobs.create("acme", replace(new, is_retry=True)).id != first.id


def test_duplicates_are_made_where_asked_for(world: World) -> None:
    new = replace(world.new(training=TrainingOptions(allow_duplicate=True)), is_retry=True)
    assert world.jobs.create("acme", new).id != world.jobs.create("acme", new).id


def test_unfinished_jobs_are_limited(world: World) -> None:
    job = world.jobs.create("acme", world.new(), max_active=1)
    with pytest.raises(RateLimited) as refused:
        world.jobs.create("acme", world.new(), max_active=1)
    assert refused.value.code == "quota_exceeded"
    world.jobs.cancel("acme", job.id)
    world.jobs.create("acme", world.new(), max_active=1)


def test_deleted_file_makes_no_job(world: World) -> None:
    new = world.new()
    with writing(world.engine) as connection:
        connection.execute(sa.update(tables.files).values(is_deleted=True))
    with pytest.raises(RequestInvalid) as refused:
        world.jobs.create("acme", new)
    assert refused.value.code == "not_found"


# ---- looking


def test_foreign_job_is_absent(world: World) -> None:
    job = world.create()
    for act in (world.jobs.get, world.jobs.cancel, world.jobs.pause, world.jobs.events, world.jobs.checkpoints):
        with pytest.raises(JobNotFound) as foreign:
            act("bolt", job.id)
        with pytest.raises(JobNotFound) as absent:
            act("acme", "ftjob-none")
        assert foreign.value.message == absent.value.message


def test_thousand_events_page_without_loss_while_new_ones_arrive(world: World) -> None:
    claim = world.running()
    world.queue.record_metrics(claim, [StepMetrics(step, train_loss=1.0) for step in range(1, 1001)])
    seen: list[str] = []
    after = None
    while True:
        page = world.jobs.events("acme", claim.id, after=after, limit=97)
        seen += [event.message for event in page.items]
        if not page.has_more:
            break
        after = page.items[-1].id
        world.queue.record_event(claim, "new")
    assert len(seen) == len(set(seen)) == 1004
    assert seen[-1].startswith("Created")


def test_jobs_are_listed_newest_first_and_filtered_by_metadata(world: World) -> None:
    wanted = [{"a": "1", "b": ""}, {"a": "1"}, None, {"a": "2"}]
    made = [world.jobs.create("acme", replace(world.new(), metadata=metadata)) for metadata in wanted]
    world.create("bolt")

    def listed(**where: Any) -> list[int]:
        page = world.jobs.list("acme", where=MetadataFilter(**where))
        return [next(n for n, job in enumerate(made) if job.id == found.id) for found in page.items]

    assert listed() == [3, 2, 1, 0]
    assert listed(pairs={"a": "1"}) == [1, 0]
    assert listed(pairs={"a": "1", "b": ""}) == [0]
    assert listed(only_null=True) == [2]
    with pytest.raises(RequestInvalid):
        world.jobs.list("acme", after="ftjob-none")


def test_newest_and_best_checkpoints_are_kept_and_a_dropped_one_keeps_its_place(world: World) -> None:
    claim = world.running()
    dropped = []
    for step, loss in ((1, 2.0), (2, 0.5), (3, 1.0), (4, 1.1), (5, 1.2), (6, 1.3)):
        made, gone = world.queue.add_checkpoint(claim, StepMetrics(step, full_valid_loss=loss), {"digest": str(step)})
        dropped += [one.step for one in gone]
        if step == 3:
            third = made
    page = world.jobs.checkpoints("acme", claim.id)
    assert [point.step for point in page.items] == [6, 5, 4, 2]
    assert dropped == [1, 3]
    older = world.jobs.checkpoints("acme", claim.id, after=third.id)
    assert [point.step for point in older.items] == [2]


def test_checkpoint_written_twice_is_listed_once(world: World) -> None:
    claim = world.running()
    first, _ = world.queue.add_checkpoint(claim, StepMetrics(1), {"digest": "a"})
    again, _ = world.queue.add_checkpoint(claim, StepMetrics(1), {"digest": "a"})
    assert first.id == again.id
    assert len([text for text in world.messages(claim.id) if text.startswith("Checkpoint")]) == 1


def test_names_of_models_and_checkpoints_are_found(world: World) -> None:
    claim = world.running(publish=PublishOptions(name="support"))
    point, _ = world.queue.add_checkpoint(claim, StepMetrics(1), {"digest": "a"})
    found = world.jobs.find_model(point.name)
    assert found is not None
    assert (found.tenant, found.manifest) == ("acme", {"digest": "a"})
    world.queue.succeed(claim, DONE)
    (model,) = world.jobs.fine_tuned_models("acme")
    assert world.jobs.find_model(model.name) == model
    assert (model.adapter_name, model.adapter_version) == ("support", 3)
    assert world.jobs.find_model("ft:tiny:acme::none") is None


def test_checkpoint_is_shared_only_as_granted(world: World) -> None:
    claim, permissions = world.running(), Permissions(world.engine, wall=world.wall)
    point, _ = world.queue.add_checkpoint(claim, StepMetrics(1), {})
    with pytest.raises(ModelNotFound):
        permissions.grant("bolt", point.name, ["bolt"])
    granted = permissions.grant("acme", point.name, ["bolt", "corp", "bolt"])
    assert permissions.grant("acme", point.name, ["bolt"])[0].id == granted[0].id
    assert permissions.may_use("bolt", point.name)
    assert [one.project_id for one in permissions.list("acme", point.name).items] == ["corp", "bolt"]
    permissions.revoke("acme", point.name, granted[0].id)
    assert not permissions.may_use("bolt", point.name)
    page = permissions.list("acme", point.name, after=granted[1].id)
    assert page.items == ()


def test_result_file_has_openais_header_and_empty_cells() -> None:
    rows = [(1, {"train_loss": 1.523474, "train_mean_token_accuracy": 0.0}), (2, {"valid_loss": 2.0})]
    assert result_csv(rows).decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,1.52347,0.0,,",
        "2,,,2.0,",
    ]


# ---- "auto"


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [(4, 25), (10, 10), (20, 5), (33, 3), (34, 3), (8333, 3), (8334, 2), (10_000, 2), (12_501, 1), (90_000, 1)],
)
def test_auto_epochs_are_openais(examples: int, epochs: int) -> None:
    assert auto_epochs(examples) == epochs


@pytest.mark.parametrize(("examples", "size"), [(1, 1), (10, 1), (11, 2), (80, 8), (10_000, 8), (10_001, 16)])
def test_auto_batch_grows_with_the_data(examples: int, size: int) -> None:
    assert auto_batch_size(examples) == size


def test_asked_values_win_over_auto() -> None:
    spec = JobSpec("tiny", PinnedFile("f", "0", 1), lora=LoraOptions(rank=64), training=TrainingOptions(max_steps=5))
    config = resolve(spec, 1000, BASE)
    assert (config.rank, config.max_grad_norm, config.dropout) == (64, 0.3, 0.0)
    assert (config.total_steps, config.warmup_steps) == (5, 1)
    assert config.target_modules == ("q_proj", "up_proj")
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_estimated_memory_counts_the_micro_batch_and_the_optimizers_moments() -> None:
    spec = JobSpec("tiny", PinnedFile("file-1", "0" * 64, 1), lora=LoraOptions(rank=4))
    wide = BaseModelSpec("tiny", "0" * 64, (), {"model.layers.0.q_proj": (8, 8), "model.layers.0.up_proj": (8, 1024)})

    def memory(micro_batch_tokens: int, method: Method = Method.SUPERVISED, **training: Any) -> int:
        base = replace(BASE, spec=wide, micro_batch_tokens=micro_batch_tokens)
        config = resolve(replace(spec, method=method, training=TrainingOptions(**training)), 80, base)
        facts = {"num_examples": 80, "epoch_tokens": 800, "longest_tokens": 10, "tokens_per_s": None}
        return estimate(config, base, **facts).peak_memory_bytes

    assert memory(0) == memory(10) < memory(40) < memory(80)
    assert memory(80) == memory(8000), "a step of eight examples fills no more"
    assert memory(10, Method.DPO) == memory(20), "a preference is two sequences"
    # B of up_proj is large enough for moments of 8 bits, the other factors are not.
    assert memory(0) - memory(0, optimizer="adamw_8bit") == 6 * 4 * 1024


def test_job_of_another_base_is_left_to_its_workers(world: World) -> None:
    digests = {"ours": "a" * 64, "theirs": "b" * 64}
    queues = {name: WorkQueue(world.engine, base_id="tiny", base_digest=digest) for name, digest in digests.items()}
    spec = JobSpec("tiny", PinnedFile("file-1", "0" * 64, 1))
    files = tables.files
    with writing(world.engine) as connection:
        row = {"id": "file-1", "tenant": "acme", "sha256": "0" * 64, "num_bytes": 1, "filename": "f"}
        row |= {"purpose": "fine-tune", "created_at": 0.0, "is_deleted": False}
        connection.execute(sa.insert(files).values(**row))
    job = world.jobs.create("acme", NewJob(spec, asked={}, base_digest=digests["theirs"]))
    assert queues["ours"].claim_validation("w") is None
    claim = queues["theirs"].claim_validation("w")
    assert claim is not None
    assert claim.id == job.id


def test_tokens_of_a_day_bound_what_a_tenant_may_train(world: World) -> None:
    claim = world.running()
    with writing(world.engine) as connection:
        connection.execute(sa.update(tables.jobs).where(tables.jobs.c.id == claim.id).values(total_tokens=100))
    spec = claim.job.spec
    world.jobs.create("acme", NewJob(spec, asked={"n": 1}), max_tokens_per_day=101)
    with pytest.raises(RateLimited) as refused:
        world.jobs.create("acme", NewJob(spec, asked={"n": 2}), max_tokens_per_day=100)
    assert refused.value.code == "quota_exceeded"
    world.wall.now += 25 * 3600
    world.jobs.create("acme", NewJob(spec, asked={"n": 3}), max_tokens_per_day=100)


# ---- what operators see


def test_figures_tell_jobs_ages_losses_and_durations(world: World) -> None:
    ended_before = world.running()
    world.queue.fail(ended_before, JobError("server_error", "before the process began"))
    world.wall.now += 1000.0
    figures = TrainingFigures(world.engine, None, wall=world.wall)
    claim = world.running()
    world.queue.record_metrics(claim, [StepMetrics(1, train_loss=2.5), StepMetrics(2, train_loss=1.5)])
    world.queued("globex")
    world.wall.now += 45.0
    figures.look()
    seen = figures.snapshot()
    assert {state: count for state, count in seen.jobs.items() if count} == {"running": 1, "queued": 1, "failed": 1}
    assert (seen.queue_age_s, seen.last_loss) == (45.0, 1.5)
    world.queue.fail(claim, JobError("nan_loss", "no"))
    figures.look()
    figures.look()  # the same end is not counted twice
    failed = figures.snapshot().job_seconds["failed"]
    assert (sum(failed.counts), failed.total) == (1, 45.0)
    assert failed.counts[JOB_BUCKETS_S.index(60.0)] == 1
