"""Keys, tenants, limits, probes and metrics over HTTP."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.logs import JsonFormatter
from tests.api.serving import Serving, serve, sse_events


@pytest.fixture
def admin(serving: Serving) -> Iterator[httpx.Client]:
    with serving.client("admin") as client:
        yield client


def chat(serving: Serving, **headers: str) -> httpx.Response:
    body = {"model": serving.base, "messages": [{"role": "user", "content": "canary-prompt"}]}
    return httpx.post(f"{serving.url}/v1/chat/completions", json=body, headers=headers)


def test_tenant_and_key_are_made_and_work_at_once(serving: Serving, admin: httpx.Client) -> None:
    assert admin.post("/admin/tenants", json={"id": "initech", "limits": {"max_jobs": 2}}).status_code == 201
    assert "initech" in [tenant["id"] for tenant in admin.get("/admin/tenants").json()["data"]]
    made = admin.post("/admin/keys", json={"tenant": "initech", "name": "ci"})
    key = made.json()
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    assert chat(serving, authorization=f"Bearer {key['key']}").status_code == 200
    (shown,) = admin.get("/admin/keys", params={"tenant": "initech"}).json()["data"]
    assert (shown["id"], shown["name"], shown["kind"]) == (key["id"], "ci", "tenant")
    assert key["key"] not in json.dumps(shown)
    assert admin.delete(f"/admin/keys/{key['id']}").json()["revoked_at"]
    assert chat(serving, authorization=f"Bearer {key['key']}").status_code == 401


def test_limits_are_set_shown_and_bind(serving: Serving, admin: httpx.Client) -> None:
    changed = admin.put("/admin/limits/acme", json={"requests_per_minute": 2, "tokens_per_minute": 1000})
    assert changed.json()["limits"]["requests_per_minute"] == 2
    assert admin.get("/admin/limits/acme").json()["tokens_per_minute"] == 1000
    own = {"authorization": f"Bearer {serving.keys['acme']}"}
    first = chat(serving, **own)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    assert chat(serving, **own).status_code == 200
    refused = chat(serving, **own)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert refused.json()["error"]["param"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"
    assert chat(serving, authorization=f"Bearer {serving.keys['globex']}").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/tenants", {"id": "Bad Name"}, 400),
        ("POST", "/admin/tenants", {"id": "acme"}, 400),
        ("POST", "/admin/tenants", {}, 400),
        ("GET", "/admin/tenants/nobody", None, 404),
        ("DELETE", "/admin/tenants/nobody", None, 404),
        ("PUT", "/admin/limits/acme", {"nonsense": 1}, 400),
        ("PUT", "/admin/limits/acme", {"max_jobs": -1}, 400),
        ("PUT", "/admin/limits/acme", {"max_jobs": True}, 400),
        ("POST", "/admin/keys", {}, 400),
        ("POST", "/admin/keys", {"tenant": "acme", "all_tenants": True}, 400),
        ("POST", "/admin/keys", {"tenant": "nobody"}, 404),
        ("DELETE", "/admin/keys/nokey", None, 404),
    ],
)
def test_admin_mistakes_have_the_envelope(
    admin: httpx.Client, method: str, path: str, body: object, status: int
) -> None:
    response = admin.request(method, path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_admin_routes_are_for_the_admin_key_alone(serving: Serving) -> None:
    for key, status in ((serving.keys["acme"], 403), (serving.keys["service"], 403), ("x", 403), (None, 401)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{serving.url}/admin/tenants", headers=headers).status_code == status
    assert chat(serving, authorization=f"Bearer {serving.keys['admin']}").status_code == 401


def test_service_key_names_its_tenant(serving: Serving) -> None:
    service = {"authorization": f"Bearer {serving.keys['service']}"}
    serving.publish("acme", "support")
    assert chat(serving, **service).json()["error"]["code"] == "tenant_required"
    assert chat(serving, **service).status_code == 400
    assert chat(serving, **service, **{"x-tenant-id": "acme"}).status_code == 200
    foreign = chat(serving, **service, **{"x-tenant-id": "globex"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "tenant_mismatch")
    unknown = chat(serving, **service, **{"x-tenant-id": "nobody"})
    assert unknown.json() == foreign.json()
    names = httpx.get(f"{serving.url}/v1/models", headers={**service, "x-tenant-id": "acme"}).json()["data"]
    assert [model["id"] for model in names] == [serving.base, "support"]


def test_own_key_with_another_tenants_id_is_403(serving: Serving) -> None:
    own = {"authorization": f"Bearer {serving.keys['acme']}"}
    assert chat(serving, **own, **{"x-tenant-id": "acme"}).status_code == 200
    refused = chat(serving, **own, **{"x-tenant-id": "globex"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "tenant_mismatch")


def test_erased_tenant_is_gone_with_its_running_requests(tmp_path: Path) -> None:
    with serve(tmp_path, script="for ever " * 100) as serving:
        serving.engine.step_s = 0.005
        serving.publish("acme", "support")
        body = {"model": "support", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 480}
        with (
            serving.client() as client,
            serving.client("admin") as admin,
            client.stream("POST", "/v1/chat/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            assert admin.delete("/admin/tenants/acme").json()["deleted"]
            events = sse_events("\n\n".join(line for line in lines if line))
            assert events[-1]["error"]["code"] == "tenant_erased"
        serving.wait_idle()
        assert chat(serving, authorization=f"Bearer {serving.keys['acme']}").status_code == 410
        assert serving.services.catalog.list("acme") == []


def test_probes_tell_ready_from_draining(serving: Serving) -> None:
    for path in ("/livez", "/readyz", "/startupz", "/health"):
        assert httpx.get(serving.url + path).status_code == 200
    serving.engine.is_draining = True
    unready = httpx.get(f"{serving.url}/readyz")
    assert (unready.status_code, unready.json()["reasons"]) == (503, ["draining"])
    assert httpx.get(f"{serving.url}/livez").status_code == 200


def test_metrics_equal_what_was_answered(serving: Serving) -> None:
    own = {"authorization": f"Bearer {serving.keys['acme']}"}
    usages = [chat(serving, **own).json()["usage"] for _ in range(3)]
    chat(serving)
    httpx.get(f"{serving.url}/v1/elsewhere/../secret-path")
    page = httpx.get(f"{serving.url}/metrics")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert found["lodger_requests_total", "", "/v1/chat/completions", "ok"] == 3
    assert found["lodger_requests_total", "/v1/chat/completions", "client_error", "invalid_api_key"] == 1
    assert found["lodger_auth_failures_total", "missing"] == 1
    assert found["vllm:prompt_tokens_total", serving.base] == sum(usage["prompt_tokens"] for usage in usages)
    assert found["vllm:generation_tokens_total", serving.base] == sum(usage["completion_tokens"] for usage in usages)
    assert found["vllm:request_success_total", "stop", serving.base] == 3
    assert found["vllm:inter_token_latency_seconds_count", serving.base] == 3 * 11
    assert "secret-path" not in page.text
    assert "acme" not in page.text


def test_metrics_beyond_loopback_need_the_admin_key(tmp_path: Path) -> None:
    with serve(tmp_path, metrics_open=False) as serving:
        assert httpx.get(f"{serving.url}/metrics").status_code == 401
        with serving.client() as client:
            assert client.get("/metrics").status_code == 403
        with serving.client("admin") as client:
            assert client.get("/metrics").status_code == 200


def test_admin_port_takes_admin_and_metrics_away_from_the_api(tmp_path: Path) -> None:
    with serve(tmp_path, admin_here=False) as serving, serving.client("admin") as client:
        assert client.get("/metrics").status_code == 404
        assert client.get("/admin/tenants").status_code == 404
    other = tmp_path / "admin"
    other.mkdir()
    with serve(other, admin=True) as serving, serving.client("admin") as client:
        assert client.get("/admin/tenants").status_code == 200
        assert client.get("/v1/models").status_code == 404
        assert httpx.get(f"{serving.url}/metrics").status_code == 200
        assert httpx.get(f"{serving.url}/admin/tenants").status_code == 401


def test_each_request_logs_one_line_and_never_what_was_said(serving: Serving) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("app.api.middleware")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        own = {"authorization": f"Bearer {serving.keys['acme']}"}
        answer = chat(serving, **own, **{"x-request-id": "abc"})
        chat(serving, authorization="Bearer canary-key")
        serving.engine.errors[""] = RuntimeError("canary-cause")
        assert chat(serving, **own).status_code == 500
        until = time.monotonic() + 5
        while stream.getvalue().count("\n") < 3 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["status"], line["outcome"]) for line in lines] == [
        (200, "ok"),
        (401, "client_error"),
        (500, "error"),
    ]
    assert lines[0]["request_id"] == "abc"
    assert lines[0]["tenant"] == "acme"
    assert lines[0]["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert lines[0]["route"] == "/v1/chat/completions"
    assert lines[2]["error_class"] == "RuntimeError"
    for canary in ("canary", "hello world", serving.keys["acme"]):
        assert canary not in stream.getvalue()


@pytest.mark.parametrize("name", ["self", "tenant", "max_everything"])
def test_limit_that_there_is_not_is_refused(admin: httpx.Client, name: str) -> None:
    answer = admin.put("/admin/limits/acme", json={name: 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
