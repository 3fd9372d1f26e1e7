"""Tokens become text without splitting a character; stop strings are found however the text arrives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from app.errors import RequestInvalid
from app.text import Detokenizer, StopStrings, TokenBytes
from tests.tiny import build_tokenizer

SENTENCE_PIECE: dict[str, Any] = {
    "model": {
        "type": "BPE",
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}
        | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
        | {"▁Hello": 259, "▁world": 260, "▁": 261, "é": 262},
    },
    "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "</s>", "special": True}],
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = build_tokenizer(tmp_path_factory.mktemp("tiny"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes(json.loads(tokenizer.to_str()))


def pieces_of(tokens: TokenBytes, ids: list[int], at_start: bool = True) -> list[str]:
    stream = Detokenizer(tokens, at_start=at_start)
    return [*(stream.feed(i) for i in ids), stream.flush()]


class TestDetokenizer:
    @given(text=st.text(max_size=40))
    def test_pieces_joined_are_the_text(self, tokenizer: Tokenizer, tokens: TokenBytes, text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert "".join(pieces_of(tokens, ids)) == text.replace("<|im_end|>", "")

    @given(ids=st.lists(st.integers(0, 296), max_size=30))
    def test_any_ids_give_the_tokenizers_own_text(
        self, tokenizer: Tokenizer, tokens: TokenBytes, ids: list[int]
    ) -> None:
        assert "".join(pieces_of(tokens, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    def test_a_character_is_held_back_until_it_is_whole(self, tokenizer: Tokenizer, tokens: TokenBytes) -> None:
        ids = tokenizer.encode("😀").ids
        assert len(ids) == 4
        assert pieces_of(tokens, ids) == ["", "", "", "😀", ""]

    def test_a_character_that_stays_incomplete_is_told_at_the_end(
        self, tokenizer: Tokenizer, tokens: TokenBytes
    ) -> None:
        ids = tokenizer.encode("😀").ids[:-1]
        assert pieces_of(tokens, ids) == ["", "", "", "\ufffd"]

    def test_special_tokens_are_left_out(self, tokens: TokenBytes) -> None:
        assert pieces_of(tokens, [0, 1, 2]) == ["", "", "", ""]

    def test_ids_beyond_the_tokenizer_have_no_text(self, tokens: TokenBytes) -> None:
        assert pieces_of(tokens, [len(tokens), -1]) == ["", "", ""]
        assert tokens.token_bytes(len(tokens)) == b""

    def test_a_token_costs_the_same_after_many(self, tokens: TokenBytes) -> None:
        stream = Detokenizer(tokens, at_start=True)

        def seconds() -> float:
            start = time.perf_counter()
            for _ in range(5_000):
                stream.feed(50)
            return time.perf_counter() - start

        first = min(seconds() for _ in range(3))
        for _ in range(20):
            seconds()
        assert min(seconds() for _ in range(3)) < 5 * first

    def test_sentence_piece_drops_the_blank_before_a_text_and_keeps_it_after_a_prompt(self) -> None:
        tokens = TokenBytes(SENTENCE_PIECE)
        assert pieces_of(tokens, [1, 259, 260]) == ["", "Hello", " world", ""]
        assert pieces_of(tokens, [259, 260], at_start=False) == [" Hello", " world", ""]

    def test_sentence_piece_bytes_join_to_characters(self) -> None:
        tokens = TokenBytes(SENTENCE_PIECE)
        euro = [3 + byte for byte in "€".encode()]
        assert pieces_of(tokens, [259, *euro]) == ["Hello", "", "", "€", ""]
        assert tokens.token_bytes(262) == "é".encode()

    def test_other_vocabularies_are_refused_at_the_start(self) -> None:
        with pytest.raises(ValueError, match="neither"):
            TokenBytes({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}})


class TestTokenText:
    def test_a_part_of_a_character_is_written_as_its_bytes(self, tokenizer: Tokenizer, tokens: TokenBytes) -> None:
        first = tokenizer.encode("é").ids[0]
        assert tokens.token_bytes(first) == b"\xc3"
        assert tokens.token_text(first) == "bytes:\\xc3"

    def test_blanks_and_special_tokens_are_shown(self, tokenizer: Tokenizer, tokens: TokenBytes) -> None:
        assert tokens.token_text(tokenizer.token_to_id("Ġthe")) == " the"
        assert tokens.token_text(2) == "<|im_end|>"

    def test_the_longest_token_is_known(self, tokens: TokenBytes) -> None:
        assert tokens.longest_chars() == len("<|endoftext|>")


def run_stops(stops: list[str], pushed: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for text in pushed:
        part, stopped = matcher.push(text)
        shown += part
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def slow_stops(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: read on until the text ends with a stop; the longest one counts."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


few_letters = st.text(alphabet="ab", max_size=12)


class TestStopStrings:
    @given(
        stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
        pushed=st.lists(few_letters, max_size=8),
    )
    def test_the_outcome_is_the_definition_however_the_text_is_cut(self, stops: list[str], pushed: list[str]) -> None:
        assert run_stops(stops, pushed) == slow_stops(stops, "".join(pushed))

    @given(stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4), text=few_letters)
    def test_nothing_is_held_back_that_cannot_become_a_stop(self, stops: list[str], text: str) -> None:
        shown, stopped = StopStrings(stops).push(text)
        if not stopped:
            held = text[len(shown) :]
            longest = max(
                (size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0
            )
            assert len(held) == longest

    def test_a_false_start_does_not_hide_the_true_one(self) -> None:
        assert run_stops(["aab"], ["x", "a", "aab", "y"]) == ("xa", True)
        assert run_stops(["abababc"], ["ab"] * 5 + ["c"]) == ("abab", True)

    def test_a_stop_across_tokens_is_not_shown(self) -> None:
        matcher = StopStrings(["\n\nUser:"])
        assert [matcher.push(text) for text in ("Yes.", "\n", "\nUs", "er: no")] == [
            ("Yes.", False),
            ("", False),
            ("", False),
            ("", True),
        ]

    def test_what_turned_out_no_stop_is_shown_late_but_whole(self) -> None:
        matcher = StopStrings(["END"])
        assert matcher.push("the EN") == ("the ", False)
        assert matcher.push("TRY E") == ("ENTRY ", False)
        assert matcher.flush() == "E"
        assert matcher.push("ND") == ("ND", False)

    def test_four_stops_are_enough(self) -> None:
        StopStrings(["a", "b", "c", "d"])
        with pytest.raises(RequestInvalid) as caught:
            StopStrings(["a", "b", "c", "d", "e"])
        assert caught.value.param == "stop"

    def test_an_empty_stop_is_refused(self) -> None:
        with pytest.raises(RequestInvalid):
            StopStrings(["a", ""])

    def test_without_stops_all_is_shown_at_once(self) -> None:
        assert StopStrings([]).push("hello") == ("hello", False)
