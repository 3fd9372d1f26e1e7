"""Bad data files, each with its exact code and line; bombs, long lines and odd encodings in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.training.dataset import DatasetLimits, EncodingCheck, FileFault, read_rows, split_lines
from app.training.dataset_rows import Method
from app.training.findings import MAX_KEPT, FindingLog
from app.training.fitting import PrepareOptions
from app.training.prepare import DataRefused, TrainingSet, prepare
from tests.byte_renderer import END, ByteRenderer

GOOD = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}


class AlternatingRenderer(ByteRenderer):
    alternating_roles = True


def jsonl(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def user(content: object = "ab", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: object = "cd", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: object = "{}", call_id: object = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def read(
    data: bytes,
    tmp_path: Path,
    *,
    valid: bytes | None = None,
    method: Method = Method.SUPERVISED,
    on_long: str = "error",
    max_seq_length: int = 100,
    renderer: ByteRenderer | None = None,
    limits: DatasetLimits | None = None,
) -> TrainingSet:
    tmp_path.mkdir(exist_ok=True)
    train_path, valid_path = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    train_path.write_bytes(data)
    if valid is not None:
        valid_path.write_bytes(valid)
    options = PrepareOptions(method, max_seq_length=max_seq_length, on_long=on_long)
    return prepare(
        train_path,
        valid_path if valid is not None else None,
        options,
        renderer or ByteRenderer(),
        scratch=tmp_path,
        limits=limits or DatasetLimits(min_examples=1),
    )


def first_finding(data: bytes, tmp_path: Path, **kwargs: Any) -> tuple[str, int, int | None, str | None]:
    with pytest.raises(DataRefused) as refused:
        read(data, tmp_path, **kwargs)
    found = refused.value.findings.errors[0]
    return found.code.value, found.line, found.message, found.field


DEEP = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BAD_ROWS: list[tuple[str, object, tuple[str, int | None, str | None]]] = [
    ("not json", b'{"messages": [', ("invalid_json", None, None)),
    ("a python literal", b"{'messages': []}", ("invalid_json", None, None)),
    ("NaN", b'{"messages": NaN}', ("invalid_json", None, None)),
    ("a key twice", b'{"messages": [], "messages": []}', ("invalid_json", None, None)),
    ("nested too deeply", DEEP, ("invalid_json", None, None)),
    ("a number of 5,000 digits", b'{"messages": ' + b"1" * 5000 + b"}", ("invalid_json", None, None)),
    ("text after the object", b'{"messages": []} {}', ("invalid_json", None, None)),
    ("latin-1", '{"messages": "ü"}'.encode("latin-1"), ("invalid_utf8", None, None)),
    ("half a surrogate pair", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ("invalid_utf8", None, None)),
    ("a raw zero byte", b'{"messages": "\x00"}', ("invalid_utf8", None, None)),
    ("an empty line", b"", ("empty_line", None, None)),
    ("a line of blanks", b" \t\r", ("empty_line", None, None)),
    ("a list", [GOOD], ("data_type", None, None)),
    ("a string", "hello", ("data_type", None, None)),
    ("null", None, ("data_type", None, None)),
    ("no messages", {}, ("missing_messages_list", None, "messages")),
    ("messages not a list", {"messages": "hi"}, ("missing_messages_list", None, "messages")),
    ("no message", {"messages": []}, ("missing_messages_list", None, "messages")),
    ("a message that is no object", chat(user(), "hi"), ("message_missing_key", 2, None)),  # type: ignore[arg-type]
    ("no role", chat({"content": "hi"}, answer()), ("message_missing_key", 1, "role")),
    ("neither content nor calls", chat(user(), {"role": "assistant"}), ("message_missing_key", 2, "content")),
    ("an unknown message key", chat(user(), answer(mood="sad")), ("message_unrecognized_key", 2, "mood")),
    ("function_call", chat(user(), answer(function_call={})), ("message_unrecognized_key", 2, "function_call")),
    ("an unknown role", chat({"role": "human", "content": "hi"}, answer()), ("unrecognized_role", 1, "role")),
    ("a role that is a list", chat({"role": [], "content": "hi"}, answer()), ("unrecognized_role", 1, "role")),
    ("empty content", chat(user(""), answer()), ("missing_content", 1, "content")),
    ("null content", chat(user(), answer(None)), ("missing_content", 2, "content")),
    ("content that is a number", chat(user(7), answer()), ("missing_content", 1, "content")),
    ("an image part", chat(user([{"type": "image_url"}]), answer()), ("missing_content", 1, "content")),
    ("content and refusal", chat(user(), answer("a", refusal="b")), ("missing_content", 2, "refusal")),
    ("a name that is a number", chat(user(name=3), answer()), ("missing_content", 1, "name")),
    ("no assistant", chat(user()), ("example_missing_assistant_message", None, None)),
    ("weight 2", chat(user(), answer(weight=2)), ("invalid_weight", 2, "weight")),
    ("weight true", chat(user(), answer(weight=True)), ("invalid_weight", 2, "weight")),
    ("weight 1.0", chat(user(), answer(weight=1.0)), ("invalid_weight", 2, "weight")),
    ("a user's weight", chat(user(weight=1), answer()), ("invalid_weight", 1, "weight")),
    ("a tool answer to no call", chat(user(), {"role": "tool", "content": "1", "tool_call_id": "x"}, answer()),
     ("tool_reference", 2, "tool_call_id")),
    ("call arguments that are no JSON", chat(user(), answer(None, tool_calls=[call("{")])),
     ("tool_reference", 2, "tool_calls")),
    ("a call without an id", chat(user(), answer(None, tool_calls=[call(call_id=None)])),
     ("tool_reference", 2, "tool_calls")),
    ("a sound tool call", chat(user(), answer(None, tool_calls=[call()])), ("tools_unsupported", 2, "tool_calls")),
    ("tools", chat(user(), answer(), tools=[{"type": "function"}]), ("tools_unsupported", None, "tools")),
    ("an unknown row key", chat(user(), answer(), id=3), ("row_unrecognized_key", None, "id")),
    ("a preference row", {"input": {}, "preferred_output": []}, ("wrong_format", None, None)),
    ("messages and a prompt", GOOD | {"prompt": "a", "completion": "b"}, ("wrong_format", None, None)),
    ("a prompt alone", {"prompt": "a"}, ("wrong_format", None, "completion")),
    ("an empty completion", {"prompt": "a", "completion": ""}, ("missing_content", None, "completion")),
    ("a completion that is a list", {"prompt": "a", "completion": []}, ("missing_content", None, "completion")),
    ("all weights 0", chat(user(), answer(weight=0)), ("no_trainable_tokens", None, None)),
    ("too many tokens", chat(user("x" * 200), answer()), ("too_long", None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [pytest.param(row, want, id=name) for name, row, want in BAD_ROWS])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_bad_row_is_told_with_code_and_line(row: object, expected: Any, packed: bool, tmp_path: Path) -> None:
    data = jsonl(GOOD, GOOD, row, GOOD)
    code, message, field = expected
    assert first_finding(gzip.compress(data, mtime=0) if packed else data, tmp_path) == (code, 3, message, field)


PAIR = {"input": {"messages": [user()]}, "preferred_output": [answer("x")], "non_preferred_output": [answer("y")]}

BAD_PAIRS: list[tuple[str, object, tuple[str, int | None, str | None]]] = [
    ("a chat row", GOOD, ("wrong_format", None, None)),
    ("no input", {k: v for k, v in PAIR.items() if k != "input"}, ("missing_messages_list", None, "input")),
    ("input without messages", PAIR | {"input": {}}, ("missing_messages_list", None, "input.messages")),
    ("no rejected output", {k: v for k, v in PAIR.items() if k != "non_preferred_output"},
     ("missing_messages_list", None, "non_preferred_output")),
    ("an output of the user", PAIR | {"preferred_output": [user()]},
     ("example_missing_assistant_message", None, "preferred_output")),
    ("tools in input", PAIR | {"input": {"messages": [user()], "tools": [{}]}},
     ("tools_unsupported", None, "input.tools")),
    ("an unknown key", PAIR | {"score": 1}, ("row_unrecognized_key", None, "score")),
    ("an unknown key in input", PAIR | {"input": {"messages": [user()], "x": 1}},
     ("row_unrecognized_key", None, "input.x")),
    ("a long answer", PAIR | {"preferred_output": [answer("x" * 200)]}, ("too_long", None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [pytest.param(row, want, id=name) for name, row, want in BAD_PAIRS])
def test_bad_preference_row_is_told_with_code_and_line(row: object, expected: Any, tmp_path: Path) -> None:
    code, message, field = expected
    assert first_finding(jsonl(PAIR, row), tmp_path, method=Method.DPO) == (code, 2, message, field)


WHOLE_FILES: list[tuple[str, bytes, tuple[str, int]]] = [
    ("zip", b"PK\x03\x04rest", ("wrong_format", 1)),
    ("parquet", b"PAR1rest", ("wrong_format", 1)),
    ("utf-16", jsonl(GOOD).decode().encode("utf-16"), ("invalid_utf8", 1)),
    ("utf-16 without a mark", jsonl(GOOD).decode().encode("utf-16-le"), ("invalid_utf8", 1)),
    ("utf-32", jsonl(GOOD).decode().encode("utf-32"), ("invalid_utf8", 1)),
    ("pretty-printed", json.dumps([GOOD], indent=1).encode(), ("invalid_json", 1)),
    ("one JSON list", json.dumps([GOOD, GOOD]).encode(), ("data_type", 1)),
    ("csv", b"prompt,completion\na,b\n", ("invalid_json", 1)),
    ("two newlines at the end", jsonl(GOOD) + b"\n", ("empty_line", 2)),
    ("gzip cut off", gzip.compress(jsonl(*[GOOD] * 50), mtime=0)[:-9], ("invalid_gzip", 1)),
    (
        "gzip with a flipped byte",
        gzip.compress(jsonl(GOOD), mtime=0)[:-6] + b"\x00\x01\x02\x03\x04\x05",
        ("invalid_gzip", 1),
    ),
    ("gzip with a tail", gzip.compress(jsonl(GOOD), mtime=0) + b"tail", ("invalid_gzip", 1)),
]


@pytest.mark.parametrize(("data", "expected"), [pytest.param(data, want, id=name) for name, data, want in WHOLE_FILES])
def test_bad_file_is_told_with_code_and_line(data: bytes, expected: tuple[str, int], tmp_path: Path) -> None:
    assert first_finding(data, tmp_path)[:2] == expected


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(jsonl(GOOD, GOOD)[:-1], id="no newline at the end"),
        pytest.param(jsonl(GOOD, GOOD).replace(b"\n", b"\r\n"), id="windows line ends"),
        pytest.param(codecs.BOM_UTF8 + jsonl(GOOD, GOOD), id="utf-8 byte order mark"),
        pytest.param(gzip.compress(jsonl(GOOD), mtime=0) + gzip.compress(jsonl(GOOD), mtime=0), id="two gzip members"),
        pytest.param(jsonl(GOOD, chat(user([{"type": "text", "text": "ab"}]), answer())), id="text parts"),
        pytest.param(jsonl(GOOD, chat(user(), answer(None, refusal="cd"))), id="a refusal"),
        pytest.param(jsonl(GOOD, GOOD | {"tools": []}), id="no tools, said so"),
    ],
)
def test_good_file_is_read(data: bytes, tmp_path: Path) -> None:
    training = read(data, tmp_path)
    assert len(training.train) == 2
    assert training.train[1][0].ids.tolist() == training.train[0][0].ids.tolist()


def test_every_finding_is_counted_and_the_first_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DataRefused) as refused:
        read(jsonl(*[b"x"] * 200, {}), tmp_path)
    report = refused.value.findings.to_dict()
    assert report["counts"] == {"invalid_json": 200, "missing_messages_list": 1}
    assert [finding["line"] for finding in report["findings"]] == list(range(1, MAX_KEPT + 1))
    assert "line 1:" in str(refused.value)
    assert "200 more" in str(refused.value)


def test_too_few_examples_are_refused_in_openais_words(tmp_path: Path) -> None:
    with pytest.raises(
        DataRefused, match=r"Training file has 7 example\(s\), but must have at least 10 examples"
    ) as refused:
        read(jsonl(*[GOOD] * 7), tmp_path, limits=DatasetLimits())
    assert (refused.value.code, refused.value.param) == ("invalid_n_examples", "training_file")


def test_bad_validation_file_is_blamed_on_the_validation_file(tmp_path: Path) -> None:
    with pytest.raises(DataRefused) as refused:
        read(jsonl(GOOD), tmp_path, valid=jsonl(GOOD, b"x"))
    assert (refused.value.code, refused.value.param) == ("invalid_validation_file", "validation_file")
    assert refused.value.findings.errors[0].line == 2


class Zeros(io.RawIOBase):
    """Endless blanks without a newline; counts what was asked for."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def read(self, size: int = -1) -> bytes:
        taken = min(self.left, size)
        self.left -= taken
        return b" " * taken


def peak_bytes(source: Any, limits: DatasetLimits) -> tuple[int, FindingLog]:
    log = FindingLog()
    tracemalloc.start()
    try:
        for _ in read_rows(source, limits, log):
            pass
        return tracemalloc.get_traced_memory()[1], log
    finally:
        tracemalloc.stop()


def test_decompression_bomb_is_stopped_in_bounded_memory() -> None:
    bomb = gzip.compress(b"\n" * 1000 + b" " * (64 << 20), 9, mtime=0)
    assert len(bomb) < 100_000
    limits = DatasetLimits(max_unpacked_bytes=16 << 20)
    peak, log = peak_bytes(io.BytesIO(bomb), limits)
    assert log.counts["file_too_large"] == 1
    assert peak < 8 << 20


def test_line_without_end_is_skipped_in_bounded_memory() -> None:
    limits = DatasetLimits(max_unpacked_bytes=64 << 20, max_line_bytes=1 << 20)
    peak, log = peak_bytes(Zeros(48 << 20), limits)
    assert [(finding.code.value, finding.line) for finding in log.errors] == [("line_too_long", 1)]
    assert peak < 6 << 20


def test_line_after_an_overlong_one_keeps_its_number() -> None:
    lines = list(split_lines([b"a\n", b"b" * 50, b"b" * 50 + b"\nc", b"\nd"], max_line_bytes=60))
    assert lines == [(1, b"a"), (2, None), (3, b"c"), (4, b"d")]


@pytest.mark.parametrize(("size", "kept"), [(60, True), (61, False)])
def test_line_limit_is_exact_however_the_chunks_fall(size: int, kept: bool) -> None:
    data = b"x" * size + b"\ny\n"
    for step in (1, 7, 60, 61, 62, 100):
        chunks = [data[start : start + step] for start in range(0, len(data), step)]
        assert [line is not None for _, line in split_lines(chunks, max_line_bytes=60)] == [kept, True]


def test_line_of_a_megabyte_is_told_as_too_long_for_the_model(tmp_path: Path) -> None:
    data = jsonl(GOOD, chat(user("x" * (1 << 20)), answer()), GOOD)
    assert first_finding(data, tmp_path)[:2] == ("too_long", 2)


def test_200_000_tiny_lines_cost_counts_not_memory(tmp_path: Path) -> None:
    with pytest.raises(DataRefused) as refused:
        read(b"{}\n" * 200_000, tmp_path)
    log = refused.value.findings
    assert log.counts == {"missing_messages_list": 200_000}
    assert len(log.errors) == MAX_KEPT
    peak, _ = peak_bytes(io.BytesIO(b"{}\n" * 10_000), DatasetLimits())  # tracing every line of 200,000 takes long
    assert peak < 2 << 20


def test_more_lines_than_allowed_end_the_reading(tmp_path: Path) -> None:
    limits = DatasetLimits(max_examples=3, min_examples=1)
    assert first_finding(jsonl(*[GOOD] * 5), tmp_path, limits=limits)[:2] == ("too_many_examples", 4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ("empty_line", 1)),
        (b"a\nb\n\xff\n", ("invalid_utf8", 3)),
        (b"a\nb\xc3", ("invalid_utf8", 2)),
        (gzip.compress(b"a\n\xff\n", mtime=0), ("invalid_utf8", 2)),
        (gzip.compress(b" " * (2 << 20), mtime=0), ("file_too_large", 1)),
        ("a\n".encode("utf-16"), ("invalid_utf8", 1)),
        (b"PK\x03\x04", ("wrong_format", 1)),
    ],
)
def test_upload_is_checked_for_size_and_encoding(data: bytes, expected: tuple[str, int]) -> None:
    with pytest.raises(FileFault) as fault:
        EncodingCheck(max_unpacked_bytes=1 << 20).check(io.BytesIO(data))
    assert (fault.value.finding.code.value, fault.value.finding.line) == expected


def test_character_cut_by_a_chunk_border_is_sound() -> None:
    EncodingCheck(max_unpacked_bytes=1 << 20).check(io.BytesIO(b"x" * ((256 << 10) - 1) + "ü\n".encode()))


# ---- what is made of good rows


def test_labels_are_assistant_content_and_its_end(tmp_path: Path) -> None:
    row = chat(user("ab"), answer("cd", weight=0), user("ef"), answer("gh"))
    (sequence,) = read(jsonl(row), tmp_path).train[0]
    learned = sequence.ids[sequence.labels].tolist()
    assert learned == [ord("g") + 10, ord("h") + 10, END]


def test_completion_is_learned_with_its_end_token_and_without_a_template(tmp_path: Path) -> None:
    (sequence,) = read(jsonl({"prompt": "a", "completion": "b"}), tmp_path).train[0]
    assert sequence.ids.tolist() == [1, ord("a") + 10, ord("b") + 10, END]
    assert sequence.labels.tolist() == [False, False, True, True]


def test_first_token_is_never_a_label(tmp_path: Path) -> None:
    class NoBos(ByteRenderer):
        def encode_prompt(self, text: str) -> list[int]:
            return self.encode_text(text)

    (sequence,) = read(jsonl({"prompt": "", "completion": "bc"}), tmp_path, renderer=NoBos()).train[0]
    assert sequence.labels.tolist() == [False, True, True]


def test_pair_learns_only_what_differs(tmp_path: Path) -> None:
    row = PAIR | {"input": {"messages": [user("ab"), answer("old"), user("cd")]}}
    training = read(jsonl(row), tmp_path, method=Method.DPO)
    better, worse = training.train[0]
    assert better.ids[better.labels].tolist() == [ord("x") + 10, END]
    assert worse.ids[worse.labels].tolist() == [ord("y") + 10, END]
    assert training.train.num_tokens.tolist() == [len(better.ids) + len(worse.ids)]
    assert training.train.num_labels.tolist() == [4]


def test_long_conversation_loses_its_oldest_turns_and_keeps_the_system_message(tmp_path: Path) -> None:
    turns = [message for n in range(6) for message in (user(f"q{n}"), answer(f"a{n}"))]
    row = chat({"role": "system", "content": "S"}, *turns)
    training = read(jsonl(row), tmp_path, on_long="truncate_left", max_seq_length=30)
    expected, _ = ByteRenderer().render_training([{"role": "system", "content": "S"}, *turns[-6:]], "all_assistant")
    assert training.train[0][0].ids.tolist() == expected
    assert training.report.training.truncated == 1


def test_long_prompt_loses_its_beginning_and_keeps_bos(tmp_path: Path) -> None:
    row = {"prompt": "0123456789", "completion": "ab"}
    (sequence,) = read(jsonl(row), tmp_path, on_long="truncate_left", max_seq_length=8).train[0]
    assert sequence.ids.tolist() == [1, *(ord(c) + 10 for c in "6789ab"), END]


def test_turn_that_fits_nowhere_is_a_finding_also_when_truncating(tmp_path: Path) -> None:
    data = jsonl(GOOD, chat(user("x" * 200), answer()))
    assert first_finding(data, tmp_path, on_long="truncate_left")[:2] == ("too_long", 2)


def test_dropped_rows_are_counted(tmp_path: Path) -> None:
    training = read(jsonl(GOOD, chat(user("x" * 200), answer()), GOOD), tmp_path, on_long="drop")
    assert (len(training.train), training.report.training.dropped) == (2, 1)
    assert training.train.table.lines.tolist() == [1, 3]


def test_role_order_is_asked_only_where_the_template_wants_it(tmp_path: Path) -> None:
    row = chat(user(), user(), answer())
    assert len(read(jsonl(row), tmp_path).train) == 1
    assert first_finding(jsonl(row), tmp_path, renderer=AlternatingRenderer()) == ("role_order", 1, 2, "role")


def numbered(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    return (chat(user(f"q{n}"), answer(f"a{n}")) for n in range(start, start + count))


@pytest.mark.parametrize(("count", "held"), [(49, 0), (50, 10), (200, 20), (6000, 500)])
def test_tenth_is_held_out_from_fifty_rows_on(count: int, held: int, tmp_path: Path) -> None:
    training = read(jsonl(*numbered(count)), tmp_path)
    assert training.report.held_out == held
    assert len(training.train) == count - held
    assert (training.valid is None) == (held == 0)


def test_hold_out_is_the_same_in_any_order_and_never_trained_on(tmp_path: Path) -> None:
    rows = [*numbered(80), *numbered(20)]  # 20 of them twice
    one, two = read(jsonl(*rows), tmp_path / "a"), read(jsonl(*reversed(rows)), tmp_path / "b")

    def contents(examples: Any) -> list[list[int]]:
        return sorted(examples[n][0].ids.tolist() for n in range(len(examples)))

    assert contents(one.valid) == contents(two.valid)
    trained = contents(one.train)
    assert not [row for row in contents(one.valid) if row in trained]


def test_duplicates_and_leaks_are_warnings_with_counts(tmp_path: Path) -> None:
    training = read(jsonl(*numbered(3), *numbered(1)), tmp_path, valid=jsonl(*numbered(2, start=2)))
    report = training.report.to_dict()
    assert report["training"]["duplicate"] == 1
    assert report["leaked"] == 1
    assert report["counts"] == {"duplicate": 1, "train_validation_overlap": 1}
    assert [finding["line"] for finding in report["findings"]] == [4, 1]
    assert training.valid is not None
    assert len(training.valid) == 2


def test_report_counts_tokens_as_stored(tmp_path: Path) -> None:
    training = read(jsonl(*numbered(4)), tmp_path)
    report = training.report.training
    assert report.tokens == int(training.train.num_tokens.sum())
    assert report.label_tokens == int(training.train.num_labels.sum()) == 4 * 3
    assert report.longest_tokens == training.train.max_sequence_tokens


def test_progress_may_stop_the_work(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(rows: int) -> None:
        raise Stop

    path = tmp_path / "f"
    path.write_bytes(jsonl(*numbered(600)))
    with pytest.raises(Stop):
        prepare(
            path, None, PrepareOptions(Method.SUPERVISED, 100), ByteRenderer(), scratch=tmp_path, on_progress=stop
        )  # fmt: skip
