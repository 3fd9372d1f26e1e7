"""/v1/adapters: upload, dry run, import, versions, aliases, roll back, warm, pin, delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from tests.adapter_files import config_bytes
from tests.api.serving import Serving, serve, weights_bytes


@pytest.fixture
def client(serving: Serving) -> Iterator[httpx.Client]:
    with serving.client() as client:
        yield client


def form(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """httpx arguments of an upload; a part set to None is left out."""
    parts: dict[str, Any] = {
        "name": (None, "support"),
        "adapter_config": (CONFIG_FILE, config_bytes()),
        "adapter_model": (WEIGHTS_FILE, weights_bytes(seed)),
    } | changes
    return {"files": {name: part for name, part in parts.items() if part is not None}}


def test_upload_becomes_a_version_that_answers(serving: Serving, client: httpx.Client) -> None:
    response = client.post("/v1/adapters", **form())
    body = response.json()
    assert response.status_code == 201, body
    assert (body["name"], body["version"], body["aliases"], body["rank"]) == ("support", 1, ["live"], 8)
    assert response.headers["x-lodger-adapter-digest"] == body["digest"]
    answer = client.post("/v1/completions", json={"model": "support", "prompt": "x"})
    assert answer.json()["model"] == "support@v1"
    assert answer.headers["x-lodger-adapter-digest"] == body["digest"]
    assert not list(serving.services.scratch.iterdir())


def test_repeated_upload_under_one_key_makes_one_version(serving: Serving, client: httpx.Client) -> None:
    key = {"Idempotency-Key": "upload-1"}
    first, second = (client.post("/v1/adapters", headers=key, **form()) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert second.headers["x-lodger-adapter-digest"] == first.headers["x-lodger-adapter-digest"]
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    assert len(client.get("/v1/adapters/support").json()["versions"]) == 1
    other = client.post("/v1/adapters", headers=key, **form(seed=1))
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    without = client.post("/v1/adapters", **form(seed=1))
    assert without.json()["version"] == 2


def test_refused_upload_leaves_its_key_free(client: httpx.Client) -> None:
    key = {"Idempotency-Key": "upload-2"}
    assert client.post("/v1/adapters", headers=key, **form(adapter_config=("c", b"{}"))).status_code == 400
    assert client.post("/v1/adapters", headers=key, **form()).status_code == 201


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9"])
def test_unusable_key_is_refused(client: httpx.Client, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = client.post("/v1/adapters", headers=headers, **form())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_repeated_import_under_one_key_is_answered_again(serving: Serving, client: httpx.Client) -> None:
    serving.services.idempotency.claim("acme", "import-1", "somebody's")
    ask = {"name": "support", "prefix": "adapters/support"}
    answer = client.post("/v1/adapters", headers={"Idempotency-Key": "import-1"}, json=ask)
    assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_order_of_the_parts_is_free(serving: Serving, client: httpx.Client) -> None:
    parts = form()["files"]
    response = client.post("/v1/adapters", files=dict(reversed(parts.items())))
    assert response.status_code == 201


def test_upload_may_name_another_alias(client: httpx.Client) -> None:
    client.post("/v1/adapters", **form())
    body = client.post("/v1/adapters", **form(seed=1, alias=(None, "canary"))).json()
    assert (body["version"], body["aliases"]) == (2, ["canary"])
    assert client.get("/v1/adapters/support").json()["aliases"] == {"canary": 2, "live": 1}


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"name": None}, 400, "invalid_value", "name"),
        ({"name": (None, "../x")}, 400, "adapter_name_invalid", "name"),
        ({"name": (None, "base")}, 400, "adapter_name_invalid", "name"),
        ({"name": (None, "tiny-llama")}, 400, "adapter_name_invalid", "name"),
        ({"name": (None, "x" * 5000)}, 400, "invalid_value", "name"),
        ({"alias": (None, "v3")}, 400, "invalid_value", "alias"),
        ({"adapter_config": None}, 400, "adapter_file_missing", "adapter_config"),
        ({"adapter_model": None}, 400, "adapter_file_missing", "adapter_model"),
        ({"adapter_config": ("c", b"{")}, 400, "adapter_config_invalid", None),
        ({"adapter_config": ("c", b" " * 70_000)}, 400, "adapter_config_too_large", "adapter_config"),
        ({"adapter_config": ("c", config_bytes(use_dora=True))}, 400, "adapter_config_value_unsupported", "use_dora"),
        ({"adapter_model": ("w", b"")}, 400, "adapter_truncated", None),
        ({"adapter_model": ("w", b"x" * (2 << 20))}, 413, "adapter_too_large", "adapter_model"),
        ({"extra": (None, "x")}, 400, "unknown_parameter", "extra"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_uploads_say_which_part_and_why(
    tmp_path: Path, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    with serve(tmp_path, limits={"max_adapter_bytes": 1 << 20}) as serving, serving.client() as client:
        for path in ("/v1/adapters", "/v1/adapters/validate"):
            response = client.post(path, **form(**changes))
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, code), error
            assert param is None or error["param"] == param
        assert client.get("/v1/adapters").json()["data"] == []
        assert not list(serving.services.scratch.iterdir())


def test_upload_above_the_cap_is_refused_while_it_arrives(tmp_path: Path) -> None:
    with serve(tmp_path, limits={"max_adapter_bytes": 1 << 20}) as serving, serving.client() as client:
        response = client.post("/v1/adapters", **form(adapter_model=("w", b"x" * (8 << 20))))
        assert response.status_code == 413
        assert not list(serving.services.scratch.iterdir())


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"garbage", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data; boundary=x"),
        (b"x", "multipart/form-data"),
        (b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\nsup', "multipart/form-data; boundary=x"),
        (b"--x\r\n" + b"a" * 20_000 + b": b\r\n\r\nx\r\n--x--", "multipart/form-data; boundary=x"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'{"name": "a"}', "application/json"),
        (b'{"name": "a", "prefix": "x", "url": "http://x"}', "application/json"),
        (b'{"name": "a", "prefix": "tenants/globex/adapters/a"}', "application/json"),
        (b'{"name": "a", "prefix": "http://evil"}', "application/json"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_registrations_are_400(client: httpx.Client, content: bytes, content_type: str) -> None:
    response = client.post("/v1/adapters", content=content, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_dry_run_reports_and_publishes_nothing(client: httpx.Client) -> None:
    body = client.post("/v1/adapters/validate", **form()).json()
    assert (body["valid"], body["rank"], body["applied_modules"]) == (True, 8, 4)
    assert len(body["digest"]) == 64
    assert client.get("/v1/adapters").json()["data"] == []
    assert client.post("/v1/adapters", **form()).json()["digest"] == body["digest"]


def test_directory_of_the_tenants_own_prefix_is_imported(
    serving: Serving, client: httpx.Client, tmp_path: Path
) -> None:
    directory = tmp_path / "store" / "tenants" / "acme" / "adapters" / "copied"
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_bytes(config_bytes())
    (directory / WEIGHTS_FILE).write_bytes(weights_bytes())
    response = client.post("/v1/adapters", json={"name": "copied", "prefix": "tenants/acme/adapters/copied/"})
    assert response.status_code == 201, response.text
    assert (response.json()["source"], response.json()["aliases"]) == ("import", ["live"])
    missing = client.post("/v1/adapters", json={"name": "other", "prefix": "adapters/other"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "adapter_file_missing")


def test_plain_directory_answers_and_is_shown_before_anybody_registers_it(
    serving: Serving, client: httpx.Client, tmp_path: Path
) -> None:
    directory = tmp_path / "store" / "tenants" / "acme" / "adapters" / "copied"
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_bytes(config_bytes())
    (directory / WEIGHTS_FILE).write_bytes(weights_bytes())
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [serving.base, "copied"]
    assert client.post("/v1/completions", json={"model": "copied", "prompt": "x"}).json()["model"] == "copied@v1"
    assert client.get("/v1/adapters/copied").json()["versions"][0]["version"] == 1


def test_aliases_move_and_roll_back(serving: Serving, client: httpx.Client) -> None:
    serving.publish("acme", "support")
    serving.publish("acme", "support", seed=1)
    moved = client.put("/v1/adapters/support/aliases/live", json={"version": 1})
    assert (moved.status_code, moved.json()["version"]) == (200, 1)
    assert client.get("/v1/adapters/support/aliases/live").json()["version"] == 1
    assert client.post("/v1/adapters/support/aliases/canary", json={"version": 2}).status_code == 200
    assert (
        client.post("/v1/completions", json={"model": "support@canary", "prompt": "x"}).json()["model"] == "support@v2"
    )
    assert client.post("/v1/adapters/support/rollback").json()["version"] == 2
    assert client.post("/v1/completions", json={"model": "support", "prompt": "x"}).json()["model"] == "support@v2"
    for alias, body, status in (
        ("live", {"version": 99}, 404),
        ("live", {"version": 0}, 400),
        ("live", {"version": "1"}, 400),
        ("live", {}, 400),
        ("v3", {"version": 1}, 400),
        ("ckpt-1", {"version": 1}, 400),
    ):
        assert client.put(f"/v1/adapters/support/aliases/{alias}", json=body).status_code == status
    assert client.delete("/v1/adapters/support/aliases/canary").json()["deleted"]
    assert client.get("/v1/adapters/support/aliases/canary").status_code == 404


def test_warm_and_pin_show_in_the_listing(serving: Serving, client: httpx.Client) -> None:
    serving.publish("acme", "support")
    shown = client.get("/v1/adapters/support").json()["versions"][0]
    assert (shown["resident"], shown["pinned"]) == (False, False)
    assert client.post("/v1/adapters/support/load").json()["tier"] == "disk"
    assert client.post("/v1/adapters/support@v1/pin").json()["pinned"] is True
    shown = client.get("/v1/adapters/support").json()["versions"][0]
    assert (shown["resident"], shown["pinned"]) == (True, True)
    assert client.get("/v1/adapters").json()["data"][0]["live"]["resident"] is True
    assert client.post("/v1/adapters/support/unpin").json()["pinned"] is False
    assert client.get("/v1/adapters/support").json()["versions"][0]["pinned"] is False


def test_delete_takes_versions_aliases_and_residency(serving: Serving, client: httpx.Client) -> None:
    serving.publish("acme", "support")
    serving.publish("acme", "support", seed=1)
    client.post("/v1/adapters/support/load")
    refused = client.delete("/v1/adapters/support/versions/2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_in_use")
    assert client.delete("/v1/adapters/support/versions/v1").json()["id"] == "support@v1"
    assert client.delete("/v1/adapters/support").json() == {"id": "support", "object": "adapter", "deleted": True}
    assert client.get("/v1/adapters/support").status_code == 404
    assert serving.engine.snapshot().resident == ()


def test_quotas_are_429_and_not_retried(serving: Serving, client: httpx.Client) -> None:
    serving.services.tenants.set_limits("acme", max_adapters=1)
    assert client.post("/v1/adapters", **form()).status_code == 201
    assert client.post("/v1/adapters", **form(seed=1)).status_code == 201, "a new version is no new adapter"
    response = client.post("/v1/adapters", **form(name=(None, "second")))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "quota_exceeded")
    assert response.headers["x-should-retry"] == "false"
    serving.services.tenants.set_limits("acme", max_storage_bytes=1000)
    response = client.post("/v1/adapters", **form(seed=2))
    assert (response.status_code, response.json()["error"]["param"]) == (429, "storage")
