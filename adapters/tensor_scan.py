"""One pass over an adapter's data: hash every byte and measure every tensor, in a small fixed buffer. numpy, no torch.

Hash and values come from the same read, so what was judged is what the digest names, even if the file changes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.checked import TensorFact
from adapters.errors import AdapterTruncated, AdapterValuesNotFinite
from adapters.strict_json import shown

_CHUNK_BYTES = 4 << 20  # a multiple of every element's size


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """What a pass over the whole file found."""

    sha256: str  # of the whole file, hex
    norms: dict[str, float]  # Frobenius norm by tensor name; 0.0 only where every element is zero


def scan_file(fd: int, tensors: Sequence[TensorFact]) -> ScannedFile:
    """Read an open safetensors file once. `tensors` are all of its tensors in the order of their data.

    Raises AdapterValuesNotFinite for the first tensor that holds NaN or infinity, AdapterTruncated if the file shrank.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for piece in _chunks(fd, 0, tensors[0].start if tensors else 0, buffer):
        digest.update(piece)
    norms = {}
    for fact in tensors:
        squares, is_zero = 0.0, True
        for piece in _chunks(fd, fact.start, fact.end, buffer):
            digest.update(piece)
            values = decode(piece, fact.dtype)
            if not np.isfinite(values).all():
                raise AdapterValuesNotFinite(f"Tensor {shown(fact.name)} holds NaN or infinity.", param=fact.name)
            is_zero = is_zero and not values.any()
            with np.errstate(over="ignore", under="ignore"):  # infinity is above every bound
                squares += float(np.dot(values, values))
        # The squares of very small values vanish; the tensor is not zero for all that.
        norms[fact.name] = 0.0 if is_zero else max(squares**0.5, np.finfo(np.float32).tiny)
    return ScannedFile(digest.hexdigest(), norms)


def decode(data: memoryview | bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Return little-endian F32, F16 or BF16 bytes as float32 values, flat."""
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return np.frombuffer(data, dtype="<f2").astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _chunks(fd: int, start: int, end: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the bytes [start, end) piece by piece; each piece is valid until the next one is asked for."""
    while start < end:
        wanted = min(len(buffer), end - start)
        filled = 0
        while filled < wanted:  # a piece must not end inside an element
            count = os.preadv(fd, [buffer[filled:wanted]], start + filled)
            if count == 0:
                raise AdapterTruncated()
            filled += count
        yield buffer[:wanted]
        start += wanted
