"""The one renderer: messages -> token ids, for prompts and for training alike, and ids -> text. No torch, no HTTP.

What is promised:

- Only the base model's template writes special tokens; what a tenant wrote is text, whatever it spells.
- The tokens before an answer are the same in training as in the prompt that asks for it. For this a token border is
  kept between the generation prompt and the answer, also where an answer is history.
- Else the ids are those of the ordinary tokenization of the rendered template. They differ where a message spells a
  special token, and where an earlier answer begins with a blank or newline that would have merged with the newline of
  its header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adapters.manifest import canonical_json
from app.chat_template import ChatTemplate
from app.errors import ContextLengthExceeded, RequestInvalid, UnsupportedParameter
from app.sealed_tokenizer import BORDER, SealedTokenizer
from app.text import Detokenizer, TokenBytes
from app.text_files import TextFiles

RENDERER_VERSION = 1  # raise it with every change that changes ids: adapters remember what they were trained with

Message = Mapping[str, Any]  # role, content (text or text parts), and in training weight (0 or 1)


class TrainingTokens(NamedTuple):
    """Token ids and which of them are learned; equally long."""

    ids: list[int]
    labels: list[bool]


class Renderer:
    """Tokenizer and chat template of one base model. Immutable; any thread."""

    def __init__(self, base: TextFiles) -> None:
        """Raises ValueError for a tokenizer or template that cannot be used."""
        self.max_context = base.max_context
        self._prefix = list(base.prefix)
        self._tokenizer = SealedTokenizer(base.tokenizer, set(base.special_tokens.values()))
        self._special_ids = frozenset(self._tokenizer.special_ids.values())
        self.tokens = TokenBytes(base.tokenizer, self._special_ids)
        self._max_chars = base.max_context * self.tokens.longest_chars()
        self._template = ChatTemplate(base.template, base.special_tokens) if base.template is not None else None
        self._header = self._find_header()
        self.alternating_roles = self._refuses_two_user_messages()
        own_eos = self._tokenizer.special_ids.get(base.special_tokens.get("eos_token", ""))
        found = (own_eos, self._find_end_of_turn())
        self.eos_ids = base.eos_ids.union(token for token in found if token is not None)
        if not self.eos_ids:
            raise ValueError("the base model names no end-of-sequence token")
        self.end_id = own_eos if own_eos is not None else min(self.eos_ids)
        self.digest = hashlib.sha256(
            canonical_json({"renderer": RENDERER_VERSION, "eos_ids": sorted(self.eos_ids), **base.decisive()})
        ).hexdigest()

    @classmethod
    def load(cls, model_dir: Path, *, max_context: int | None = None) -> Renderer:
        """Read a transformers directory. Raises ValueError, saying what is wrong, if it cannot be used."""
        return cls(TextFiles.read(Path(model_dir), max_context))

    # ---- prompts

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The prompt's ids. Raises RequestInvalid, and ContextLengthExceeded when the text alone shows it."""
        read = self._read(messages)
        self._check_chars(sum(len(message["content"]) for message in read))
        text = self._rendered(read, add_generation_prompt)
        return [i for i in self._tokenizer.encode(text) if i != BORDER]

    def encode(self, text: str) -> list[int]:
        """A plain prompt's ids, behind one beginning-of-sequence token if the base has it; special tokens stay text."""
        self._check_chars(len(text))
        return self._prefix + self.encode_text(text)

    encode_prompt = encode

    def encode_text(self, text: str) -> list[int]:
        """Ids of text that continues a prompt: nothing in front, special tokens stay text."""
        return self._tokenizer.encode(_checked(text, "prompt"))

    # ---- training

    def render_training(self, messages: Sequence[Message], train_on: str = "all_assistant") -> TrainingTokens:
        """A conversation's ids; labels are the content of each answer and its end-of-turn token.

        `train_on` is "all_assistant" or "last_assistant"; answers of weight 0 are never learned. Raises RequestInvalid
        where the ids before a learned answer would not be its prompt's, as with a template that rewrites history.
        """
        if train_on not in ("all_assistant", "last_assistant"):
            raise ValueError(f"unknown train_on: {train_on}")
        read = self._read(messages)
        answers = [n for n, message in enumerate(read) if message["role"] == "assistant"]
        considered = answers if train_on == "all_assistant" else answers[-1:]
        learned = {n for n in considered if messages[n].get("weight", 1) != 0}
        text = self._rendered(read, add_generation_prompt=False)
        befores = _befores(text, self._tokenizer.border)
        if len(befores) != len(answers):
            raise RequestInvalid("The chat template leaves out or repeats an answer.", param="messages")
        for n, before in zip(answers, befores, strict=True):
            if n in learned and before != self._rendered(read[:n], add_generation_prompt=True):
                raise RequestInvalid(
                    "The chat template shows earlier messages differently later on: learn the last answer only.",
                    param=f"messages[{n}]",
                )
        return self._label(self._tokenizer.encode(text), [n in learned for n in answers])

    def render_completion(self, prompt: str, completion: str) -> TrainingTokens:
        """Plain text without a template: the labels are the completion and the end-of-sequence token."""
        before, after = self.encode(prompt), [*self.encode_text(completion), self.end_id]
        return TrainingTokens(before + after, [False] * len(before) + [True] * len(after))

    def _label(self, rendered: list[int], learned: list[bool]) -> TrainingTokens:
        ids: list[int] = []
        labels: list[bool] = []
        remaining = iter(learned)
        is_label = False
        for token in rendered:
            if token == BORDER:
                if is_label:
                    break
                is_label = next(remaining)
                continue
            ids.append(token)
            labels.append(is_label)
            is_label = is_label and token not in self._special_ids
        if is_label:
            raise RequestInvalid("The chat template does not end an answer with a special token.", param="messages")
        return TrainingTokens(ids, labels)

    # ---- text

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        """A fresh detokenizer for what follows `prompt`."""
        return Detokenizer(self.tokens, at_start=not prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of whole ids, special tokens left out."""
        stream = self.stream(())
        return "".join([stream.feed(i) for i in ids]) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        return self.tokens.token_bytes(token)

    def token_text(self, token: int) -> str:
        return self.tokens.token_text(token)

    # ---- the template

    def _rendered(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The template's text as the tokenizer takes it: its own special tokens sealed, a border before each answer."""
        if self._template is None:
            raise UnsupportedParameter(
                "This base model has no chat template; use /v1/completions.", param="messages", code="invalid_value"
            )
        hidden = [{**message, "content": self._tokenizer.hide(message["content"])} for message in messages]
        text = self._template.render(self._bordered(hidden), add_generation_prompt=add_generation_prompt)
        if hidden != list(messages) and not any(self._tokenizer.specials_in(m["content"]) for m in messages):
            # A template may look into the messages (some drop what stands between <think> and </think>). Nothing in
            # these spells a special token, so they may be shown to it as they are, unless that brings one about.
            plain = self._template.render(self._bordered(messages), add_generation_prompt=add_generation_prompt)
            if self._tokenizer.specials_in(plain) == self._tokenizer.specials_in(text):
                text = plain
        return self._tokenizer.seal(self._settle_borders(text))

    def _bordered(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Messages with the border in each answer, behind leading blanks: a template that trims shall find those."""
        result = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                words = content.lstrip()
                content = content[: len(content) - len(words)] + self._tokenizer.border + words
            result.append({**message, "content": content})
        return result

    def _settle_borders(self, text: str) -> str:
        """Move each border to the end of the generation prompt's header: blanks that follow it are the answer's."""
        parts = text.split(self._tokenizer.border)
        for n in range(len(parts) - 1):
            part = parts[n]
            blank = len(part.rstrip())
            start = max(0, blank - len(self._header))
            found = part.rfind(self._header, start) if self._header else -1
            end = found + len(self._header) if found >= 0 else len(part) if self._header else blank
            parts[n], parts[n + 1] = part[:end], part[end:] + parts[n + 1]
        return self._tokenizer.border.join(parts)

    def _read(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        if not messages:
            raise RequestInvalid("There must be at least one message.", param="messages")
        return [self._read_one(message, f"messages[{n}]") for n, message in enumerate(messages)]

    def _read_one(self, message: Message, place: str) -> dict[str, str]:
        role = message.get("role")
        if role in ("tool", "function"):
            raise UnsupportedParameter("Tool messages are not supported here yet.", param=f"{place}.role")
        if role not in ("system", "developer", "user", "assistant"):
            raise RequestInvalid("A role is system, developer, user or assistant.", param=f"{place}.role")
        if role == "developer" and self._template is not None and not self._template.knows_developer:
            role = "system"
        return {"role": role, "content": _content(message.get("content"), f"{place}.content")}

    def _check_chars(self, num_chars: int) -> None:
        """Refuse, without tokenizing it, what cannot fit: a token stands for only so many characters."""
        if num_chars > self._max_chars:
            raise ContextLengthExceeded(
                f"The prompt's {num_chars} characters are more than {self.max_context} tokens can stand for.",
                param="messages",
            )

    # ---- what the template is like

    def _probe(self, *roles: str, add_generation_prompt: bool = False) -> str | None:
        """The sealed text of one-letter messages; None where there is no template or it refuses them."""
        messages = [{"role": role, "content": "x"} for role in roles]
        try:
            return None if self._template is None else self._rendered(messages, add_generation_prompt)
        except RequestInvalid:
            return None

    def _find_header(self) -> str:
        """What the template writes to make the assistant speak; "" where it writes nothing."""
        if self._template is None:
            return ""
        asked = [{"role": "user", "content": "x"}]
        try:
            without = self._template.render(asked, add_generation_prompt=False)
            with_prompt = self._template.render(asked, add_generation_prompt=True)
        except RequestInvalid:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    def _refuses_two_user_messages(self) -> bool:
        return self._template is not None and self._probe("user", "user") is None

    def _find_end_of_turn(self) -> int | None:
        """The special token that the template writes behind an answer."""
        text = self._probe("user", "assistant") or ""
        ids = self._tokenizer.encode(text)
        after = ids[ids.index(BORDER) + 1 :] if BORDER in ids else []
        return next((i for i in after if i in self._special_ids), None)


def _befores(text: str, border: str) -> list[str]:
    """What stands before each border of `text`, earlier borders included."""
    ends = []
    at = text.find(border)
    while at >= 0:
        ends.append(at)
        at = text.find(border, at + len(border))
    return [text[:end] for end in ends]


def _content(content: object, place: str) -> str:
    if isinstance(content, str):
        return _checked(content, place)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestInvalid("A message's content is text or a list of text parts.", param=place)
    texts = []
    for n, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedParameter("Only text parts are supported here.", param=f"{place}[{n}]")
        texts.append(_checked(part["text"], f"{place}[{n}].text"))
    return "".join(texts)


def _checked(text: str, place: str) -> str:
    """Raises RequestInvalid for half a surrogate pair, which JSON can carry and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise RequestInvalid("The text has an unpaired surrogate, which is no character.", param=place) from exc
    return text
