"""The body of a create call: OpenAI's fields and ours, checked for types and ranges, turned into a `JobRequest`.

What needs files, adapters or the base to be judged is judged by `app.training.fine_tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from app.api.schemas import Body, StoredBody
from app.errors import RequestInvalid, UnsupportedParameter
from app.training.dataset_rows import Method
from app.training.fine_tuning import JobRequest
from app.training.spec import Hyperparameters, LoraOptions, PublishOptions, TrainingOptions

MAX_METADATA_PAIRS = 16

# "auto" is None from here on.
Auto = BeforeValidator(lambda value: None if value == "auto" else value)
FileId = Annotated[str, Field(min_length=1, max_length=64)]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class HyperparametersBody(Body):
    n_epochs: Annotated[Annotated[int, Field(ge=1, le=50)] | None, Auto] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=256)] | None, Auto] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0, le=1000)] | None, Auto] = None


class DpoHyperparametersBody(HyperparametersBody):
    beta: Annotated[Annotated[float, Field(gt=0, le=2)] | None, Auto] = None


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class DpoBody(Body):
    hyperparameters: DpoHyperparametersBody | None = None


class MethodBody(Body):
    type: Annotated[str, Field(max_length=64)]
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: Any = None


class LoraBody(Body):
    rank: Annotated[Annotated[int, Field(ge=1, le=1024)] | None, Auto] = None
    alpha: Annotated[Annotated[float, Field(gt=0, le=1e6)] | None, Auto] = None
    dropout: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Auto] = None
    target_modules: Any = None
    init: Literal["default", "gaussian", "orthogonal", "eva"] = "default"
    use_rslora: bool = False

    def targets(self) -> tuple[str, ...] | None:
        """Names of linears; None is all of them."""
        value = self.target_modules
        if value is None or value == "all-linear":
            return None
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            message = "'lora.target_modules' is \"all-linear\" or a list of names."
            raise RequestInvalid(message, param="lora.target_modules")
        return tuple(dict.fromkeys(value))


class EarlyStopBody(Body):
    patience: Annotated[int, Field(ge=0, le=50)] = 2


class TrainingBody(Body):
    max_seq_length: Annotated[int, Field(ge=8)] | None = None
    on_long: Literal["error", "truncate_left", "drop"] = "error"
    train_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    eval_every: Annotated[int, Field(ge=1)] | None = None
    early_stop: EarlyStopBody = EarlyStopBody()
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    allow_duplicate: bool = False


class GateBody(Body):
    min_improvement: Annotated[float, Field(ge=-1, le=1)] = 0.01
    regression_file: FileId | None = None
    hold: bool = False


class PublishBody(Body):
    name: Annotated[str, Field(max_length=127)] | None = None
    alias: Annotated[str, Field(max_length=31)] = "live"
    gate: GateBody = GateBody()


class CreateJobBody(StoredBody):
    """POST /v1/fine_tuning/jobs and /v1/fine_tuning/preflight."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: list[Any] | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA_PAIRS)
    lora: LoraBody = LoraBody()
    training: TrainingBody = TrainingBody()
    publish: PublishBody = PublishBody()

    def request(self, *, idempotency_key: str | None, is_retry: bool) -> JobRequest:
        """Raises RequestInvalid, UnsupportedParameter."""
        if self.integrations:
            raise UnsupportedParameter("Nothing is sent to other services from here.", param="integrations")
        method, hyper = self._method()
        training, gate = self.training, self.publish.gate
        options = training.model_dump(exclude={"early_stop"})
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            asked=self._asked(),
            validation_file=self.validation_file,
            regression_file=gate.regression_file,
            method=method,
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=hyper,
            lora=LoraOptions(**{**self.lora.model_dump(), "target_modules": self.lora.targets()}),
            training=TrainingOptions(**options, early_stop_patience=training.early_stop.patience),
            publish=PublishOptions(
                name=self.publish.name,
                alias=self.publish.alias,
                min_improvement=gate.min_improvement,
                hold=gate.hold,
            ),
            metadata=self.metadata,
            idempotency_key=idempotency_key,
            is_retry=is_retry,
        )

    def _asked(self) -> Mapping[str, Any]:
        """The body in one spelling, so that two calls can be compared."""
        asked: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        return asked

    def _method(self) -> tuple[Method, Hyperparameters]:
        """The method and its hyperparameters; the deprecated top-level ones count where the method names none."""
        asked = self.method or MethodBody(type="supervised")
        try:
            method = Method(asked.type)
        except ValueError:
            message = f"The method '{asked.type}' is not trained here; supervised and dpo are."
            raise RequestInvalid(message, param="method.type", code="unsupported_method") from None
        for name in ("supervised", "dpo", "reinforcement"):
            if name != method.value and getattr(asked, name) is not None:
                raise RequestInvalid(f"'method.{name}' does not belong to '{method}'.", param=f"method.{name}")
        own = asked.supervised if method is Method.SUPERVISED else asked.dpo
        hyper = own.hyperparameters if own is not None and own.hyperparameters is not None else self.hyperparameters
        return method, Hyperparameters(**hyper.model_dump()) if hyper is not None else Hyperparameters()
