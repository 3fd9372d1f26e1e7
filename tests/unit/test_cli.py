"""The command line, run as its users run it: in process for speed, as a process where that is the point."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from app.__main__ import build_app, main
from app.cli.demo import curl_line
from app.database import migrate, open_database
from app.engine import base_spec
from app.engine.base_files import source_fingerprint
from app.tenants import Caller, Tenants
from tests.adapter_files import config_bytes, plain_tensors, safetensors_bytes, tiny_base


class Run:
    """What one command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]


Cli = Callable[..., Run]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `lodger ARGS` with a data directory of its own and no other setting."""
    for name in list(os.environ):
        if name.upper().startswith("LODGER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LODGER_DATA_DIR", str(tmp_path))

    def run(*args: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["lodger", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Run(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    engine = open_database(f"sqlite:///{tmp_path / 'lodger.db'}")
    migrate(engine)
    return Tenants(engine)


def test_a_tenant_and_its_key_are_printed_alone_on_the_last_line(cli: Cli, tenants: Tenants) -> None:
    assert cli("tenants", "create", "acme").out == "acme\n"
    created = cli("keys", "create", "acme")
    assert re.fullmatch(r"lk_[a-z0-9]{12}_[0-9A-Za-z]{43}\n", created.out)
    assert tenants.authenticate(created.last_line).tenant == "acme"


def test_creating_a_tenant_twice_is_refused_unless_asked_for(cli: Cli) -> None:
    cli("tenants", "create", "acme")
    again = cli("tenants", "create", "acme")
    assert (again.code, again.out) == (1, "")
    assert "already" in again.err
    assert cli("tenants", "create", "acme", "--exist-ok").last_line == "acme"


def test_a_key_for_nobody_says_what_to_do(cli: Cli) -> None:
    refused = cli("keys", "create", "nobody")
    assert (refused.code, refused.out) == (1, "")
    assert "lodger tenants list" in refused.err


def test_a_service_key_takes_a_list_or_all(cli: Cli, tenants: Tenants) -> None:
    for name in ("a", "b", "c"):
        cli("tenants", "create", name)
    some = cli("keys", "create", "--service", "--tenants", "a, b").last_line
    everybody = cli("keys", "create", "gateway", "--service", "--all-tenants").last_line
    assert tenants.authenticate(some, "b").kind == "service"
    assert isinstance(tenants.authenticate(everybody, "c"), Caller)
    assert "gateway" in cli("keys", "list", "--tenant", "c").out
    for wrong in (["--service"], ["--service", "--tenants", "a", "--all-tenants"], ["a", "--tenants", "b"], []):
        assert cli("keys", "create", *wrong).code == 2


def test_a_revoked_key_stops(cli: Cli, tenants: Tenants) -> None:
    cli("tenants", "create", "acme")
    key = cli("keys", "create", "acme").last_line
    key_id = key.split("_")[1]
    assert cli("keys", "revoke", key_id).last_line == key_id
    assert "revoked" in cli("keys", "list").out
    assert key not in cli("keys", "list").out
    with pytest.raises(Exception, match="revoked"):
        tenants.authenticate(key)
    assert cli("keys", "revoke", "nobody").code == 1


@pytest.mark.parametrize("when", ["30d", "1s", "2999-01-01", "2999-01-01T12:00:00+02:00"])
def test_keys_expire_when_told(cli: Cli, tenants: Tenants, when: str) -> None:
    cli("tenants", "create", "acme")
    assert cli("keys", "create", "acme", "--expires", when).code == 0
    assert tenants.list_keys()[0].expires_at is not None


def test_an_expiry_that_is_none_is_a_usage_error(cli: Cli) -> None:
    cli("tenants", "create", "acme")
    assert cli("keys", "create", "acme", "--expires", "soon").code == 2
    assert cli("keys", "create", "acme", "--expires", "2001-01-01").code == 1


def test_limits_are_set_shown_and_given_back(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODGER_TENANT_MAX_RUNNING", "4")
    cli("tenants", "create", "acme")
    shown = cli("tenants", "limits", "acme", "--requests-per-minute", "60").out
    assert re.search(r"^requests_per_minute +60 +60$", shown, re.M)
    assert re.search(r"^max_running +- +4$", shown, re.M)
    shown = cli("tenants", "limits", "acme", "--requests-per-minute", "default", "--max-running", "2").out
    assert re.search(r"^requests_per_minute +- +none$", shown, re.M)
    assert re.search(r"^max_running +2 +2$", shown, re.M)
    assert cli("tenants", "limits", "acme", "--max-running", "many").code == 2


def test_deleting_a_tenant_erases_it(cli: Cli, tmp_path: Path) -> None:
    cli("tenants", "create", "acme")
    cli("tenants", "create", "acme-corp")
    for name in ("acme", "acme-corp"):
        directory = tmp_path / "store" / "tenants" / name / "adapters" / "support"
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
    assert cli("tenants", "delete", "acme").code == 1  # nobody there to say yes
    assert cli("tenants", "delete", "acme", "--yes").last_line == "acme"
    kept = [str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("adapter_config.json")]
    assert kept == ["tenants/acme-corp/adapters/support/adapter_config.json"]
    assert cli("tenants", "create", "acme").code == 1
    assert re.findall(r"^acme\S*", cli("tenants", "list").out, re.M) == ["acme-corp"]


def test_settings_are_printed_with_their_sources_and_without_secrets(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODGER_ADMIN_KEY", "0123456789abcdef-secret")
    shown = cli("config", "print", "--port", "81").out
    assert "secret" not in shown
    assert re.search(r"^port +81 +--port$", shown, re.M)
    assert re.search(r"^admin_key +\*{8} +LODGER_ADMIN_KEY$", shown, re.M)
    assert re.search(r"^max_rank +64 +default$", shown, re.M)


def test_wrong_settings_end_with_78_and_wrong_usage_with_2(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("tenants", "create").code == 2
    assert cli("no-such-command").code == 2
    assert cli("serve", "--no-such-flag", "1").code == 2
    assert cli("config", "print", "--port", "many").code == 78
    open_to_all = cli("serve", "--host", "0.0.0.0")
    assert open_to_all.code == 78
    assert "LODGER_ADMIN_KEY" in open_to_all.err
    monkeypatch.setenv("LODGER_POOL_RANKS", "1")
    unknown = cli("keys", "list")
    assert unknown.code == 78
    assert "did you mean LODGER_POOL_RANK?" in unknown.err


def test_a_database_that_cannot_be_opened_is_named_without_its_password(cli: Cli) -> None:
    refused = cli("tenants", "list", "--database-url", "postgresql://u:s3cret@127.0.0.1:1/x")
    assert refused.code == 78
    assert "127.0.0.1" in refused.err
    assert "s3cret" not in refused.err


def test_every_setting_is_a_flag_of_serve(cli: Cli) -> None:
    from app.settings_sources import FIELDS, flag_of, variable_of

    text = " ".join(cli("serve", "--help").out.split())
    for name in FIELDS:
        assert flag_of(name) in text
        assert variable_of(name) in text


@pytest.fixture
def peft_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of the tiny base, which stands in for what loading the model once would have said of it."""
    (tmp_path / "tiny").mkdir()
    kept = tmp_path / "base" / "tiny-llama" / f"digest-nf4-{source_fingerprint(tmp_path / 'tiny')}.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text(tiny_base().digest)
    monkeypatch.setenv("LODGER_BASE_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("LODGER_BASE_NAME", "tiny-llama")
    monkeypatch.setattr(base_spec, "_read_linears", lambda _: dict(tiny_base().linears))
    directory = tmp_path / "trained"
    directory.mkdir()
    (directory / CONFIG_FILE).write_bytes(config_bytes())
    (directory / WEIGHTS_FILE).write_bytes(safetensors_bytes(plain_tensors()))
    return directory


def test_an_adapter_is_checked_pushed_listed_rolled_back_and_exported_without_a_server(
    cli: Cli, peft_directory: Path, tmp_path: Path
) -> None:
    cli("tenants", "create", "acme")
    assert cli("adapters", "check", str(peft_directory)).out.startswith("accepted: rank ")
    push = ["adapters", "push", str(peft_directory), "acme", "support"]
    assert cli(*push).last_line == "support@v1"
    assert cli(*push).last_line == "support@v2"
    assert re.search(r"^support +2 +live -> v2 ", cli("adapters", "list", "acme").out, re.M)
    assert cli("adapters", "list", "acme", "support").out.count("upload") == 2
    assert re.search(r"^live +v1$", cli("adapters", "alias", "acme", "support", "live", "v1").out, re.M)
    assert re.search(r"^live +v2$", cli("adapters", "alias", "acme", "support", "--roll-back").out, re.M)
    out = tmp_path / "out"
    assert cli("adapters", "export", "acme", "support@v1", str(out)).last_line == str(out)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (out / WEIGHTS_FILE).read_bytes() == (peft_directory / WEIGHTS_FILE).read_bytes()
    assert cli("adapters", "export", "acme", "support", str(out)).code == 2  # not empty
    assert cli("adapters", "push", str(peft_directory), "nobody", "support").code == 1


def test_a_refused_adapter_is_named_by_code_and_field(cli: Cli, peft_directory: Path) -> None:
    (peft_directory / CONFIG_FILE).write_bytes(config_bytes(use_dora=True))
    refused = cli("adapters", "check", str(peft_directory))
    assert refused.code == 1
    assert "adapter_config_value_unsupported" in refused.err
    assert "[use_dora]" in refused.err


def test_the_curl_line_can_be_pasted(tmp_path: Path) -> None:
    """Run by a real shell, with a program called curl that shows what it was given."""
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    curl.chmod(0o755)
    line = curl_line("http://127.0.0.1:8000", "lk_a_b", "base-1")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = subprocess.run(["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, check=True).stdout
    assert "Authorization: Bearer lk_a_b\n" in words
    assert "http://127.0.0.1:8000/v1/chat/completions\n" in words
    assert '{"model": "base-1", "messages": [{"role": "user",' in words


def test_the_program_starts_without_anything_heavy() -> None:
    heavy = ["torch", "transformers", "fastapi", "sqlalchemy", "boto3", "numpy"]
    code = f"import sys, app.__main__ as m; m.build_app(); print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[]"


def test_python_dash_m_is_the_same_program() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "app", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.startswith("lodger ")


def test_training_is_switched_by_either_flag(cli: Cli) -> None:
    for flag in ("--train", "--training"):
        assert "'auto' or 'off'" in cli("serve", flag, "nonsense").err


def test_no_flag_of_a_command_means_two_things() -> None:
    commands: list[Any] = [typer.main.get_command(build_app())]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        flags = Counter(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts))
        assert not [flag for flag, count in flags.items() if count > 1], command.name
