"""Jobs, events and checkpoints as OpenAI's client reads them, with our own fields beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from app.api.training_services import seconds
from app.training.dataset_rows import Method
from app.training.fine_tuning import Preflight
from app.training.job import Checkpoint, Job, JobEvent, JobStatus


def job_object(job: Job, queue_position: int | None = None) -> dict[str, Any]:
    """Every key is always there. "auto" is shown until the files are validated, the numbers after that."""
    spec = job.spec
    hyper = _hyperparameters(job)
    own = {name: value for name, value in hyper.items() if name != "beta" or spec.method is Method.DPO}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": seconds(job.created_at),
        "finished_at": seconds(job.finished_at),
        "model": spec.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.status.value,
        "training_file": spec.training_file.id,
        "validation_file": None if spec.validation_file is None else spec.validation_file.id,
        "hyperparameters": {name: value for name, value in hyper.items() if name != "beta"},
        "method": {"type": spec.method.value, spec.method.value: {"hyperparameters": own}},
        "seed": spec.seed,
        "trained_tokens": job.trained_tokens,
        "result_files": [] if job.result_file is None else [job.result_file],
        "error": asdict(job.error) if job.error is not None and job.status is JobStatus.FAILED else None,
        "estimated_finish": seconds(job.estimated_finish),
        "integrations": [],
        "metadata": None if job.metadata is None else dict(job.metadata),
        "user_provided_suffix": spec.suffix,
        "lora": _lora(job),
        "training": _training(job, queue_position),
        "publish": _publish(job),
    }


def _hyperparameters(job: Job) -> dict[str, Any]:
    source = job.config if job.config is not None else job.spec.hyperparameters
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
    return {name: _auto(getattr(source, name)) for name in names}


def _lora(job: Job) -> dict[str, Any]:
    source = job.config if job.config is not None else job.spec.lora
    targets = source.target_modules
    return {
        "rank": _auto(source.rank),
        "alpha": _auto(source.alpha),
        "dropout": _auto(source.dropout),
        "target_modules": "all-linear" if targets is None else list(targets),
        "init": source.init,
        "use_rslora": source.use_rslora,
    }


def _training(job: Job, queue_position: int | None) -> dict[str, Any]:
    asked, config = job.spec.training, job.config
    return {
        "max_seq_length": config.max_seq_length if config is not None else asked.max_seq_length,
        "on_long": asked.on_long,
        "train_on": asked.train_on,
        "schedule": asked.schedule,
        "warmup_ratio": asked.warmup_ratio,
        "max_grad_norm": config.max_grad_norm if config is not None else asked.max_grad_norm,
        "optimizer": asked.optimizer,
        "learning_rate": config.learning_rate if config is not None else None,
        "eval_every": asked.eval_every,
        "early_stop": {"patience": asked.early_stop_patience},
        "max_steps": asked.max_steps,
        "priority": asked.priority,
        "allow_duplicate": asked.allow_duplicate,
        "queue_position": queue_position,
        "step": job.step,
        "total_steps": job.total_steps,
        "total_tokens": job.total_tokens,
        "report": None if job.report is None else dict(job.report),
    }


def _publish(job: Job) -> dict[str, Any]:
    asked = job.spec.publish
    regression = asked.regression_file
    gate = {
        "min_improvement": asked.min_improvement,
        "regression_file": None if regression is None else regression.id,
        "hold": asked.hold,
        "result": None if job.gate is None else dict(job.gate),
    }
    return {"name": job.adapter_name, "alias": asked.alias, "version": job.adapter_version, "gate": gate}


def _auto(value: Any) -> Any:
    return "auto" if value is None else value


def event_object(event: JobEvent) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": seconds(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": None if event.data is None else dict(event.data),
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": seconds(checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
    }


def preflight_object(preflight: Preflight) -> dict[str, Any]:
    """What a job would do; `error` is what it would fail with."""
    config, cost = preflight.config, preflight.cost
    shown: Mapping[str, Any] | None = None if config is None else {**config.to_dict(), "method": config.method.value}
    return {
        "object": "fine_tuning.preflight",
        "valid": preflight.error is None,
        "error": None if preflight.error is None else asdict(preflight.error),
        "report": dict(preflight.report),
        "config": shown,
        "estimate": None if cost is None else asdict(cost),
    }
