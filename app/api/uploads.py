"""An adapter's upload: parts read as they arrive, the weights straight to a scratch file, each part capped."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import AdapterConfigTooLarge, AdapterFileMissing, AdapterTooLarge
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from app.api.context import ApiContext
from app.errors import RequestInvalid, UnknownParameter

FIELDS = ("name", "alias")
CONFIG_PART, WEIGHTS_PART = "adapter_config", "adapter_model"
MAX_FIELD_BYTES = 1024
MAX_PART_HEADER_BYTES = 8192
FLUSH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterUpload:
    """What a client sent; `weights` lives until the end of the request."""

    name: str
    alias: str | None
    config: bytes
    weights: Path


@dataclass(slots=True)
class _Part:
    name: str
    max_bytes: int
    num_bytes: int = 0
    data: bytearray = field(default_factory=bytearray)


class _Form:
    """The parser's callbacks: which part the bytes belong to, and how many it may have."""

    def __init__(self, boundary: bytes, *, max_config_bytes: int, max_weights_bytes: int) -> None:
        self.values: dict[str, bytes] = {}
        self.weights = bytearray()  # not yet written
        self.has_weights = False
        self.is_complete = False
        self._caps = dict.fromkeys(FIELDS, MAX_FIELD_BYTES)
        self._caps |= {CONFIG_PART: max_config_bytes, WEIGHTS_PART: max_weights_bytes}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._part: _Part | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise RequestInvalid("The multipart body cannot be read.") from None

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._header_name.clear()
        self._header_value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header_name) + len(self._header_value) > MAX_PART_HEADER_BYTES:
            raise RequestInvalid("A part's header is too long.")

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("latin-1")[:64]
        if name not in self._caps:
            raise UnknownParameter(f"Unknown part: '{name}'. Send {', '.join(self._caps)}.", param=name or None)
        if name in self.values or (name == WEIGHTS_PART and self.has_weights):
            raise RequestInvalid(f"The part '{name}' is there twice.", param=name)
        self.has_weights |= name == WEIGHTS_PART
        self._part = _Part(name, self._caps[name])

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        assert part is not None
        part.num_bytes += end - start
        if part.num_bytes > part.max_bytes:
            if part.name in FIELDS:
                raise RequestInvalid(f"'{part.name}' is too long.", param=part.name)
            refusal = AdapterConfigTooLarge if part.name == CONFIG_PART else AdapterTooLarge
            raise refusal(f"'{part.name}' is larger than {part.max_bytes} bytes.", param=part.name)
        target = self.weights if part.name == WEIGHTS_PART else part.data
        target += memoryview(data)[start:end]

    def _on_part_end(self) -> None:
        part, self._part = self._part, None
        if part is not None and part.name != WEIGHTS_PART:
            self.values[part.name] = bytes(part.data)

    def _on_end(self) -> None:
        self.is_complete = True


@asynccontextmanager
async def received_upload(request: Request, context: ApiContext) -> AsyncIterator[AdapterUpload]:
    """Read the multipart body; the scratch directory is gone when the block ends, however it ends.

    Raises RequestInvalid for a body that is no such form and AdapterTooLarge for a part above its cap.
    """
    services = context.services
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 256:
        raise RequestInvalid("The multipart body has no boundary.")
    limits = services.limits
    form = _Form(boundary, max_config_bytes=limits.max_config_bytes, max_weights_bytes=limits.max_adapter_bytes)
    directory = Path(await context.disk(tempfile.mkdtemp, dir=services.scratch, prefix="upload-"))
    try:
        weights = directory / WEIGHTS_FILE
        with weights.open("wb") as file:
            async for chunk in request.stream():
                form.feed(chunk)
                if len(form.weights) >= FLUSH_BYTES:
                    await _flush(context, form, file)
            await _flush(context, form, file)
        yield _upload(form, weights)
    finally:
        await context.disk(shutil.rmtree, directory, ignore_errors=True)


async def _flush(context: ApiContext, form: _Form, file: BufferedWriter) -> None:
    data, form.weights = form.weights, bytearray()
    if data:
        await context.disk(file.write, data)


def _upload(form: _Form, weights: Path) -> AdapterUpload:
    if not form.is_complete:
        raise RequestInvalid("The multipart body ends in the middle.")
    if "name" not in form.values:
        raise RequestInvalid("Missing required part: 'name'.", param="name")
    for part, file, is_there in (
        (CONFIG_PART, CONFIG_FILE, CONFIG_PART in form.values),
        (WEIGHTS_PART, WEIGHTS_FILE, form.has_weights),
    ):
        if not is_there:
            raise AdapterFileMissing(f"Missing part '{part}': send the file {file}.", param=part)
    try:
        name, alias = form.values["name"].decode(), form.values.get("alias", b"").decode()
    except UnicodeDecodeError:
        raise RequestInvalid("Text parts are UTF-8.") from None
    return AdapterUpload(name, alias or None, form.values[CONFIG_PART], weights)
