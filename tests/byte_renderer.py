"""A renderer of the smallest kind for tests of data: every id and every label can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

END = 3


class ByteRenderer:
    """A byte tokenizer and a template of one marker a message: bytes are ids from 10 on, END ends a turn."""

    alternating_roles = False
    end_id = END
    _markers: dict[str, int] = {"system": 4, "developer": 4, "user": 5, "assistant": 6, "tool": 7}  # noqa: RUF012

    def encode_text(self, text: str) -> list[int]:
        return [byte + 10 for byte in text.encode()]

    def encode_prompt(self, text: str) -> list[int]:
        return [1, *self.encode_text(text)]

    def render_training(self, messages: Sequence[dict[str, Any]], train_on: str) -> tuple[list[int], list[bool]]:
        ids, labels = [1], [False]
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        for number, message in enumerate(messages):
            body = [*self.encode_text(message["content"]), END]
            learned = message["role"] == "assistant" and message.get("weight", 1) == 1
            learned = learned and (train_on == "all_assistant" or number == last)
            ids += [self._markers[message["role"]], *body]
            labels += [False, *([learned] * len(body))]
        return ids, labels
