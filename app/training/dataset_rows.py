"""One JSON object -> one example, or findings. The closed schema of chat, prompt/completion and preference rows.

Nothing is guessed or dropped: a key that is not understood is a finding. Knows nothing of tokens, files or SQL.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from app.training.dataset import Row
from app.training.findings import Finding, FindingCode, FindingLog

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "name", "weight", "tool_calls", "tool_call_id", "refusal"})
CHAT_KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})
COMPLETION_KEYS = frozenset({"prompt", "completion"})
PREFERENCE_KEYS = frozenset({"input", "preferred_output", "non_preferred_output"})

Message: TypeAlias = dict[str, Any]  # {"role", "content", "weight"?, "name"?}: what the renderer takes


class Method(enum.StrEnum):
    """How a job learns from its rows."""

    SUPERVISED = "supervised"  # chat or prompt/completion rows
    DPO = "dpo"  # preference rows


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; the labels are the assistant messages of weight 1."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """Plain text without a template; the labels are the completion and the end token."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A conversation with a better and a worse continuation; the labels are the continuations' assistant messages."""

    line: int
    messages: tuple[Message, ...]
    preferred: tuple[Message, ...]
    rejected: tuple[Message, ...]


Example: TypeAlias = ChatExample | CompletionExample | PreferenceExample
Report: TypeAlias = Callable[..., None]


def parse_row(row: Row, method: Method, log: FindingLog, *, alternating_roles: bool = False) -> Example | None:
    """Return the row's example, or None after writing every fault of it to `log`.

    `alternating_roles`: the chat template accepts only user and assistant in turns after the system message.
    """
    return _RowParser(row, method, log, alternating_roles).parse()


class _RowParser:
    """The checks of one row. Faults go to the log as they are met; any fault makes the row unusable."""

    def __init__(self, row: Row, method: Method, log: FindingLog, alternating_roles: bool) -> None:
        self.row, self.method, self.log, self.alternating_roles = row, method, log, alternating_roles
        self.faults = 0

    def fault(self, code: FindingCode, detail: str, *, message: int | None = None, field: str | None = None) -> None:
        self.faults += 1
        self.log.add(Finding(self.row.line, code, detail, message, field))

    def parse(self) -> Example | None:
        keys = self.row.value.keys()
        is_preference = bool(keys & PREFERENCE_KEYS)
        is_completion = bool(keys & COMPLETION_KEYS)
        if self.method is Method.DPO:
            if not is_preference:
                self.fault(
                    FindingCode.WRONG_FORMAT, "method dpo takes input, preferred_output and non_preferred_output"
                )
                return None
            return self._preference()
        if is_preference:
            self.fault(FindingCode.WRONG_FORMAT, "preference rows need the method dpo")
            return None
        if is_completion and "messages" in keys:
            self.fault(FindingCode.WRONG_FORMAT, "a row has either messages or prompt and completion")
            return None
        return self._completion() if is_completion else self._chat()

    def _unknown_keys(self, value: dict[str, Any], known: frozenset[str], prefix: str = "") -> None:
        for key in value.keys() - known:
            self.fault(
                FindingCode.ROW_UNRECOGNIZED_KEY,
                f"the key {key[:60]!r} is not known; a row has {', '.join(sorted(known))}",
                field=f"{prefix}{key[:60]}",
            )

    def _chat(self) -> ChatExample | None:
        value = self.row.value
        self._unknown_keys(value, CHAT_KEYS)
        self._no_tools(value, "")
        messages = self._messages(value.get("messages"), "messages")
        if messages is None:
            return None
        if not any(message["role"] == "assistant" for message in messages):
            self.fault(FindingCode.EXAMPLE_MISSING_ASSISTANT_MESSAGE, "no assistant message to learn from")
        self._role_order(messages, "messages")
        return None if self.faults else ChatExample(self.row.line, tuple(messages))

    def _completion(self) -> CompletionExample | None:
        value = self.row.value
        self._unknown_keys(value, COMPLETION_KEYS)
        for key in ("prompt", "completion"):
            if key not in value:
                self.fault(FindingCode.WRONG_FORMAT, f"the row has no {key}", field=key)
            elif not isinstance(value[key], str):
                self.fault(FindingCode.MISSING_CONTENT, f"{key} is not a string", field=key)
        if not self.faults and not value["completion"]:
            self.fault(FindingCode.MISSING_CONTENT, "the completion is empty", field="completion")
        return None if self.faults else CompletionExample(self.row.line, value["prompt"], value["completion"])

    def _preference(self) -> PreferenceExample | None:
        value = self.row.value
        self._unknown_keys(value, PREFERENCE_KEYS)
        asked = value.get("input")
        if not isinstance(asked, dict):
            self.fault(FindingCode.MISSING_MESSAGES_LIST, "input is not an object with messages", field="input")
            asked = None
        else:
            self._unknown_keys(asked, CHAT_KEYS, "input.")
            self._no_tools(asked, "input.")
        messages = self._messages(asked.get("messages"), "input.messages") if asked is not None else None
        preferred = self._output(value, "preferred_output")
        rejected = self._output(value, "non_preferred_output")
        if self.faults or messages is None or preferred is None or rejected is None:
            return None
        for name, output in (("preferred_output", preferred), ("non_preferred_output", rejected)):
            self._role_order([*messages, *output], name)
        return (
            None
            if self.faults
            else PreferenceExample(self.row.line, tuple(messages), tuple(preferred), tuple(rejected))
        )

    def _output(self, value: dict[str, Any], name: str) -> list[Message] | None:
        output = self._messages(value.get(name), name)
        if output is not None and not any(message["role"] == "assistant" for message in output):
            detail = f"{name} has no assistant message"
            self.fault(FindingCode.EXAMPLE_MISSING_ASSISTANT_MESSAGE, detail, field=name)
        return output

    def _no_tools(self, value: dict[str, Any], prefix: str) -> None:
        for key in ("tools", "parallel_tool_calls"):
            if value.get(key) not in (None, []):
                self.fault(FindingCode.TOOLS_UNSUPPORTED, f"{key} cannot be trained on yet", field=f"{prefix}{key}")

    def _messages(self, value: object, field: str) -> list[Message] | None:
        """The checked messages; None after a fault that leaves nothing to check."""
        if not isinstance(value, list) or not value:
            what = "is empty" if value == [] else "is missing" if value is None else "is not a list"
            self.fault(FindingCode.MISSING_MESSAGES_LIST, f"{field} {what}", field=field)
            return None
        before = self.faults
        called: set[str] = set()
        messages = [self._message(item, number, called) for number, item in enumerate(value, start=1)]
        return None if self.faults > before else [message for message in messages if message is not None]

    def _message(self, value: object, number: int, called: set[str]) -> Message | None:
        if not isinstance(value, dict):
            self.fault(FindingCode.MESSAGE_MISSING_KEY, "the message is not an object", message=number)
            return None
        for key in sorted(value.keys() - MESSAGE_KEYS):
            detail = f"the key {key[:60]!r} is not known in a message"
            self.fault(FindingCode.MESSAGE_UNRECOGNIZED_KEY, detail, message=number, field=key[:60])
        if "role" not in value:
            self.fault(FindingCode.MESSAGE_MISSING_KEY, "the message has no role", message=number, field="role")
            return None
        role = value["role"]
        if role not in ROLES:
            detail = f"role is {str(role)[:60]!r}, not one of {', '.join(ROLES)}"
            self.fault(FindingCode.UNRECOGNIZED_ROLE, detail, message=number, field="role")
            return None
        self._tool_use(value, role, number, called)
        content = self._content(value, role, number)
        message: Message = {"role": role, "content": content}
        self._name_and_weight(value, role, number, message)
        return message

    def _name_and_weight(self, value: dict[str, Any], role: str, number: int, message: Message) -> None:
        if (name := value.get("name")) is not None:
            if isinstance(name, str):
                message["name"] = name
            else:
                self.fault(FindingCode.MISSING_CONTENT, "name is not a string", message=number, field="name")
        if (weight := value.get("weight")) is None:
            return
        if type(weight) is not int or weight not in (0, 1):
            detail = f"weight is {json.dumps(weight)[:60]}, not the integer 0 or 1"
            self.fault(FindingCode.INVALID_WEIGHT, detail, message=number, field="weight")
        elif role != "assistant":
            detail = "only assistant messages carry a weight"
            self.fault(FindingCode.INVALID_WEIGHT, detail, message=number, field="weight")
        else:
            message["weight"] = weight

    def _content(self, value: dict[str, Any], role: str, number: int) -> str:
        """The message's text: a string, joined text parts, or an assistant's refusal."""

        def missing(detail: str, field: str = "content") -> str:
            self.fault(FindingCode.MISSING_CONTENT, detail, message=number, field=field)
            return ""

        content, refusal, calls = value.get("content"), value.get("refusal"), value.get("tool_calls")
        if refusal is not None:
            if role != "assistant" or not isinstance(refusal, str) or not refusal:
                return missing("refusal is a text of an assistant message", "refusal")
            if content not in (None, ""):
                return missing("the message has both content and refusal; keep one", "refusal")
            return refusal
        if "content" not in value and calls is None:
            detail = "the message has neither content nor tool_calls"
            self.fault(FindingCode.MESSAGE_MISSING_KEY, detail, message=number, field="content")
            return ""
        if isinstance(content, list):
            texts = [_text_of_part(part) for part in content]
            if None in texts:
                return missing("a content part is not of the form {type: text, text: …}")
            content = "".join(text for text in texts if text is not None)
        if isinstance(content, str) and content:
            return content
        if calls and content in (None, ""):
            return ""
        return missing("content is empty" if content in (None, "") else "content is not text")

    def _tool_use(self, value: dict[str, Any], role: str, number: int, called: set[str]) -> None:
        """A broken reference is told as such; a sound one is still refused, because serving has no tools yet."""

        def broken(detail: str, field: str) -> None:
            self.fault(FindingCode.TOOL_REFERENCE, detail, message=number, field=field)

        calls, reference = value.get("tool_calls"), value.get("tool_call_id")
        before = self.faults
        if calls is not None:
            if role != "assistant" or not isinstance(calls, list) or not calls:
                broken("tool_calls is a list that is not empty, on an assistant message", "tool_calls")
            else:
                for call in calls:
                    if (problem := _call_problem(call, called)) is not None:
                        broken(problem, "tool_calls")
        if role == "tool" and (not isinstance(reference, str) or reference not in called):
            broken("tool_call_id does not name a call made before", "tool_call_id")
        elif role != "tool" and reference is not None:
            broken("only tool messages carry a tool_call_id", "tool_call_id")
        if (calls is not None or role == "tool") and self.faults == before:
            field = "role" if role == "tool" else "tool_calls"
            self.fault(
                FindingCode.TOOLS_UNSUPPORTED, "tool calls cannot be trained on yet", message=number, field=field
            )

    def _role_order(self, messages: list[Message], field: str) -> None:
        if not self.alternating_roles:
            return
        expected = "user"
        for number, message in enumerate(messages, start=1):
            role = message["role"]
            if number == 1 and role in ("system", "developer"):
                continue
            if role != expected:
                detail = f"this model's template wants {expected} here, not {role}"
                self.fault(FindingCode.ROLE_ORDER, detail, message=number, field="role")
                return
            expected = "assistant" if expected == "user" else "user"


def _text_of_part(part: object) -> str | None:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        return text if isinstance(text, str) else None
    return None


def _call_problem(call: object, called: set[str]) -> str | None:
    """What is wrong with one tool call; a sound one's id is added to `called`."""
    if not isinstance(call, dict) or not isinstance(call.get("id"), str):
        return "a tool call has no id"
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return "a tool call has no function name"
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        return "a tool call's arguments are not a JSON object in a string"
    called.add(call["id"])
    return None
