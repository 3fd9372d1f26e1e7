"""What a tenant asked for (`JobSpec`), frozen and stored with the job. None stands for "auto". No HTTP, SQL or torch.

Values were checked at the API's edge; `app.training.config` turns a spec and the data's counts into numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from app.training.dataset_rows import Method

OnLong: TypeAlias = Literal["error", "truncate_left", "drop"]
TrainOn: TypeAlias = Literal["all_assistant", "last_assistant"]
Schedule: TypeAlias = Literal["linear", "cosine", "constant"]
OptimizerKind: TypeAlias = Literal["adamw", "adamw_8bit"]
Init: TypeAlias = Literal["default", "gaussian", "orthogonal", "eva"]


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file by its content: the job keeps it although the tenant may delete the file."""

    id: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """OpenAI's own fields."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    beta: float | None = None  # dpo only


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The shape of the adapter."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None  # last parts of module paths; None is every linear
    init: Init = "default"
    use_rslora: bool = False


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the steps are run."""

    max_seq_length: int | None = None  # tokens
    on_long: OnLong = "error"
    train_on: TrainOn = "all_assistant"
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.03  # of all steps, at least one
    max_grad_norm: float | None = None
    optimizer: OptimizerKind = "adamw"
    eval_every: int | None = None  # steps; None is at the end of each epoch
    early_stop_patience: int = 2  # epochs without a better validation loss; 0 never stops early
    max_steps: int | None = None
    priority: int = 0  # among the tenant's own jobs; higher goes first
    allow_duplicate: bool = False


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """Where the adapter goes, and what it must show before the alias moves to it."""

    name: str | None = None  # None: an adapter of the job's own
    alias: str = "live"
    min_improvement: float = 0.01  # held-out loss at least this share below the base's
    regression_file: PinnedFile | None = None
    hold: bool = False  # publish the version, leave the alias


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job as asked for. `model` is the name as the client wrote it; `parent` the adapter version it stands for."""

    model: str
    training_file: PinnedFile
    validation_file: PinnedFile | None = None
    method: Method = Method.SUPERVISED
    seed: int = 0
    suffix: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    publish: PublishOptions = field(default_factory=PublishOptions)
    parent: Mapping[str, Any] | None = None  # an AdapterManifest's fields when the job continues from an adapter

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """Every file that the job reads, the training file first."""
        named = (self.training_file, self.validation_file, self.publish.regression_file)
        return tuple(file for file in named if file is not None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> JobSpec:
        lora, publish = dict(body["lora"]), dict(body["publish"])
        lora["target_modules"] = _tuple(lora["target_modules"])
        publish["regression_file"] = _pinned(publish["regression_file"])
        nested = {
            "training_file": PinnedFile(**body["training_file"]),
            "validation_file": _pinned(body["validation_file"]),
            "method": Method(body["method"]),
            "hyperparameters": Hyperparameters(**body["hyperparameters"]),
            "lora": LoraOptions(**lora),
            "training": TrainingOptions(**body["training"]),
            "publish": PublishOptions(**publish),
        }
        return cls(**{**body, **nested})


def _pinned(value: Mapping[str, Any] | None) -> PinnedFile | None:
    return None if value is None else PinnedFile(**value)


def _tuple(value: list[str] | tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)
