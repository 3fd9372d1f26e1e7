from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.manifest import is_adapter_name, is_alias
from app.errors import ModelNotFound
from app.model_names import AdapterName, BaseModelName, FineTunedName, model_not_found, parse_model_name

BASE = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BASE, BaseModelName()),
        ("support", AdapterName(None, "support", None)),
        ("support@v3", AdapterName(None, "support", "v3")),
        ("support@live", AdapterName(None, "support", "live")),
        ("support@canary-2", AdapterName(None, "support", "canary-2")),
        ("a.b_c-d", AdapterName(None, "a.b_c-d", None)),
        ("acme/support", AdapterName("acme", "support", None)),
        ("acme/support@v12", AdapterName("acme", "support", "v12")),
        (f"ft:{BASE}:acme::7p4lUReL", FineTunedName("acme", f"ft:{BASE}:acme::7p4lUReL")),
        (f"ft:{BASE}:acme:my-Model.1:7p4lUReL", FineTunedName("acme", f"ft:{BASE}:acme:my-Model.1:7p4lUReL")),
        (
            f"ft:{BASE}:acme::7p4lUReL:ckpt-step-200",
            FineTunedName("acme", f"ft:{BASE}:acme::7p4lUReL:ckpt-step-200"),
        ),
        (f"acme/ft:{BASE}:acme::7p4lUReL", FineTunedName("acme", f"ft:{BASE}:acme::7p4lUReL")),
    ],
)
def test_every_form_is_read(model: str, expected: object) -> None:
    assert parse_model_name(model, BASE) == expected


@pytest.mark.parametrize(
    "model",
    [
        "",
        "Support",
        "support@",
        "support@@v1",
        "support@V1",
        "support@v1@v2",
        "support@ckpt-1",
        "base",
        "__base__",
        "default",
        "../x",
        "acme/../x",
        "acme/support/x",
        "/support",
        "acme/",
        "Acme/support",
        "a" * 64,
        "a" * 10_000,
        "support\n",
        "support\x00",
        "süpport",
        f"{BASE}@live",
        f"acme/{BASE}",
        "ft:",
        "ft:other:acme::7p4lUReL",
        f"ft:{BASE}:acme:7p4lUReL",
        f"ft:{BASE}:acme::short",
        f"ft:{BASE}:acme:a/b:7p4lUReL",
        f"ft:{BASE}:acme::7p4lUReL:ckpt-step-",
        f"globex/ft:{BASE}:acme::7p4lUReL",
    ],
)
def test_what_no_name_can_look_like_is_not_found(model: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_model_name(model, BASE)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 300


def test_base_with_a_slash_in_its_name_is_still_the_base() -> None:
    assert parse_model_name("org/base-1", "org/base-1") == BaseModelName()
    name = "ft:org/base-1:acme::7p4lUReL"
    assert parse_model_name(name, "org/base-1") == FineTunedName("acme", name)


def test_absent_and_malformed_names_get_the_same_answer() -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_model_name("No Such", BASE)
    assert caught.value.message == model_not_found("No Such").message


@given(st.text(max_size=80))
def test_any_text_is_a_safe_name_or_not_found(model: str) -> None:
    try:
        name = parse_model_name(model, BASE)
    except ModelNotFound:
        return
    if isinstance(name, AdapterName):
        assert is_adapter_name(name.name)
        assert name.selector is None or name.selector[:1] == "v" or is_alias(name.selector)
