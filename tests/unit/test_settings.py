from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from app import machine
from app.settings import FileLocation, S3Location, Settings, parse_store
from app.settings_sources import FIELDS, ConfigurationError, load_settings, mask_password, shown_value, variable_of


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("LODGER_"):
            monkeypatch.delenv(name)


def _faults(**flags: object) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(flags)
    return caught.value.faults


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lodger.toml"
    file.write_text("port = 1\nloader_workers = 2\nmax_waiting = 3\n")
    monkeypatch.setenv("LODGER_PORT", "10")
    monkeypatch.setenv("LODGER_LOADER_WORKERS", "20")
    loaded = load_settings({"config": str(file), "port": "100"})
    names = ("port", "loader_workers", "max_waiting", "block_size")
    assert [getattr(loaded.settings, name) for name in names] == [100, 20, 3, 16]
    assert [loaded.sources[name] for name in names] == ["--port", "LODGER_LOADER_WORKERS", str(file), "default"]


def test_the_variable_names_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lodger.toml"
    file.write_text("port = 1234\n")
    monkeypatch.setenv("LODGER_CONFIG", str(file))
    assert load_settings().settings.port == 1234


def test_an_unknown_variable_is_named_with_the_nearest_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODGER_POOL_RANKS", "8")
    monkeypatch.setenv("LODGER_NONSENSE_XYZ", "8")
    faults = sorted(_faults())
    assert faults == [
        "unknown variable: LODGER_NONSENSE_XYZ",
        "unknown variable: LODGER_POOL_RANKS; did you mean LODGER_POOL_RANK?",
    ]


def test_an_unknown_line_of_the_file_is_named_with_the_nearest_known(tmp_path: Path) -> None:
    file = tmp_path / "lodger.toml"
    file.write_text("hots = '127.0.0.1'\n")
    assert _faults(config=str(file)) == (f"unknown line in {file}: hots; did you mean host?",)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert "cannot read" in _faults(config=str(tmp_path / "absent.toml"))[0]
    (tmp_path / "broken.toml").write_text("port = = 1")
    assert "is no TOML" in _faults(config=str(tmp_path / "broken.toml"))[0]


def test_a_variable_of_a_kubernetes_service_says_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODGER_PORT", "tcp://10.0.0.7:8000")
    assert "enableServiceLinks" in _faults()[0]
    monkeypatch.delenv("LODGER_PORT")
    monkeypatch.setenv("LODGER_PORT_8000_TCP", "tcp://10.0.0.7:8000")
    assert "enableServiceLinks" in _faults()[0]


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODGER_ADMIN_KEY", "")
    monkeypatch.setenv("LODGER_PORT", "")
    assert load_settings().settings.admin_key is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"pool_rank": "8", "max_rank": "16"}, ["LODGER_POOL_RANK (8)", "LODGER_MAX_RANK (16)"]),
        ({"max_batch_tokens": "4", "max_sequences": "8"}, ["LODGER_MAX_BATCH_TOKENS", "LODGER_MAX_SEQUENCES"]),
        ({"admin_port": "8000"}, ["LODGER_ADMIN_PORT", "LODGER_PORT"]),
        ({"s3_object_timeout_s": "1"}, ["LODGER_S3_OBJECT_TIMEOUT_S", "LODGER_S3_READ_TIMEOUT_S"]),
        ({"dead_engine_s": "30"}, ["LODGER_DEAD_ENGINE_S", "LODGER_STALE_ENGINE_S"]),
        ({"max_upload_bytes": "1MB"}, ["LODGER_MAX_UPLOAD_BYTES", "LODGER_MAX_FILE_BYTES"]),
    ],
)
def test_contradictions_name_both_settings(flags: dict[str, str], named: list[str]) -> None:
    (fault,) = _faults(**flags)
    assert all(name in fault for name in named)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("threads", "0"),
        ("dtype", "float16"),
        ("quantization", "int8"),
        ("device", "tpu"),
        ("store", "/data"),
        ("store", "s3:///prefix"),
        ("store", "file://host/data"),
        ("store", "s3://key:secret@bucket"),
        ("database_url", "mysql://localhost/x"),
        ("s3_endpoint_url", "localhost:9000"),
        ("host_cache_bytes", "-1"),
        ("request_timeout_s", "nan"),
        ("request_timeout_s", "inf"),
        ("base_name", "acme/base"),
        ("admin_key", "two words"),
        ("prefix_caching", "perhaps"),
    ],
)
def test_values_out_of_range_are_refused(flag: str, value: str) -> None:
    assert len(_faults(**{flag: value})) == 1


def test_a_refusal_never_repeats_a_secret() -> None:
    assert "hunter2" not in str(_faults(admin_key="hunter2 hunter2"))


def test_a_small_pool_lowers_the_default_rank() -> None:
    assert load_settings({"pool_rank": "32"}).settings.max_rank == 32
    assert load_settings({"pool_rank": "512"}).settings.max_rank == 64
    assert load_settings({"max_sequences": "1000"}).settings.max_batch_tokens == 1000


def test_store_and_database_lie_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({"data_dir": str(tmp_path / "with blank")}).settings
    assert settings.store_location == FileLocation(tmp_path / "with blank" / "store")
    assert settings.database_url == f"sqlite:///{tmp_path}/with blank/lodger.db"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_settings().settings.data_dir == tmp_path / "lodger"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings().settings.data_dir == tmp_path / ".local" / "share" / "lodger"


def test_a_relative_data_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"data_dir": "here"}).settings
    assert settings.data_dir == tmp_path / "here"
    assert settings.store_location == FileLocation(tmp_path / "here" / "store")


def test_stores_are_read() -> None:
    assert parse_store("s3://bucket/a/b/") == S3Location("bucket", "a/b")
    assert parse_store("s3://bucket") == S3Location("bucket", "")
    assert parse_store("file:///data/my%20store") == FileLocation(Path("/data/my store"))


def test_the_admin_routes_are_not_opened_to_others_without_a_good_key() -> None:
    def faults(**flags: str) -> list[str]:
        return load_settings(flags).settings.listening_faults()

    good = "0123456789abcdef0123"
    assert faults() == []
    assert faults(host="127.0.0.2") == faults(host="::1") == faults(host="localhost") == []
    assert "LODGER_ADMIN_KEY" in faults(host="0.0.0.0")[0]
    assert "characters" in faults(host="0.0.0.0", admin_key="short")[0]
    assert faults(host="0.0.0.0", admin_key=good) == []
    assert faults(host="0.0.0.0", admin_port="9000") == []
    assert "LODGER_ADMIN_HOST" in faults(host="0.0.0.0", admin_port="9000", admin_host="10.0.0.1")[0]
    assert faults(admin_port="9000", admin_host="::", admin_key=good) == []


def test_every_setting_says_what_it_is_and_carries_its_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description is not None, name
        assert field.description.endswith("."), name
        if "Bytes" in str(field.annotation) or "ByteSize" in str(field.annotation):
            assert name.endswith("_bytes"), name
        if field.annotation is float and re.search("time|silence|how long", field.description, re.I):
            assert name.endswith("_s") or name.endswith("_factor"), name


def test_the_settings_that_others_rely_on_are_there() -> None:
    relied_on = (
        "HOST PORT ADMIN_PORT BASE_NAME BASE_MODEL QUANTIZATION DTYPE DEVICE STORE S3_ENDPOINT_URL DATABASE_URL "
        "DATA_DIR ADMIN_KEY DISK_CACHE_BYTES HOST_CACHE_BYTES POOL_RANK MAX_RANK MAX_SEQUENCES THREADS"
    )
    assert {"LODGER_" + name for name in relied_on.split()} <= {variable_of(name) for name in FIELDS}


def test_the_served_name_follows_the_base() -> None:
    def base_id(**flags: str) -> str:
        return load_settings(flags).settings.base_id

    assert base_id() == "smollm2-135m-instruct"
    assert base_id(base_model="Org/Some-Model-1B") == "some-model-1b"
    assert base_id(base_model="/models/Llama/") == "llama"
    assert base_id(base_model="/models/Llama", base_name="ours") == "ours"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


def test_shown_values_hide_secrets() -> None:
    settings = load_settings(
        {"admin_key": "0123456789abcdef", "database_url": "postgresql://u:s3cret@db/x?password=s3cret&sslmode=require"}
    ).settings
    shown = " ".join(shown_value(settings, name) for name in FIELDS)
    assert "0123456789abcdef" not in shown
    assert "s3cret" not in shown
    assert "u:********@db/x" in shown
    assert "0123456789abcdef" not in repr(settings)
    assert mask_password("sqlite:////data/lodger.db") == "sqlite:////data/lodger.db"
    assert mask_password("postgresql://u:p@ss@db/x") == "postgresql://u:********@db/x"


def test_cores_follow_the_control_groups_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_QUOTA", quota)
    assert machine.available_cores() == 16
    for text, cores in (("max 100000", 16), ("250000 100000", 3), ("50000 100000", 1)):
        quota.write_text(text)
        assert machine.available_cores() == cores
