"""Error codes as rows of the reference page: from both error trees, the framework's answers, and codes at a raise."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import app
from adapters.errors import AdapterError, AdapterRefused
from app.api import errors as table
from app.errors import LodgerError

ROOT = Path(__file__).resolve().parents[1]
SKIPPED_PACKAGES = ("app.bench", "app.migrations", "app.cli")  # raise nothing that reaches a client

# What codes mean that a raise gives to an error of a wider class; all others are described by their class's docstring.
WORDS = {
    "alias_moved": "Somebody else moved the alias meanwhile. Look again, then decide.",
    "idempotency_key_reused": "This Idempotency-Key came with another body before. Use a new key.",
    "invalid_json": table.HTTP_CODES[400][1],
    "invalid_upload_state": "The upload is completed, cancelled or expired.",
    "no_earlier_version": "The alias never pointed anywhere else.",
    "not_found": "There is no such object for this key. Check the id.",
    "quota_exceeded": "This tenant's limit on bytes, uploads, adapters, jobs or endpoints is reached. Delete some.",
    "unsupported_method": "The fine-tuning method is not trained here; supervised and dpo are.",
    "webhook_unreachable": "The endpoint did not answer the sample event with a status of 2xx.",
    "method_not_allowed": table.HTTP_CODES[405][1],
    "request_timeout": table.HTTP_CODES[408][1],
    "request_too_large": table.HTTP_CODES[413][1],
    "unsupported_media_type": table.HTTP_CODES[415][1],
    "file_too_large": "The file is larger than this server takes. Send it by /v1/uploads, or in parts of its own.",
    "tenant_erased": "This tenant was erased. Its id is not used again.",
    "adapter_unavailable": "The adapter, or its store, cannot be reached now. Try again after Retry-After.",
    "server_error": "Something went wrong on the server. Quote the request id.",
    "invalid_value": "A field's value cannot be served; `param` names the field and the message says why.",
    "adapter_in_use": "An alias points to the version, so it is not deleted. Move the alias first.",
}


@dataclass(slots=True)
class CodeFacts:
    """All answers that one code can come in."""

    statuses: set[int] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    words: str = ""


@cache
def all_codes() -> dict[str, CodeFacts]:
    """Every code that a client can see in an envelope."""
    found: dict[str, CodeFacts] = {}
    classes = _error_classes()
    for cls in classes.values():
        _note(found, table.answer_for(cls()), (cls.__doc__ or "").strip())
    for class_name, code in _codes_at_raises():
        if class_name in classes:
            _note(found, table.answer_for(classes[class_name](code=code)), "")
    for status in table.HTTP_CODES:
        _note(found, table.answer_for_status(status), "")
    for code, facts in found.items():
        facts.words = WORDS.get(code) or facts.words
        assert facts.words, f"say in tests/docs_errors.py what {code} means"
    return found


def error_rows() -> Iterator[list[str]]:
    for code, facts in sorted(all_codes().items(), key=lambda item: (min(item[1].statuses), item[0])):
        statuses = " or ".join(map(str, sorted(facts.statuses)))
        yield [f"`{code}`", statuses, " or ".join(f"`{kind}`" for kind in sorted(facts.types)), facts.words]


def _note(found: dict[str, CodeFacts], answer: table.ErrorAnswer, words: str) -> None:
    facts = found.setdefault(answer.code, CodeFacts())
    facts.statuses.add(answer.status)
    facts.types.add(answer.type)
    facts.words = facts.words or words


def _error_classes() -> dict[str, type[LodgerError] | type[AdapterError]]:
    """Both trees whole: modules are imported first, since a subclass may live beside what raises it."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        is_skipped = module.name.startswith(SKIPPED_PACKAGES) or module.name == "app.__main__"
        if not is_skipped and _raises_errors(module.name):
            importlib.import_module(module.name)
    found: dict[str, type[LodgerError] | type[AdapterError]] = {}
    pending: list[type[LodgerError] | type[AdapterError]] = [LodgerError, AdapterError]
    while pending:
        cls = pending.pop()
        if cls.__module__.startswith(("app.", "adapters.")) and not cls.__module__.startswith(SKIPPED_PACKAGES):
            if cls is not AdapterRefused:  # never raised itself; its code is that of a subclass
                found[cls.__name__] = cls
            pending.extend(cls.__subclasses__())
    return found


def _raises_errors(module: str) -> bool:
    """Modules that define error classes; importing only these keeps torch out."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    return path.exists() and any(
        isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) for base in node.bases) and "code = " in text
        for text in [path.read_text()]
        for node in ast.parse(text).body
    )


def _codes_at_raises() -> Iterator[tuple[str, str]]:
    """(class, code) of every call `SomeError(…, code="…")` in the sources."""
    for package in ("app", "adapters"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    for keyword in node.keywords:
                        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant) and keyword.value.value:
                            yield name, keyword.value.value
