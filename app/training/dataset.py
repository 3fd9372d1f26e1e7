"""Bytes -> lines -> JSON objects: reads JSONL, plain or gzipped, in bounded memory. Knows nothing of rows or tokens.

At any moment it holds one chunk and one line; a line over the limit is counted and skipped without being kept, so
that a 1 GB line or a decompression bomb costs a finding, not memory. Any thread.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from app.training.findings import Finding, FindingCode, FindingLog

CHUNK_BYTES = 256 << 10
MAX_GZIP_MEMBERS = 200_000  # each costs a copy of the rest of its chunk; bgzip's 64 KiB members of 8 GiB are 131,072
GZIP_MAGIC = b"\x1f\x8b"
# What people send instead of JSONL, told by the first bytes; the sentence says what to do.
_FOREIGN = (
    (b"PK\x03\x04", "this is a zip archive"),
    (b"BZh", "this is a bzip2 file"),
    (b"\x28\xb5\x2f\xfd", "this is a zstandard file"),
    (b"\xfd7zXZ\x00", "this is an xz file"),
    (b"PAR1", "this is a Parquet file"),
)
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class DatasetLimits:
    """How much of a file is read. Everything beyond is a finding."""

    max_unpacked_bytes: int = 8 << 30
    max_line_bytes: int = 4 << 20
    max_examples: int = 2_000_000
    min_examples: int = 10


class FileFault(Exception):
    """The file as a whole cannot be read further; `finding` says where and why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.sentence())
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Row:
    """One line that is a JSON object."""

    line: int
    value: dict[str, Any]


def unpack(source: BinaryIO, *, max_bytes: int) -> Iterator[bytes]:
    """Yield the content in chunks of at most `CHUNK_BYTES`, gunzipped when it begins with gzip's magic bytes.

    Raises FileFault on damaged gzip, on foreign archives and beyond `max_bytes` of content.
    """
    head = source.read(CHUNK_BYTES)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise FileFault(Finding(1, FindingCode.WRONG_FORMAT, f"{what}; send JSONL or gzip of JSONL"))
    pieces = _gunzip(head, source) if head.startswith(GZIP_MAGIC) else _plain(head, source)
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > max_bytes:
            raise FileFault(Finding(1, FindingCode.FILE_TOO_LARGE, f"the content is larger than {max_bytes} bytes"))
        yield piece


def _plain(head: bytes, source: BinaryIO) -> Iterator[bytes]:
    while head:
        yield head
        head = source.read(CHUNK_BYTES)


def _gunzip(data: bytes, source: BinaryIO) -> Iterator[bytes]:
    """Several gzip members in a row are one content, as gzip itself has it; each output piece is bounded."""
    fault = Finding(1, FindingCode.INVALID_GZIP, "the gzip data is damaged")
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    num_members = 1
    while True:
        try:
            piece = decoder.decompress(data, CHUNK_BYTES)
        except zlib.error as exc:
            raise FileFault(fault) from exc
        if piece:
            yield piece
        if decoder.eof:
            data = decoder.unused_data or source.read(CHUNK_BYTES)
            if not data:
                return
            if (num_members := num_members + 1) > MAX_GZIP_MEMBERS:
                raise FileFault(Finding(1, FindingCode.INVALID_GZIP, "the gzip data has too many members"))
            decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            continue
        data = decoder.unconsumed_tail or source.read(CHUNK_BYTES)
        if not data and not piece:
            raise FileFault(Finding(1, FindingCode.INVALID_GZIP, "the gzip data ends too early; upload it again"))


def split_lines(chunks: Iterable[bytes], *, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number from 1, bytes without the line feed); None stands for a line over the limit.

    The end of the file after a line feed is not a line, so one trailing newline is fine.
    """
    number, held, overlong = 1, bytearray(), False
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if overlong or len(held) + end - start > max_line_bytes:
                yield number, None
            else:
                yield number, bytes(held) + chunk[start:end]
            held.clear()
            number, start, overlong = number + 1, end + 1, False
        if len(held) + len(chunk) - start > max_line_bytes:
            overlong = True
            held.clear()
        elif not overlong:
            held += chunk[start:]
    if overlong:
        yield number, None
    elif held:
        yield number, bytes(held)


def read_rows(source: BinaryIO, limits: DatasetLimits, log: FindingLog) -> Iterator[Row]:
    """Yield each line that is a JSON object; everything else becomes a finding in `log`. Never raises on content."""
    num_lines = 0
    try:
        chunks = unpack(source, max_bytes=limits.max_unpacked_bytes)
        for number, line in split_lines(chunks, max_line_bytes=limits.max_line_bytes):
            num_lines += 1
            if num_lines > limits.max_examples:
                detail = f"the file has more than {limits.max_examples} lines"
                log.add(Finding(number, FindingCode.TOO_MANY_EXAMPLES, detail))
                return
            parsed = _parse_line(number, line, limits)
            if isinstance(parsed, Finding):
                log.add(parsed)
            else:
                yield parsed
    except FileFault as fault:
        log.add(fault.finding)


def _parse_line(number: int, line: bytes | None, limits: DatasetLimits) -> Row | Finding:
    if line is None:
        return Finding(number, FindingCode.LINE_TOO_LONG, f"the line is longer than {limits.max_line_bytes} bytes")
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)  # some editors write it; it carries nothing
    try:
        text = line.decode()
    except UnicodeDecodeError as exc:
        return Finding(number, FindingCode.INVALID_UTF8, _encoding_detail(line, exc.start))
    if not text.strip():
        return Finding(number, FindingCode.EMPTY_LINE, "the line is empty")
    if "\x00" in text:  # valid UTF-8, but the mark of UTF-16 or UTF-32 without a byte order mark
        return Finding(number, FindingCode.INVALID_UTF8, "the line holds zero bytes; save the file as UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        return Finding(number, FindingCode.INVALID_JSON, "the JSON is nested too deeply")
    except ValueError as exc:
        return Finding(number, FindingCode.INVALID_JSON, _json_detail(exc, text))
    if not isinstance(value, dict):
        hint = "one object per line, not one list for all" if isinstance(value, list) else "each line is one object"
        return Finding(number, FindingCode.DATA_TYPE, f"the line is {_json_type(value)}; {hint}")
    if (lone := _lone_surrogate(text, value)) is not None:
        return Finding(number, FindingCode.INVALID_UTF8, f"{lone} is half of a surrogate pair and no character")
    return Row(number, value)


def _encoding_detail(line: bytes, position: int) -> str:
    if line.startswith(_UTF16_MARKS):
        return "the file is UTF-16; save it as UTF-8"
    return f"byte {position + 1} of the line is not UTF-8; save the file as UTF-8"


def _json_detail(exc: ValueError, text: str) -> str:
    if isinstance(exc, json.JSONDecodeError):
        if text.strip() in ("[", "{"):
            return "the JSON goes on over several lines; write one object per line"
        return f"not JSON at column {exc.colno}: {exc.msg}"
    if isinstance(exc, _RowFault):
        return str(exc)
    return "a number has too many digits"


class _RowFault(ValueError):
    """The JSON parses, but says something twice or no number."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RowFault(f"the key {twice[:60]!r} stands twice in one object")
    return value


def _refuse_constant(name: str) -> Any:
    raise _RowFault(f"{name} is not JSON")


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _lone_surrogate(text: str, value: dict[str, Any]) -> str | None:
    """The first half surrogate that an escape made, in any string of `value`; cheap when there is no escape."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    dumped = json.dumps(value, ensure_ascii=False)
    bad = next((char for char in dumped if "\ud800" <= char <= "\udfff"), None)
    return None if bad is None else f"\\u{ord(bad):04x}"


class EncodingCheck:
    """What an upload is checked for: it is text in UTF-8, or gzip of it, within the size. One upload each.

    Rows are not looked at here: that is the job's validation. Bounded memory.
    """

    def __init__(self, *, max_unpacked_bytes: int) -> None:
        self._max_unpacked_bytes = max_unpacked_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1
        self._total = 0

    def check(self, source: BinaryIO) -> None:
        """Read `source` to its end. Raises FileFault with the first fault."""
        for piece in unpack(source, max_bytes=self._max_unpacked_bytes):
            self._feed(piece)
        self._feed(b"", final=True)
        if self._total == 0:
            raise FileFault(Finding(1, FindingCode.EMPTY_LINE, "the file is empty"))

    def _feed(self, piece: bytes, *, final: bool = False) -> None:
        if self._total == 0 and piece.startswith(_UTF16_MARKS):
            raise FileFault(Finding(1, FindingCode.INVALID_UTF8, "the file is UTF-16; save it as UTF-8"))
        self._total += len(piece)
        try:
            self._decoder.decode(piece, final)
        except UnicodeDecodeError as exc:
            line = self._line + exc.object[: exc.start].count(b"\n")
            detail = "the line is not UTF-8; save the file as UTF-8"
            raise FileFault(Finding(line, FindingCode.INVALID_UTF8, detail)) from exc
        self._line += piece.count(b"\n")
