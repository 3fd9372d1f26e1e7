"""What a key may see under /v1/models, and that another tenant's adapter looks like none."""

from __future__ import annotations

import re
from pathlib import Path

import openai
import pytest

from tests.adapter_files import config_bytes
from tests.api.serving import Serving, weights_bytes


def test_base_comes_first_then_the_callers_own_adapters(serving: Serving) -> None:
    serving.publish("acme", "support")
    serving.publish("acme", "sales", alias=None)
    serving.publish("globex", "secret")
    models = list(serving.openai().models.list())
    assert [model.id for model in models] == [serving.base, "support"]  # `sales` has no live version: 404
    assert all(model.object == "model" for model in models)
    assert models[0].created == 1_700_000_000
    assert (models[1].owned_by, models[1].adapter["version"], models[1].adapter["aliases"]) == ("acme", 1, ["live"])
    assert [model.id for model in serving.openai("globex").models.list()] == [serving.base, "secret"]


def test_one_model_by_every_name(serving: Serving) -> None:
    manifest = serving.publish("acme", "support")
    client = serving.openai()
    assert client.models.retrieve(serving.base).id == serving.base
    for name in ("support", "support@v1", "support@live", "acme/support", "acme/support@v1"):
        model = client.models.retrieve(name)
        assert (model.id, model.adapter["digest"]) == (name, manifest.digest)


def test_foreign_model_equals_an_absent_one_also_when_its_owner_uses_it(serving: Serving) -> None:
    serving.publish("globex", "secret")
    hello = [{"role": "user", "content": "Hi"}]
    serving.openai("globex").chat.completions.create(model="secret", messages=hello)

    def answers(name: str) -> list[tuple[int, str]]:
        body = {"model": name, "messages": hello}
        with serving.client() as client:
            responses = [
                client.post("/v1/chat/completions", json=body),
                client.post("/v1/completions", json={"model": name, "prompt": "x"}),
                client.get(f"/v1/models/{name}"),
                client.delete(f"/v1/models/{name}"),
            ]
            if "/" not in name and "@" not in name:
                responses += [
                    client.get(f"/v1/adapters/{name}"),
                    client.post(f"/v1/adapters/{name}/load"),
                    client.post(f"/v1/adapters/{name}/pin"),
                    client.post(f"/v1/adapters/{name}/unpin"),
                    client.post(f"/v1/adapters/{name}/rollback"),
                    client.put(f"/v1/adapters/{name}/aliases/x", json={"version": 1}),
                    client.get(f"/v1/adapters/{name}/aliases/live"),
                    client.delete(f"/v1/adapters/{name}/aliases/live"),
                    client.delete(f"/v1/adapters/{name}/versions/1"),
                    client.delete(f"/v1/adapters/{name}"),
                ]
        return [(response.status_code, response.text.replace(name, "NAME")) for response in responses]

    for theirs, nobodys in (("secret", "nobody"), ("globex/secret", "globex/nobody"), ("secret@v1", "nobody@v1")):
        assert answers(theirs) == answers(nobodys)
        assert {status for status, _ in answers(theirs)} == {404}
    assert serving.openai("globex").models.retrieve("secret").id == "secret"


def test_own_adapter_never_answers_for_another_tenants_of_the_same_name(serving: Serving) -> None:
    serving.publish("acme", "support")
    serving.publish("globex", "support", seed=1)
    unique = f"ft:{serving.base}:globex::aB3dE6gH"
    for name in ("globex/support", "globex/support@v1", unique):
        with pytest.raises(openai.NotFoundError):
            serving.openai().models.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            serving.openai().models.delete(name)
    assert serving.openai().models.retrieve("acme/support").id == "acme/support"


def test_fine_tuned_ids_are_listed_last_and_name_one_version_for_ever(serving: Serving, tmp_path: Path) -> None:
    ids = [f"ft:{serving.base}:acme:bot:aB3dE6g{i}" for i in range(2)]
    for i, model in enumerate(ids):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(weights_bytes(i))
        extra = {"fine_tuned_model": model}
        serving.services.catalog.publish("acme", "bot", config_bytes(), path, source="training", extra=extra)
    client = serving.openai()
    assert [model.id for model in client.models.list()] == [serving.base, "bot", *ids]
    for version, model in enumerate(ids, start=1):
        answer = client.completions.create(model=model, prompt="x")
        assert answer.model == f"bot@v{version}"
        assert client.models.retrieve(f"acme/{model}").adapter["version"] == version
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=f"{ids[0]}:ckpt-step-5", prompt="x")
    with pytest.raises(openai.NotFoundError):
        serving.openai("globex").completions.create(model=ids[0], prompt="x")


def test_own_adapter_is_deleted_and_gone(serving: Serving) -> None:
    serving.publish("acme", "support")
    client = serving.openai()
    deleted = client.models.delete("support")
    assert (deleted.id, deleted.deleted, deleted.object) == ("support", True, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("support")


def test_version_is_deleted_unless_an_alias_points_to_it(serving: Serving) -> None:
    serving.publish("acme", "support")
    serving.publish("acme", "support", seed=1)
    client = serving.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.models.delete("support@v2")
    assert caught.value.code == "adapter_in_use"
    assert client.models.delete("support@v1").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("support@v1")
    assert client.models.retrieve("support@v2").adapter["version"] == 2


def test_base_is_not_deleted(serving: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape("cannot be deleted")):
        serving.openai().models.delete(serving.base)
