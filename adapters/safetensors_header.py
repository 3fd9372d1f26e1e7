"""Read the header of a safetensors file that nobody trusts. Plain Python; allocates by the header's real size alone.

Wire format: 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes. The JSON maps each name
to {"dtype", "shape", "data_offsets": [start, end]}, offsets counted from the first byte after the header; the optional
"__metadata__" maps strings to strings. The tensors must cover the data exactly: no gap, no overlap, nothing behind.
"""

from __future__ import annotations

import math
import os
from typing import Any

from adapters.checked import DoorLimits, TensorFact
from adapters.errors import (
    AdapterDtypeUnsupported,
    AdapterFormatUnsupported,
    AdapterHeaderInvalid,
    AdapterHeaderTooLarge,
    AdapterTruncated,
)
from adapters.strict_json import JsonRefused, parse_object, shown

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_HEADER_DEPTH = 3  # header, entry, list
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# What people rename to .safetensors: GGUF, zip (torch.save), pickle of protocols 2 to 5, HDF5, gzip.
_FOREIGN_MAGIC = (b"GGUF", b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x89HDF", b"\x1f\x8b")


def read_header(fd: int, num_bytes: int, limits: DoorLimits) -> tuple[TensorFact, ...]:
    """Return the tensors of an open file of `num_bytes` bytes, in the order of their data.

    Raises the header codes of `adapters.errors`. Names are any strings: which of them are allowed is the door's matter.
    """
    length = _header_length(fd, num_bytes, limits)
    data = os.pread(fd, length, _LENGTH_BYTES)
    if len(data) != length:
        raise AdapterTruncated()
    if data[:1] != b"{":
        raise AdapterHeaderInvalid("The weights' header does not begin with an object. Save them again with PEFT.")
    try:
        header = parse_object(data, max_depth=_HEADER_DEPTH)
    except JsonRefused as exc:
        raise AdapterHeaderInvalid(f"The weights' header cannot be read: {exc}. Save them again with PEFT.") from exc
    _check_metadata(header.pop("__metadata__", None), limits)
    data_start = _LENGTH_BYTES + length
    facts = sorted((_entry(name, entry, data_start) for name, entry in header.items()), key=lambda f: (f.start, f.end))
    _check_cover(facts, data_start, num_bytes)
    return tuple(facts)


def _header_length(fd: int, num_bytes: int, limits: DoorLimits) -> int:
    prefix = os.pread(fd, _LENGTH_BYTES, 0)
    if len(prefix) < _LENGTH_BYTES:
        raise AdapterTruncated()
    length = int.from_bytes(prefix, "little")
    if length > limits.max_header_bytes:
        # Only now: an honest length can begin with the two bytes of a pickle.
        if prefix.startswith(_FOREIGN_MAGIC):
            raise AdapterFormatUnsupported()
        raise AdapterHeaderTooLarge(
            f"The weights' header claims {length} bytes; at most {limits.max_header_bytes} are accepted."
        )
    if _LENGTH_BYTES + length > num_bytes:
        raise AdapterTruncated()
    return length


def _check_metadata(metadata: Any, limits: DoorLimits) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterHeaderInvalid("The header's __metadata__ must map strings to strings.", param="__metadata__")
    size = sum(len(text.encode("utf-8", "surrogatepass")) for item in metadata.items() for text in item)
    if size > limits.max_metadata_bytes:
        raise AdapterHeaderTooLarge(
            f"The header's __metadata__ has {size} bytes; at most {limits.max_metadata_bytes} are accepted.",
            param="__metadata__",
        )


def _entry(name: str, entry: Any, data_start: int) -> TensorFact:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _invalid(name, "its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _invalid(name, "its dtype is not a string")
    if dtype not in DTYPE_BYTES:
        raise AdapterDtypeUnsupported(
            f"Tensor {shown(name)} is {shown(dtype, 20)}; adapter tensors must be F32, F16 or BF16.", param=shown(name)
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _invalid(name, "its shape is not a short list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(name, "its data_offsets are not a start and an end")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _invalid(name, "its span is not its shape times its dtype")
    return TensorFact(name, dtype, tuple(shape), data_start + start, data_start + end)


def _is_sizes(value: Any) -> bool:
    # `type` and not isinstance: True is an int to Python.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(facts: list[TensorFact], data_start: int, num_bytes: int) -> None:
    position = data_start
    for fact in facts:
        if fact.start != position:
            kind = "overlaps another" if fact.start < position else "leaves a gap before it"
            raise _invalid(fact.name, f"it {kind}")
        position = fact.end
    if position > num_bytes:
        raise AdapterTruncated(f"The weights end {position - num_bytes} bytes early. Send the whole file again.")
    if position < num_bytes:
        raise AdapterHeaderInvalid(f"{num_bytes - position} bytes behind the last tensor belong to nothing.")


def _invalid(name: str, why: str) -> AdapterHeaderInvalid:
    return AdapterHeaderInvalid(f"Tensor {shown(name)} is declared wrongly: {why}.", param=shown(name))
