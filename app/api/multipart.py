"""A multipart body with one file, read as it arrives: small fields to memory, the file straight to disk, all capped."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
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


def _missing(part: str) -> Exception:
    return RequestInvalid(f"Missing required part: '{part}'.", param=part)


@dataclass(frozen=True, slots=True)
class FormShape:
    """What a route takes: the name of its file part, the names of its other parts, and how large each may be."""

    file: str
    max_file_bytes: int
    fields: Mapping[str, int] = field(default_factory=dict)
    too_large: Mapping[str, Callable[..., Exception]] = field(default_factory=dict)  # by part, where not the usual
    missing: Callable[[str], Exception] = _missing  # (part): where there is no file


@dataclass(frozen=True, slots=True)
class Form:
    """What came. `path` lives until the end of the block that received it."""

    fields: Mapping[str, bytes]
    filename: str
    path: Path
    sha256: str  # of all parts and the filename: two forms that say the same have the same

    def text(self, name: str) -> str | None:
        """A field as text; None where it was not sent. Raises RequestInvalid."""
        try:
            value = self.fields[name].decode()
        except KeyError:
            return None
        except UnicodeDecodeError:
            raise RequestInvalid("Fields of a form are UTF-8.", param=name) from None
        check_storable([value])
        return value


class _Reader:
    """The parser's callbacks: which part the bytes belong to, and how many it may have."""

    def __init__(self, boundary: bytes, shape: FormShape) -> None:
        self.fields: dict[str, bytearray] = {}
        self.filename: str | None = None
        self.pending = bytearray()  # of the file, not yet written
        self.is_complete = False
        self._shape = shape
        self._caps = {**shape.fields, shape.file: shape.max_file_bytes}
        self._header_name, self._header_value, self._disposition = bytearray(), bytearray(), b""
        self._part, self._target, self._num_bytes = "", self.pending, 0
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_header(self._header_name, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(self._header_value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, start, end: self._add_data(memoryview(data)[start:end]),
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
        if name not in self._caps:
            raise UnknownParameter(f"Unknown part: '{name}'. Send {', '.join(self._caps)}.", param=name or None)
        is_file = name == self._shape.file
        if name in self.fields or (is_file and self.filename is not None):
            raise RequestInvalid(f"The part '{name}' is there twice.", param=name)
        self._part, self._num_bytes = name, 0
        if is_file:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:MAX_FILENAME_CHARS]
            self._target = self.pending
        else:
            self._target = self.fields[name] = bytearray()

    def _add_data(self, data: memoryview) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._caps[self._part]:
            message = f"'{self._part}' is larger than the {self._caps[self._part]} bytes allowed here."
            usual = FileTooLarge if self._part == self._shape.file else RequestInvalid
            raise self._shape.too_large.get(self._part, usual)(message, param=self._part)
        self._target += data

    def _end(self) -> None:
        self.is_complete = True


@asynccontextmanager
async def received_form(request: Request, context: ApiContext, shape: FormShape) -> AsyncIterator[Form]:
    """Read the body; its scratch file is gone when the block ends, however it ends.

    Raises RequestInvalid for a body that is no such form, FileTooLarge for a file above its size; or as the shape says.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise RequestInvalid("Send the body as multipart/form-data with a boundary.", param=shape.file)
    reader, digest = _Reader(boundary, shape), hashlib.sha256()
    directory = Path(await context.disk(tempfile.mkdtemp, dir=context.services.scratch, prefix="upload-"))
    try:
        path = directory / "file"
        with path.open("wb") as target:

            def write(data: bytes) -> None:
                target.write(data)
                digest.update(data)

            async for chunk in request.stream():
                reader.feed(chunk)
                if len(reader.pending) >= FLUSH_BYTES:
                    await context.disk(write, reader.take())
            await context.disk(write, reader.take())
        yield _form(reader, shape, path, digest.digest())
    finally:
        await context.disk(shutil.rmtree, directory, ignore_errors=True)


def _form(reader: _Reader, shape: FormShape, path: Path, file_sha256: bytes) -> Form:
    if not reader.is_complete:
        raise RequestInvalid("The multipart body ends in the middle.")
    if reader.filename is None:
        raise shape.missing(shape.file)
    check_storable([reader.filename])
    fields = {name: bytes(value) for name, value in reader.fields.items()}
    said = repr((sorted(fields.items()), reader.filename, file_sha256)).encode()
    return Form(fields, reader.filename or shape.file, path, hashlib.sha256(said).hexdigest())
