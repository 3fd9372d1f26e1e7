"""Token ids -> text: each token's bytes, text that grows token by token, and stop strings in it. No torch, no HTTP.

A token is not a piece of text: with byte-level vocabularies one character may be spread over several tokens. So tokens
become bytes, and bytes become text as soon as a character is whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import RequestInvalid

MAX_STOPS = 4  # as in the OpenAI API
_BLANK = "\u2581"  # SentencePiece writes a blank so


class TokenBytes:
    """The bytes of every token of one tokenizer. Immutable.

    Knows the two kinds of vocabulary that causal language models have: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2)
    and SentencePiece with byte fallback (Llama 2, Mistral, Gemma). Raises ValueError for any other.
    """

    def __init__(self, tokenizer_json: Mapping[str, Any], extra_special_ids: frozenset[int] = frozenset()) -> None:
        decoder = json.dumps(tokenizer_json.get("decoder"))
        if '"ByteLevel"' in decoder:
            to_bytes = _byte_level_bytes
        elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
            to_bytes = _sentence_piece_bytes
        else:
            raise ValueError("the tokenizer is neither byte-level BPE nor SentencePiece with byte fallback")
        added: list[dict[str, Any]] = tokenizer_json.get("added_tokens") or []
        table = {i: to_bytes(token) for token, i in _vocabulary(tokenizer_json["model"]).items()}
        table.update({token["id"]: token["content"].encode() for token in added})
        self.special_ids = extra_special_ids | {token["id"] for token in added if token["special"]}
        self._bytes = [table.get(i, b"") for i in range(max(table) + 1)]
        self._shown = [b"" if i in self.special_ids else data for i, data in enumerate(self._bytes)]
        # SentencePiece puts a blank before the first word of a text; it is no part of the text.
        self.strips_first_blank = '"Strip"' in decoder or (
            '"Metaspace"' in decoder and '"prepend_scheme": "never"' not in decoder
        )

    def __len__(self) -> int:
        return len(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """One token's own bytes, not always valid UTF-8: a special token's spell its name, unknown ids have none."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def token_text(self, token: int) -> str:
        """One token as the OpenAI API writes it: its text, or `bytes:\\xe2\\x82` for a mere part of a character."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def shown_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to an answer: none for special tokens and unknown ids."""
        return self._shown[token] if 0 <= token < len(self._shown) else b""

    def longest_chars(self) -> int:
        """No token stands for more characters than this."""
        return max(sum(byte & 0xC0 != 0x80 for byte in data) for data in self._bytes)  # first bytes of characters


class Detokenizer:
    """The text of one growing sequence, special tokens left out. Constant time per token.

    The pieces returned, joined, are the text of all tokens: none ends within a character, and only bytes that cannot
    become a character any more turn into U+FFFD.
    """

    def __init__(self, tokens: TokenBytes, *, at_start: bool) -> None:
        """`at_start`: nothing comes before the first token that is fed."""
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_blank = at_start and tokens.strips_first_blank

    def feed(self, token: int) -> str:
        """Take one token; returns the text that is certain now, which may be empty."""
        return self._unpadded(self._decoder.decode(self._tokens.shown_bytes(token)))

    def flush(self) -> str:
        """What the incomplete character at the end comes to; the sequence is over."""
        text = self._unpadded(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return text

    def _unpadded(self, text: str) -> str:
        if not self._strip_blank or not text:
            return text
        self._strip_blank = False
        return text.removeprefix(" ")


class StopStrings:
    """Finds the first stop string in a growing text and holds back what might be the start of one.

    First is what ends first; of several that end together, the longest. So the outcome is the same however the text is
    cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestInvalid for more than four stops, or an empty one."""
        if len(stops) > MAX_STOPS:
            raise RequestInvalid(f"There can be at most {MAX_STOPS} stop strings.", param="stop")
        if not all(stops):
            raise RequestInvalid("A stop string cannot be empty.", param="stop")
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; returns what may be shown now and whether a stop string ended it. The stop is not shown."""
        for at, char in enumerate(text):
            found = self._step(char)
            if found:
                whole = self.flush() + text[: at + 1]
                return whole[:-found], True
        whole = self._held + text
        keep = len(whole) - max(self._matched, default=0)
        self._held = whole[keep:]
        return whole[:keep], False

    def flush(self) -> str:
        """The text held back, which did not become a stop string; matching begins anew."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> int:
        """Advance every stop by one character (Knuth-Morris-Pratt); returns the length of the one found, or 0."""
        longest = 0
        for n, (stop, fallbacks) in enumerate(self._stops):
            matched = self._matched[n]
            while matched and stop[matched] != char:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == char
            self._matched[n] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


def _fallbacks(stop: str) -> list[int]:
    """For each leading part of `stop`: the length of its longest proper beginning that it also ends with."""
    lengths = [0]
    for char in stop[1:]:
        length = lengths[-1]
        while length and stop[length] != char:
            length = lengths[length - 1]
        lengths.append(length + (stop[length] == char))
    return lengths


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        return dict(vocab)
    return {entry[0]: i for i, entry in enumerate(vocab)}  # Unigram: pairs of token and score


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for themselves.

    As published with GPT-2: the other bytes, in order, are written with the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()


def _sentence_piece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_BLANK, " ").encode()
