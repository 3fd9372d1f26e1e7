"""The base model's chat template: messages -> text. The operator's file, run in jinja2's sandbox; knows no tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import RequestInvalid


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, by which some templates mark answers: the body, nothing more."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template with the environment that transformers gives one. Immutable, any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token and its like. Raises ValueError if the source does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        # A date in the prompt makes an adapter's training and its serving differ from day to day. A template that can
        # do without is not told one; the others cannot be rendered without.
        if "strftime_now is defined" not in source:
            environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self.knows_developer = "developer" in source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as exc:
            raise ValueError(f"the base model's chat template does not compile: {exc}") from exc

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Raises RequestInvalid for messages that the template refuses, such as roles out of order."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except _Refusal as exc:
            raise RequestInvalid(f"The chat template refuses these messages: {exc}", param="messages") from exc
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as exc:
            raise RequestInvalid("The chat template cannot render these messages.", param="messages") from exc
