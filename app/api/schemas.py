"""Request bodies, checked once: types, ranges, and which of OpenAI's fields are honoured, ignored or refused by name.

A field that OpenAI has and Lodger lacks is refused unless its value asks for nothing (`"tools": []`); a field that
nobody knows is refused too. Values are strict: `"5"` and `true` are no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from app.engine.sequence import SamplingParams
from app.errors import RequestInvalid, UnsupportedParameter

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOP_LOGPROBS = 20

Allowed = Callable[[Any, Mapping[str, Any]], bool]


def _nothing(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None


def _empty(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None or value == []


def _no_tools(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None or value == [] or body.get("tool_choice") == "none"


def _choice_none(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None or value == "none" or (value == "auto" and not body.get("tools"))


def _plain_text(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None or value == {"type": "text"}


def _text_only(value: Any, body: Mapping[str, Any]) -> bool:
    return value is None or value == ["text"]


def _any(value: Any, body: Mapping[str, Any]) -> bool:
    return True


IGNORED: Mapping[str, Allowed] = dict.fromkeys(
    ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"), _any
)
CHAT_ONLY: Mapping[str, Allowed] = {
    "tools": _no_tools,
    "tool_choice": _choice_none,
    "parallel_tool_calls": lambda value, body: value is None or not body.get("tools") or value is False,
    "functions": _empty,
    "function_call": lambda value, body: value is None or value == "none",
    "response_format": _plain_text,
    "modalities": _text_only,
    "audio": _nothing,
    "prediction": _nothing,
    "reasoning_effort": _nothing,
    "verbosity": _nothing,
    "web_search_options": _nothing,
    "prompt_cache_retention": _nothing,
    "moderation": _nothing,
}


class Body(BaseModel):
    """What every JSON body has in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StoredBody(Body):
    """A body whose strings are kept in the database, which takes neither NUL nor half a character."""

    @model_validator(mode="before")
    @classmethod
    def _check_strings(cls, value: Any) -> Any:
        check_storable(value)
        return value


def check_storable(value: Any) -> None:
    """Raises RequestInvalid where a string, at any depth, cannot be kept."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\x00" in item or not is_encodable(item):
                raise RequestInvalid("Texts are Unicode without NUL and without halves of surrogate pairs.")
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item


def is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis is the proxy's business: no effect


class GenerationBody(Body):
    """Fields that chat and completions share."""

    FOREIGN: ClassVar[Mapping[str, Allowed]] = IGNORED

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Any = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_foreign(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in body.keys() & cls.FOREIGN.keys():
            if not cls.FOREIGN[name](body[name], body):
                raise UnsupportedParameter(f"'{name}' is not supported here yet. Remove it.", param=name)
        return {name: value for name, value in body.items() if name not in cls.FOREIGN}

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Any) -> list[str] | None:
        if value is None:
            return None
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("must be a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"takes at most {MAX_STOPS} strings")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"each string must have 1 to {MAX_STOP_CHARS} characters")
        return stops

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestInvalid("'stream_options' needs 'stream': true.", param="stream_options")

    def sampling(self, *, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
        """The engine's parameters; what was left out has OpenAI's default."""
        if (self.min_tokens or 0) > max_tokens:
            raise RequestInvalid("'min_tokens' is larger than the tokens that may be generated.", param="min_tokens")
        stop_ids = self.stop_token_ids or []
        if any(token >= vocab_size for token in stop_ids):
            raise RequestInvalid(f"Token ids go from 0 to {vocab_size - 1}.", param="stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self._biases(vocab_size),
            seed=self.seed,
            stop_ids=frozenset(stop_ids),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    def _biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        biases = self.logit_bias or {}
        if len(biases) > MAX_BIASES:
            raise RequestInvalid(f"'logit_bias' takes at most {MAX_BIASES} entries.", param="logit_bias")
        for token in biases:
            if not (token.isascii() and token.isdigit() and len(token) <= 9 and int(token) < vocab_size):
                raise RequestInvalid(f"Keys are token ids from 0 to {vocab_size - 1}.", param="logit_bias")
        return tuple(sorted((int(token), float(bias)) for token, bias in biases.items()))


class Message(Body):
    """One chat message. Text parts are joined; whatever is no text is refused by name."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: str | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None

    def text(self, place: str) -> str:
        """The message's text. `place` is its path in the body, for errors."""
        if self.role in ("tool", "function"):
            raise UnsupportedParameter("Tool messages are not supported here yet.", param=f"{place}.role")
        for name in ("tool_calls", "tool_call_id", "function_call", "audio"):
            if getattr(self, name):
                raise UnsupportedParameter(f"'{name}' is not supported here yet. Remove it.", param=f"{place}.{name}")
        if isinstance(self.content, str):
            return self.content
        if isinstance(self.content, list) and self.content:
            return "".join(_part_text(part, f"{place}.content[{i}]") for i, part in enumerate(self.content))
        if self.content is None and self.role == "assistant" and self.refusal:
            return self.refusal
        raise RequestInvalid("A message needs text as its content.", param=f"{place}.content")


def _part_text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RequestInvalid('A content part is {"type": "text", "text": …}.', param=place)
    if kind != "text":
        raise UnsupportedParameter("Only text parts are supported here yet.", param=f"{place}.type")
    text = part.get("text")
    if not isinstance(text, str) or set(part) - {"type", "text", "prompt_cache_breakpoint"}:
        raise RequestInvalid('A text part is {"type": "text", "text": …}.', param=place)
    return text


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    FOREIGN: ClassVar[Mapping[str, Allowed]] = {**IGNORED, **CHAT_ONLY}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def rendered_messages(self) -> list[dict[str, str]]:
        messages = [
            {"role": message.role, "content": check_text(message.text(f"messages[{i}]"), f"messages[{i}].content")}
            for i, message in enumerate(self.messages)
        ]
        return messages

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestInvalid("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    FOREIGN: ClassVar[Mapping[str, Allowed]] = {
        **IGNORED,
        "suffix": _nothing,
        "response_format": _plain_text,
    }

    prompt: Any
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def check_best_of(self) -> None:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedParameter("'best_of' must equal 'n' here. Remove it.", param="best_of")

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """The prompts, each as text or as token ids. Raises RequestInvalid for any other shape."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [check_text(prompt, "prompt")]
        if not isinstance(prompt, list) or not prompt:
            raise RequestInvalid("'prompt' is a string, a list of strings, token ids or lists of them.", param="prompt")
        if all(isinstance(item, str) for item in prompt):
            return [check_text(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
        if all(isinstance(item, list) for item in prompt):
            return [_check_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(prompt)]
        return [_check_ids(prompt, "prompt", vocab_size)]


def check_text(text: str, place: str) -> str:
    """Refuse half of a surrogate pair: JSON can spell it, UTF-8 and the tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestInvalid("The text holds a lone surrogate, which is no character.", param=place) from None
    return text


def _check_ids(ids: list[Any], place: str, vocab_size: int) -> list[int]:
    if not ids:
        raise RequestInvalid("A prompt needs at least one token.", param=place)
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RequestInvalid(f"Token ids are whole numbers from 0 to {vocab_size - 1}.", param=place)
    return ids


class RegisterBody(Body):
    """POST /v1/adapters as JSON: import a plain PEFT directory from the tenant's own prefix."""

    name: str
    prefix: str
    alias: str | None = None


class AliasBody(Body):
    """PUT or POST /v1/adapters/{name}/aliases/{alias}."""

    version: Annotated[int, Field(ge=1)]


class RollbackBody(Body):
    """POST /v1/adapters/{name}/rollback."""

    alias: str | None = None


class TenantBody(StoredBody):
    """POST /admin/tenants."""

    id: str
    limits: dict[str, int | None] | None = None


class KeyBody(StoredBody):
    """POST /admin/keys: exactly one of `tenant`, `tenants` and `all_tenants`."""

    tenant: str | None = None
    tenants: Annotated[list[str], Field(min_length=1, max_length=10_000)] | None = None
    all_tenants: bool | None = None
    name: Annotated[str, Field(max_length=128)] = ""
    expires_at: float | None = None  # Unix seconds
