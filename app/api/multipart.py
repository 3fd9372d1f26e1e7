"""A multipart body with one file, read as it arrives: small fields to memory, the file straight to disk, all capped."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.context import ApiContext
from app.api.schemas import check_storable
from app.errors import RequestInvalid, UnknownParameter
from app.training.files import MAX_FILENAME_CHARS, FileTooLarge

MAX_FIELD_BYTES = 1024
MAX_PART_HEADER_BYTES = 8192
MAX_BOUNDARY_BYTES = 256
FLUSH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FormShape:
    """What a route takes: the name of its file part, that file's size, and the names of its text fields."""

    file: str
    max_file_bytes: int
    fields: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Form:
    """What came. `path` lives until the end of the block that received it."""

    values: Mapping[str, str]
    filename: str
    path: Path


class _Reader:
    """The parser's callbacks: which part the bytes belong to, and how many it may have."""

    def __init__(self, boundary: bytes, shape: FormShape) -> None:
        self.values: dict[str, bytearray] = {}
        self.filename: str | None = None
        self.pending = bytearray()  # of the file, not yet written
        self.is_complete = False
        self._shape, self._num_file_bytes = shape, 0
        self._header_name, self._header_value, self._disposition = bytearray(), bytearray(), b""
        self._target = self.pending
        self._in_file = False
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_header(self._header_name, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(self._header_value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, start, end: self._add_data(data[start:end]),
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise RequestInvalid("The multipart body cannot be read.") from None

    def take(self) -> bytes:
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def _begin_part(self) -> None:
        self._disposition = b""
        self._header_name.clear()
        self._header_value.clear()

    def _add_header(self, target: bytearray, data: bytes) -> None:
        target += data
        if len(self._header_name) + len(self._header_value) > MAX_PART_HEADER_BYTES:
            raise RequestInvalid("A part's header is too long.")

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")[:64]
        self._in_file = name == self._shape.file
        if not self._in_file and name not in self._shape.fields:
            raise UnknownParameter(f"Unknown part: '{name}'. Remove it.", param=name or None)
        if name in self.values or (self._in_file and self.filename is not None):
            raise RequestInvalid(f"The part '{name}' is there twice.", param=name)
        if self._in_file:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:MAX_FILENAME_CHARS]
            self._target = self.pending
        else:
            self._target = self.values[name] = bytearray()

    def _add_data(self, data: bytes) -> None:
        self._target += data
        if not self._in_file:
            if len(self._target) > MAX_FIELD_BYTES:
                raise RequestInvalid("A field of the form is too long.")
            return
        self._num_file_bytes += len(data)
        if self._num_file_bytes > self._shape.max_file_bytes:
            message = f"'{self._shape.file}' is larger than the {self._shape.max_file_bytes} bytes allowed here."
            raise FileTooLarge(message, param=self._shape.file)

    def _end(self) -> None:
        self.is_complete = True


@asynccontextmanager
async def received_form(request: Request, context: ApiContext, shape: FormShape) -> AsyncIterator[Form]:
    """Read the body; its scratch file is gone when the block ends, however it ends.

    Raises RequestInvalid for a body that is no such form and FileTooLarge for a file above its cap.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise RequestInvalid("Send the body as multipart/form-data with a boundary.", param=shape.file)
    reader = _Reader(boundary, shape)
    directory = Path(await context.disk(tempfile.mkdtemp, dir=context.services.scratch, prefix="file-"))
    try:
        path = directory / "file"
        with path.open("wb") as target:
            async for chunk in request.stream():
                reader.feed(chunk)
                if len(reader.pending) >= FLUSH_BYTES:
                    await context.disk(target.write, reader.take())
            await context.disk(target.write, reader.take())
        yield _form(reader, shape, path)
    finally:
        await context.disk(shutil.rmtree, directory, ignore_errors=True)


def _form(reader: _Reader, shape: FormShape, path: Path) -> Form:
    if not reader.is_complete:
        raise RequestInvalid("The multipart body ends in the middle.")
    if reader.filename is None:
        raise RequestInvalid(f"Missing required part: '{shape.file}'.", param=shape.file)
    try:
        values = {name: bytes(value).decode() for name, value in reader.values.items()}
    except UnicodeDecodeError:
        raise RequestInvalid("Fields of a form are UTF-8.") from None
    check_storable([*values.values(), reader.filename])
    return Form(values, reader.filename or shape.file, path)
