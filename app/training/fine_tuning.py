"""The fine-tuning service: a request becomes a checked spec, a spec a job, a job's files a `TrainingSet`. No torch.

Everything here blocks; thread-safe.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.manifest import AdapterManifest, is_adapter_name, is_alias
from app.errors import RequestInvalid, ServerBusy
from app.training.config import (
    ALPHA,
    CostEstimate,
    TrainableBase,
    TrainingConfig,
    estimate,
    possible_ranks,
    prepare_options,
    resolve,
)
from app.training.dataset import DatasetLimits
from app.training.dataset_rows import Method
from app.training.examples import Examples
from app.training.faults import FAULTS, lasting_error
from app.training.files import TRAINING_PURPOSE, FileStore
from app.training.fitting import TrainingRenderer
from app.training.heartbeat import Heartbeat
from app.training.job import Job, JobError, StaleFence
from app.training.jobs import JobStore, NewJob
from app.training.prepare import DataRefused, TrainingSet, prepare, read_examples
from app.training.spec import Hyperparameters, JobSpec, LoraOptions, PinnedFile, PublishOptions, TrainingOptions
from app.training.work_queue import ClaimedJob, WorkQueue

logger = logging.getLogger(__name__)

ResolveModel = Callable[[str, str], AdapterManifest | None]  # tenant, model -> its adapter, None for the base


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A create call as checked by the API for types and ranges; files are still ids. `asked` is the body as it came."""

    model: str
    training_file: str
    asked: Mapping[str, Any]
    validation_file: str | None = None
    regression_file: str | None = None
    method: Method = Method.SUPERVISED
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    publish: PublishOptions = field(default_factory=PublishOptions)
    metadata: Mapping[str, str] | None = None
    idempotency_key: str | None = None
    is_retry: bool = False


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a job would do. `error` is what it would fail with; then there is no config and no cost."""

    report: Mapping[str, Any]
    config: TrainingConfig | None
    cost: CostEstimate | None
    error: JobError | None


class FineTuning:
    """Creates, checks and prepares jobs."""

    def __init__(
        self,
        jobs: JobStore,
        queue: WorkQueue,
        files: FileStore,
        *,
        base: TrainableBase,
        renderer: TrainingRenderer,
        resolve_model: ResolveModel,
        scratch: Path,
        data_limits: DatasetLimits = DatasetLimits(),  # noqa: B008 - frozen
        lease_s: float = 30.0,
    ) -> None:
        self.jobs, self.queue, self.files = jobs, queue, files
        self.base, self._renderer, self._resolve_model = base, renderer, resolve_model
        self._scratch, self._data_limits, self._lease_s = scratch, data_limits, lease_s

    # ---- from request to job

    def create(
        self,
        tenant: str,
        request: JobRequest,
        *,
        max_active: int | None = None,
        max_tokens_per_day: int | None = None,
    ) -> Job:
        """Make a job, or find the one that the same call made. Raises RequestInvalid, ModelNotFound, RateLimited."""
        if request.idempotency_key is not None:
            known = self.jobs.replayed(tenant, request.idempotency_key, request.asked)
            if known is not None:
                return known
        new = NewJob(
            spec=self.spec_of(tenant, request),
            asked=request.asked,
            metadata=request.metadata,
            idempotency_key=request.idempotency_key,
            is_retry=request.is_retry,
            base_digest=self.base.spec.digest,
        )
        return self.jobs.create(tenant, new, max_active=max_active, max_tokens_per_day=max_tokens_per_day)

    def spec_of(self, tenant: str, request: JobRequest) -> JobSpec:
        """Check everything that can be checked without reading the files."""
        parent = self._resolve_model(tenant, request.model)
        self._check_lora(request.lora, parent)
        length = request.training.max_seq_length
        if length is not None and length > self.base.max_context:
            message = f"'training.max_seq_length' is at most {self.base.max_context}, the model's context."
            raise RequestInvalid(message, param="training.max_seq_length")
        if request.validation_file == request.training_file:
            raise RequestInvalid("The validation file is the training file.", param="validation_file")
        regression = self._pinned(tenant, request.regression_file, "publish.gate.regression_file")
        publish = replace(self._checked_publish(tenant, request.publish), regression_file=regression)
        training_file = self._pinned(tenant, request.training_file, "training_file")
        assert training_file is not None
        return JobSpec(
            model=request.model,
            training_file=training_file,
            validation_file=self._pinned(tenant, request.validation_file, "validation_file"),
            method=request.method,
            seed=secrets.randbelow(1 << 31) if request.seed is None else request.seed,
            suffix=request.suffix,
            hyperparameters=request.hyperparameters,
            lora=request.lora,
            training=request.training,
            publish=publish,
            parent=None if parent is None else asdict(parent),
        )

    def _pinned(self, tenant: str, file_id: str | None, param: str) -> PinnedFile | None:
        if file_id is None:
            return None
        file = self.files.get(tenant, file_id, param=param)
        if file.purpose != TRAINING_PURPOSE:
            message = f"The file has the purpose '{file.purpose}', not '{TRAINING_PURPOSE}'."
            raise RequestInvalid(message, param=param)
        return file.pinned

    def _check_lora(self, lora: LoraOptions, parent: AdapterManifest | None) -> None:
        base = self.base
        if lora.rank is not None and lora.rank > base.max_rank:
            raise RequestInvalid(f"'lora.rank' is at most {base.max_rank} here.", param="lora.rank")
        if parent is not None and lora.rank not in (None, parent.rank):
            message = f"The adapter to continue from has rank {parent.rank}; leave 'lora.rank' out."
            raise RequestInvalid(message, param="lora.rank")
        unknown = sorted(set(lora.target_modules or ()) - base.spec.target_kinds)
        if unknown:
            known = ", ".join(sorted(base.spec.target_kinds))
            message = f"The base has no linear called '{unknown[0][:64]}'. It has {known}."
            raise RequestInvalid(message, param="lora.target_modules")
        inherited = parent.rank if parent is not None else None
        for rank in possible_ranks(inherited, lora.rank, base.max_rank):
            if lora.init == "orthogonal" and rank % 2:
                raise RequestInvalid(f"The orthogonal init needs an even rank, not {rank}.", param="lora.rank")
            if (lora.alpha or ALPHA) / (rank**0.5 if lora.use_rslora else rank) > base.max_scale:
                message = f"'lora.alpha' over the rank ({rank}) is at most {base.max_scale:g} here."
                raise RequestInvalid(message, param="lora.alpha")

    def _checked_publish(self, tenant: str, publish: PublishOptions) -> PublishOptions:
        name = publish.name
        if name is not None:
            owner, slash, rest = name.partition("/")
            if slash and owner != tenant:
                raise RequestInvalid("The tenant in 'publish.name' is not yours.", param="publish.name")
            name = rest if slash else owner
            if not is_adapter_name(name) or name == self.base.spec.id:
                message = "An adapter's name is 1 to 63 of a-z, 0-9, dot, dash and underscore, and not the base's."
                raise RequestInvalid(message, param="publish.name")
        if not is_alias(publish.alias):
            message = "An alias is 1 to 31 of a-z, 0-9 and dash, begins with a letter, and looks like no version."
            raise RequestInvalid(message, param="publish.alias")
        return replace(publish, name=name)

    # ---- from files to tokens

    def prepare(
        self, tenant: str, spec: JobSpec, *, on_progress: Callable[[int], None] = lambda rows: None
    ) -> TrainingSet:
        """Fetch, check and tokenize a job's files; the same on every machine and at every call.

        Raises DataRefused, StoreError, and whatever `on_progress` raises.
        """
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="dataset-") as name:
            directory = Path(name)  # may go at the end: the set is maps of files, which outlive their names
            train = self._fetched(tenant, spec.training_file, directory / "training_file")
            valid = self._fetched(tenant, spec.validation_file, directory / "validation_file")
            assert train is not None
            options = prepare_options(spec, self.base)
            return prepare(
                train,
                valid,
                options,
                self._renderer,
                scratch=directory,
                limits=self._data_limits,
                on_progress=on_progress,
            )

    def prepare_regression(self, tenant: str, spec: JobSpec) -> Examples | None:
        """The gate's regression file, tokenized as the training file is, or None. Raises as `prepare`."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="dataset-") as name:
            directory = Path(name)
            path = self._fetched(tenant, spec.publish.regression_file, directory / "regression_file")
            if path is None:
                return None
            options = prepare_options(spec, self.base)
            limits = replace(self._data_limits, min_examples=1)
            return read_examples(path, options, self._renderer, scratch=directory, limits=limits)

    def _fetched(self, tenant: str, file: PinnedFile | None, path: Path) -> Path | None:
        if file is None:
            return None
        self.files.fetch(tenant, file, path)
        return path

    def config_of(self, spec: JobSpec, training: TrainingSet) -> TrainingConfig:
        return resolve(spec, len(training.train), self.base)

    def cost_of(self, config: TrainingConfig, training: TrainingSet) -> CostEstimate:
        return estimate(
            config,
            self.base,
            num_examples=len(training.train),
            epoch_tokens=int(training.train.num_tokens.sum()),
            longest_tokens=training.train.max_sequence_tokens,
            tokens_per_s=self.jobs.speed_tokens_per_s(),
        )

    def preflight(self, tenant: str, request: JobRequest) -> Preflight:
        """Do all that `validating_files` does and make no job. Takes as long as reading the files."""
        spec = self.spec_of(tenant, request)
        try:
            training = self.prepare(tenant, spec)
        except DataRefused as refused:
            error = JobError(refused.code, str(refused), refused.param)
            return Preflight(refused.findings.to_dict(), None, None, error)
        config = self.config_of(spec, training)
        return Preflight(training.report.to_dict(), config, self.cost_of(config, training), None)

    # ---- validating jobs

    def validate_next(self, worker: str) -> bool:
        """Validate one waiting job's files and queue it, or fail it with what is wrong. False: nothing to do now."""
        claim = self.queue.claim_validation(worker)
        if claim is None:
            return False
        try:
            with Heartbeat(self.queue, claim, lease_s=self._lease_s) as heart:
                self._validate(claim, heart)
        except StaleFence:
            logger.info("validation dropped", extra={"action": "validation_dropped", "job": claim.id})
        except FAULTS as exc:
            error = lasting_error(exc, claim.id)
            if error is not None:
                with suppress(StaleFence, ServerBusy):
                    self.queue.fail(claim, error)
                return True
            logger.warning("validation put off", extra={"action": "validation_put_off", "job": claim.id}, exc_info=exc)
            with suppress(StaleFence, ServerBusy):
                self.queue.release(claim)
            return False
        except Exception as exc:
            logger.exception("validation failed", extra={"action": "validation_failed", "job": claim.id})
            message = f"Validating the files failed inside the server ({type(exc).__name__}). Quote {claim.id}."
            with suppress(StaleFence):
                self.queue.fail(claim, JobError("server_error", message))
        return True

    def _validate(self, claim: ClaimedJob, heart: Heartbeat) -> None:
        job = claim.job
        try:
            training = self.prepare(job.tenant, job.spec, on_progress=lambda rows: heart.check())
            self._check_regression(job)
        except DataRefused as refused:
            error = JobError(refused.code, str(refused), refused.param)
            self.queue.fail(claim, error, data=refused.findings.to_dict())
            return
        config = self.config_of(job.spec, training)
        cost = self.cost_of(config, training)
        report = training.report.to_dict() | {"estimate": asdict(cost)}
        self.queue.validated(claim, config, report, cost.tokens)

    def _check_regression(self, job: Job) -> None:
        """The gate's file is found bad now, not after the training."""
        self.prepare_regression(job.tenant, job.spec)
