"""What a transformers directory says of text: tokenizer, chat template, special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class TextFiles:
    """A base model's text side, as it lies on disk."""

    tokenizer: Mapping[str, Any]  # tokenizer.json
    template: str | None  # the chat template's source
    special_tokens: Mapping[str, str]  # names by use, as templates see them: {"bos_token": "<|im_start|>", …}
    eos_ids: frozenset[int]  # of generation_config.json and config.json
    prefix: tuple[int, ...]  # what begins a plain prompt: the beginning-of-sequence token, or nothing
    max_context: int  # tokens

    @classmethod
    def read(cls, model_dir: Path, max_context: int | None = None) -> TextFiles:
        """Raises ValueError, saying what is missing."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{model_dir} has no tokenizer.json: save its tokenizer with transformers' save_pretrained"
            )
        tokenizer = json.loads(path.read_text("utf-8"))
        config = _read_json(model_dir / "tokenizer_config.json")
        model = _read_json(model_dir / "config.json")
        special_tokens = _special_tokens(_read_json(model_dir / "special_tokens_map.json") | config)
        if max_context is None:
            max_context = int(model.get("max_position_embeddings") or config.get("model_max_length") or 0)
        if not 0 < max_context < 1 << 31:
            raise ValueError(f"{model_dir} does not say how long a context may be: name a maximum")
        return cls(
            tokenizer=tokenizer,
            template=_template_source(model_dir, config),
            special_tokens=special_tokens,
            eos_ids=_eos_ids(_read_json(model_dir / "generation_config.json"), model),
            prefix=_prefix(tokenizer, config, special_tokens),
            max_context=max_context,
        )

    def decisive(self) -> dict[str, Any]:
        """What decides which ids a text becomes, for a digest; the context length does not."""
        return {
            "tokenizer": self.tokenizer,
            "template": self.template,
            "special_tokens": dict(self.special_tokens),
            "prefix": list(self.prefix),
        }


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for use, token in config.items():
        if use.endswith("_token") and isinstance(token, str | Mapping):
            named[use] = token if isinstance(token, str) else str(token["content"])
    return named


def _eos_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    found: set[int] = set()
    for config in configs:
        eos = config.get("eos_token_id")
        found.update([eos] if isinstance(eos, int) else eos or ())
    return frozenset(found)


def _template_source(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def _prefix(
    tokenizer_json: Mapping[str, Any], config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    """What begins a plain prompt: as tokenizer_config.json says, else what the tokenizer itself puts in front."""
    tokenizer = Tokenizer.from_str(json.dumps({**tokenizer_json, "truncation": None, "padding": None}))
    if "add_bos_token" in config:
        bos = tokenizer.token_to_id(special_tokens.get("bos_token", "")) if config["add_bos_token"] else None
        return () if bos is None else (bos,)
    plain, whole = tokenizer.encode("x", add_special_tokens=False).ids, tokenizer.encode("x").ids
    return next((tuple(whole[:n]) for n in range(len(whole)) if whole[n : n + len(plain)] == plain), ())
