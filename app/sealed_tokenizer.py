"""A tokenizer whose special tokens have secret names, so that no text can spell one. No torch, no HTTP.

Special tokens are the joints of a prompt: who speaks, where a turn ends. A tokenizer finds them by their names, and so
finds them in what a tenant wrote, too. Here their names are drawn at random when the tokenizer is loaded: the renderer
writes those where the chat template meant the special token, and `<|im_end|>` in a message is ten ordinary characters.
All else (normalizing, splitting, what is stripped beside a special token) stays as the base's tokenizer does it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

BORDER = -1  # in encoded ids: where `border` stood in the text

_NUM_SECRET_CHARS = 6  # of 2^16 code points each: 96 bits
_PRIVATE_PLANE = 0xF0000  # code points that no text needs


class SealedTokenizer:
    """Text -> ids. Immutable; any thread."""

    def __init__(self, spec: Mapping[str, Any], sealed: Collection[str]) -> None:
        """`spec` is tokenizer.json; `sealed` names added tokens that count as special though not marked so."""
        added: list[dict[str, Any]] = spec.get("added_tokens") or []
        specials = [token for token in added if token["special"] or token["content"] in sealed]
        others = [token for token in added if token not in specials]
        secret = "".join(chr(_PRIVATE_PLANE + secrets.randbelow(0xFFF0)) for _ in range(_NUM_SECRET_CHARS))
        names = [secret + chr(_PRIVATE_PLANE + n) for n in range(len(specials) + 1)]
        self.border = names[-1]
        self.special_ids = {token["content"]: int(token["id"]) for token in specials}
        self._sealed = {token["content"]: name for token, name in zip(specials, names, strict=False)}
        longest_first = sorted(self._sealed, key=len, reverse=True)  # as the tokenizer matches them
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        openers = sorted({content[0] for content in self._sealed})
        self._hidden = {char: secret + chr(_PRIVATE_PLANE + 0x8000 + n) for n, char in enumerate(openers)}
        self._opener = re.compile("[" + "".join(map(re.escape, openers)) + "]" if openers else "(?!)")
        self._unhidden = {name: char for char, name in self._hidden.items()}
        self._hidden_name = re.compile("|".join(self._unhidden) or "(?!)")

        self._tokenizer = Tokenizer.from_str(
            json.dumps({**spec, "added_tokens": others, "truncation": None, "padding": None})
        )
        self._tokenizer.add_special_tokens(
            [_added(name, token) for name, token in zip(names, [*specials, {}], strict=True)]
        )
        ids = {self._id(name): token["id"] for name, token in zip(names, specials, strict=False)}
        ids |= {self._id(token["content"]): token["id"] for token in others}
        self._true_ids = {sealed_id: true_id for sealed_id, true_id in ids.items() if sealed_id != true_id}
        self._true_ids[self._id(self.border)] = BORDER

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        assert found is not None, "the tokenizer lost a token"
        return found

    def hide(self, text: str) -> str:
        """Replace what special tokens begin with, so that the text, wherever it is put, is part of none."""
        return self._opener.sub(lambda match: self._hidden[match[0]], text)

    def specials_in(self, text: str) -> list[str]:
        """The special tokens that `text` spells, in order."""
        return self._specials.findall(text)

    def seal(self, text: str) -> str:
        """A rendered template's text for `encode`: its special tokens by their secret names, what was hidden shown."""
        sealed = self._specials.sub(lambda match: self._sealed[match[0]], text)
        return self._hidden_name.sub(lambda match: self._unhidden[match[0]], sealed)

    def encode(self, text: str) -> list[int]:
        """Ids; none is added in front or behind. Only sealed names are special tokens.

        The border becomes `BORDER`; no token reaches across it.
        """
        true_ids = self._true_ids
        return [true_ids.get(i, i) for i in self._tokenizer.encode(text, add_special_tokens=False).ids]


def _added(name: str, token: Mapping[str, Any]) -> AddedToken:
    # Not normalized: the name is found before a normalizer could change it.
    return AddedToken(
        name,
        special=True,
        normalized=False,
        lstrip=bool(token.get("lstrip")),
        rstrip=bool(token.get("rstrip")),
        single_word=bool(token.get("single_word")),
    )
