"""A fine-tuning job's nouns: statuses and the legal moves between them, the frozen `Job`, events, checkpoints.

validating_files -> queued -> running -> succeeded | failed          any that is not over -> cancelled
queued | running -> (pausing) -> paused -> queued                    a lost worker's job goes back to queued
"""

from __future__ import annotations

import enum
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import RequestInvalid
from app.training.config import TrainingConfig
from app.training.spec import JobSpec

ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class JobStatus(enum.StrEnum):
    """Where a job is in its life; `paused` and `pausing` are ours, the rest OpenAI's."""

    VALIDATING = "validating_files"  # its files are still to be read, or are being read
    QUEUED = "queued"  # waits for a worker
    RUNNING = "running"  # a worker trains it
    PAUSING = "pausing"  # to be paused once its worker has written a durable state
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return not TRANSITIONS[self]


_S = JobStatus
TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.PAUSING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    # A job may end, or be resumed, before its worker came to pausing it.
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


class JobNotFound(RequestInvalid):
    """There is no such fine-tuning job."""

    code = "not_found"


class InvalidJobState(RequestInvalid):
    """The job's present status does not allow this."""

    code = "invalid_job_state"


class StaleFence(Exception):
    """Another worker has this job now, or it was cancelled or erased. Drop it: nothing you write counts any more."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, as its owner sees it."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the database has it now. Times in Unix seconds."""

    seq: int
    id: str
    tenant: str
    status: JobStatus
    spec: JobSpec
    unique_id: str  # 8 characters; the last part of the model's name
    metadata: Mapping[str, str] | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    worker: str | None
    fence: int
    heartbeat: int
    config: TrainingConfig | None  # None until the files are validated
    report: Mapping[str, Any] | None  # the data's counts, likewise
    state: Mapping[str, Any] | None  # the trainer's last durable state
    step: int
    total_steps: int | None
    total_tokens: int | None  # of all steps run
    estimated_finish: float | None
    is_publishing: bool
    fine_tuned_model: str | None
    adapter_name: str
    adapter_version: int | None
    trained_tokens: int | None
    result_file: str | None
    gate: Mapping[str, Any] | None
    error: JobError | None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's story."""

    seq: int
    id: str
    created_at: float
    level: str  # "info", "warn" or "error"
    type: str  # "message" or "metrics"
    message: str
    data: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter as it was at a step; can be prompted by `name`. `manifest`: an AdapterManifest's fields."""

    seq: int
    id: str
    job_id: str
    step: int
    name: str
    created_at: float
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What was measured at a step; None was not. Losses are means over label tokens, accuracies shares of them."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The measured values; what is not finite has no place in JSON and is left out."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def sentence(self, total_steps: int) -> str:
        named = (
            ("training loss", self.train_loss),
            ("validation loss", self.valid_loss),
            ("full validation loss", self.full_valid_loss),
        )
        told = ", ".join(f"{name}={value:.2f}" for name, value in named if value is not None)
        return f"Step {self.step}/{total_steps}: {told}"


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A job's good end. `gate_passed` False: the version exists, the alias stayed, `gate["reason"]` says why."""

    adapter_version: int
    trained_tokens: int
    total_tokens: int
    result_file: str
    gate: Mapping[str, Any]  # {"passed": bool, "reason": str | None, and the losses compared}


def new_id(prefix: str) -> str:
    """`prefix` and 24 random characters."""
    return prefix + "".join(secrets.choice(ID_ALPHABET) for _ in range(24))


def new_unique_id() -> str:
    """The 8 characters at the end of a fine-tuned model's name."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(8))


def model_name(base_id: str, job: Job) -> str:
    """The immutable name of the job's adapter: `ft:<base>:<tenant>:<suffix or empty>:<8>`."""
    return f"ft:{base_id}:{job.tenant}:{job.spec.suffix or ''}:{job.unique_id}"
