"""The end of a run: pack the trained adapter, measure it against what it would replace, publish it.

Whatever is done here may be done again by whoever comes next: a version belongs to its job.
"""

from __future__ import annotations

import logging
from typing import Any

from adapters.errors import AdapterNormTooLarge, AdapterRefused, AdapterValuesNotFinite
from app.training.evaluate import bare_base, eos_rate, measure, sample_prompts
from app.training.gate import GateFacts, Verdict, judge, start_and_end
from app.training.job import StaleFence, Succeeded
from app.training.publish import PackedAdapter
from app.training.report import write_result_file
from app.training.setting_up import Trainee, fixed_adapter
from app.training.work import Steps, wait
from app.training.workroom import Desk, JobFailed

logger = logging.getLogger(__name__)


def pack_adapter(desk: Desk, t: Trainee, name: str, *, best: bool) -> Steps[PackedAdapter]:
    """The adapter as files below `name`, through the door. `best`: by validation loss, else as it is now.

    Raises JobFailed for what the door refuses.
    """
    facts: dict[str, Any] = {"training": t.config.to_dict(), "data": [file.sha256 for file in desk.job.spec.files]}
    facts["step"] = t.progress.best_step if best and t.best else t.progress.step
    pairs = t.exported(desk.room.base.lora.paths, best=best)
    try:
        packed: PackedAdapter = yield from desk.call(
            desk.room.output.pack, desk.job, t.config, pairs, facts, desk.scratch / name
        )
    except AdapterRefused as exc:
        if isinstance(exc, AdapterValuesNotFinite | AdapterNormTooLarge):
            raise JobFailed("nan_loss", f"The trained adapter cannot be used: {exc.message}") from exc
        raise JobFailed(exc.code, f"The trained adapter cannot be served: {exc.message}") from exc
    return packed


def judge_adapter(desk: Desk, t: Trainee) -> Steps[tuple[PackedAdapter, Verdict]]:
    """Measure the final adapter against the base and against what its alias points to now."""
    job, output, progress = desk.job, desk.room.output, t.progress
    packed = yield from pack_adapter(desk, t, "final", best=True)
    output.warm(packed)
    facts: dict[str, Any] = {}
    live = yield from desk.call(output.current, job)
    rival = None
    if live is not None and live.job_id != job.id:  # else an earlier attempt of ours has moved it already
        rival = fixed_adapter(desk.room.base, (yield from desk.call(output.fetch, live, desk.scratch)))
        facts["live_version"] = live.version
    budget = progress.micro_batch_tokens
    if t.held_out is not None:
        facts |= {"loss": progress.best_loss, "base_loss": progress.base_loss}
        if rival is not None:
            facts["live_loss"] = (yield from measure(rival, t.held_out, max_tokens=budget)).loss
    else:
        losses = yield from desk.call(_train_losses, desk)
        facts["train_loss_start"], facts["train_loss_end"] = start_and_end(losses)
    if t.regression is not None:
        other = rival if rival is not None else bare_base()
        facts["regression_loss"] = (yield from measure(t.final_adapter(), t.regression, max_tokens=budget)).loss
        facts["regression_live_loss"] = (yield from measure(other, t.regression, max_tokens=budget)).loss
    facts |= yield from _eos_rates(desk, t, packed)
    publish = job.spec.publish
    verdict = judge(GateFacts(**facts), min_improvement=publish.min_improvement, hold=publish.hold)
    return packed, verdict


def publish_adapter(desk: Desk, t: Trainee, packed: PackedAdapter, verdict: Verdict) -> Steps[None]:
    """Blobs and manifest, then the alias if the gate lets it, then `succeeded`. The job's state is durable already."""
    job, output, alias = desk.job, desk.room.output, desk.job.spec.publish.alias
    yield from desk.call(desk.queue.begin_publish, desk.claim)
    manifest = yield from desk.call(output.publish, job, packed, alias=None)
    try:
        yield from desk.call(desk.queue.check, desk.claim)
    except StaleFence:
        if (yield from desk.call(_is_over_without_version, desk)):
            yield from desk.call(output.retract, manifest)
        raise
    if verdict.passed:
        manifest = yield from desk.call(output.publish, job, packed, alias=alias)
    yield from desk.call(output.warm, output.published(packed, manifest), with_files=True)
    result_file = yield from desk.call(write_result_file, desk.room.fine_tuning, job, desk.scratch)
    done = Succeeded(
        adapter_version=manifest.version,
        trained_tokens=t.progress.trained_tokens,
        total_tokens=t.progress.total_tokens,
        result_file=result_file,
        gate=verdict.to_dict(),
    )
    yield from desk.call(desk.queue.succeed, desk.claim, done)
    logger.info("job succeeded", extra={"action": "job_succeeded", "job": job.id, "adapter": manifest.label})


def _eos_rates(desk: Desk, t: Trainee, packed: PackedAdapter) -> Steps[dict[str, float | None]]:
    """How often greedy answers end by themselves; the base is asked only where the adapter's never do."""
    sampler, tenant = desk.room.sampler, desk.job.tenant
    shown = t.held_out.examples if t.held_out is not None else t.examples
    prompts, max_tokens = sample_prompts(shown, max_context=desk.room.base.shapes.max_context)
    answers = yield from wait(sampler.start(tenant, packed.manifest, prompts, max_tokens=max_tokens))
    rates = {"eos_rate": eos_rate(answers), "base_eos_rate": None}
    if rates["eos_rate"] == 0:
        answers = yield from wait(sampler.start(tenant, None, prompts, max_tokens=max_tokens))
        rates["base_eos_rate"] = eos_rate(answers)
    return rates


def _train_losses(desk: Desk) -> list[float]:
    metrics = desk.room.fine_tuning.jobs.metrics(desk.job.id)
    return [values["train_loss"] for _, values in metrics if "train_loss" in values]


def _is_over_without_version(desk: Desk) -> bool:
    """Another worker took the job over and it failed there: nobody would ever speak of this version."""
    job = desk.room.fine_tuning.jobs.get(desk.job.tenant, desk.job.id)
    return job.status.is_over and job.adapter_version is None
