"""One example -> token ids and labels within the length limit. No files, no SQL, no torch.

The renderer is the one that serving uses, so training tokens before an answer are the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.errors import RequestInvalid
from app.training.dataset_rows import ChatExample, CompletionExample, Example, Message, Method
from app.training.findings import Finding, FindingCode

Tokens = tuple[Sequence[int], Sequence[bool]]  # ids [T], labels [T]


class TrainingRenderer(Protocol):
    """The one renderer of training and serving (`app.chat`). Pure; any thread."""

    @property
    def alternating_roles(self) -> bool:
        """True when the template refuses messages that are not user and assistant in turns."""

    @property
    def end_id(self) -> int:
        """The token that ends a plain completion."""

    def render_training(self, messages: Sequence[Message], train_on: str) -> tuple[Sequence[int], Sequence[bool]]:
        """Token ids and which of them are labels; assistant messages of weight 0 are none. Raises RequestInvalid."""

    def encode_prompt(self, text: str) -> Sequence[int]:
        """A plain prompt as serving encodes it: a BOS if the model has one, then `encode_text` of it."""

    def encode_text(self, text: str) -> Sequence[int]:
        """Plain text that continues a prompt: no BOS, and special tokens in it stay text."""


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What of a job's configuration decides its tokens."""

    method: Method
    max_seq_length: int  # tokens of one sequence
    on_long: str = "error"  # "error", "truncate_left" or "drop"
    train_on: str = "all_assistant"  # or "last_assistant"


@dataclass(frozen=True, slots=True)
class Fitted:
    """An example's sequences within the length limit; `truncated` is true when older turns were cut off."""

    sequences: tuple[Tokens, ...]
    truncated: bool


class ExampleFitter:
    """Renders one example and applies `on_long`. No message is cut inside: a turn that does not fit is a finding."""

    def __init__(self, options: PrepareOptions, renderer: TrainingRenderer) -> None:
        self._options, self._renderer = options, renderer

    def fit(self, example: Example) -> Fitted | Finding | None:
        """The fitted example, what is wrong with it, or None when it is too long and `on_long` is "drop"."""
        try:
            return self._fit(example)
        except RequestInvalid as exc:  # the template has rules of its own
            return Finding(example.line, FindingCode.TEMPLATE_REFUSED, exc.message, field=exc.param)

    def _fit(self, example: Example) -> Fitted | Finding | None:
        fitted = self._render(example)
        longest = max(len(ids) for ids, _ in fitted.sequences)
        if longest > self._options.max_seq_length:
            if self._options.on_long == "drop":
                return None
            shorter = self._cut(example) if self._options.on_long == "truncate_left" else None
            if shorter is None:
                limit = self._options.max_seq_length
                cut = " even without its older turns" if self._options.on_long == "truncate_left" else ""
                return Finding(
                    example.line, FindingCode.TOO_LONG, f"{longest} tokens, more than max_seq_length {limit}{cut}"
                )
            fitted = shorter
        if any(not any(labels[1:]) for _, labels in fitted.sequences):
            return Finding(example.line, FindingCode.NO_TRAINABLE_TOKENS, "no token of this example would be learned")
        return fitted

    def _render(self, example: Example, skip: int = 0) -> Fitted:
        """All sequences of the example, without its first `skip` units (turns or, in plain text, prompt tokens)."""
        if isinstance(example, CompletionExample):
            sequences: tuple[Tokens, ...] = (self._plain(example, skip),)
        elif isinstance(example, ChatExample):
            messages = _without_turns(example.messages, skip)
            sequences = (self._renderer.render_training(messages, self._options.train_on),)
        else:
            # Only the continuations are compared: what the assistant said before them is context.
            asked = [_unweighted(message) for message in _without_turns(example.messages, skip)]
            sequences = tuple(
                self._renderer.render_training([*asked, *output], self._options.train_on)
                for output in (example.preferred, example.rejected)
            )
        return Fitted(tuple((ids, _unlabel_first(labels)) for ids, labels in sequences), truncated=skip > 0)

    def _plain(self, example: CompletionExample, skip: int) -> Tokens:
        start = list(self._renderer.encode_prompt(""))  # a BOS, if the model has one, also when the prompt is cut
        prompt = start + list(self._renderer.encode_text(example.prompt))[skip:]
        completion = [*self._renderer.encode_text(example.completion), self._renderer.end_id]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _cut(self, example: Example) -> Fitted | None:
        """The longest form that fits after cutting from the left; None when even the last unit is too long."""
        if isinstance(example, CompletionExample):
            whole = self._render(example)
            excess = len(whole.sequences[0][0]) - self._options.max_seq_length
            num_prompt = len(self._renderer.encode_text(example.prompt))
            return self._render(example, excess) if excess < num_prompt else None
        num_turns = len(_turn_starts(example.messages))
        low, high = 1, num_turns - 1  # at least one turn goes, at least one stays
        best: Fitted | None = None
        while low <= high:  # lengths fall with every turn that goes
            middle = (low + high) // 2
            tried = self._render(example, middle)
            if max(len(ids) for ids, _ in tried.sequences) <= self._options.max_seq_length:
                best, high = tried, middle - 1
            else:
                low = middle + 1
        return best


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: a turn is a user message and all up to the next one. The leading system message is in none."""
    return [number for number, message in enumerate(messages) if message["role"] == "user"]


def _without_turns(messages: Sequence[Message], skip: int) -> list[Message]:
    """The messages without their first `skip` turns; the system message stays."""
    if skip == 0:
        return list(messages)
    starts = _turn_starts(messages)
    head = [message for message in messages[: starts[0]] if message["role"] in ("system", "developer")]
    return head + list(messages[starts[skip] :])


def _unweighted(message: Message) -> Message:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def _unlabel_first(labels: Sequence[bool]) -> Sequence[bool]:
    """Nothing stands before the first token, so it cannot be predicted."""
    return [False, *map(bool, labels[1:])] if len(labels) else labels
