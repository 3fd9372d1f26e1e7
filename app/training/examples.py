"""Tokenized examples on disk: one flat file of token ids, one of label marks, offsets in memory. No torch.

A table may be larger than memory: it is written through a small buffer and read through a map. What is held per example
is an offset, a line number and a digest of 16 bytes. One thread writes it; afterwards it is read-only and thread-safe.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

BUFFER_TOKENS = 256 << 10
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What one forward sees. `labels[i]` is true where token i is to be predicted (from the tokens before it)."""

    ids: npt.NDArray[np.int32]  # [T]
    labels: npt.NDArray[np.bool_]  # [T]; labels[0] is never true

    @property
    def num_labels(self) -> int:
        return int(self.labels.sum())


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All sequences of a file in its order; a supervised example is one of them, a dpo example two: better, worse."""

    ids: npt.NDArray[np.int32]  # [sum of T]
    labels: npt.NDArray[np.bool_]  # [sum of T]
    offsets: npt.NDArray[np.int64]  # [sequences + 1]
    lines: npt.NDArray[np.int64]  # [examples]; 1-based line of each example
    digests: npt.NDArray[np.uint8]  # [examples, DIGEST_BYTES]; equal tokens and labels, equal digest
    group: int  # sequences per example

    def __len__(self) -> int:
        return len(self.lines)

    def sequence(self, index: int) -> TokenSequence:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return TokenSequence(self.ids[start:end], self.labels[start:end])


@dataclass(frozen=True, slots=True)
class Examples:
    """Some examples of a table, in ascending order of their lines."""

    table: TokenTable
    index: npt.NDArray[np.int64]  # [n]; example numbers in the table

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[TokenSequence, ...]:
        """The example's sequences: one, or (preferred, rejected)."""
        first = int(self.index[position]) * self.table.group
        return tuple(self.table.sequence(first + offset) for offset in range(self.table.group))

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each example, both sequences of a pair together; what batches are grouped by."""
        offsets, group = self.table.offsets, self.table.group
        return np.asarray(offsets[(self.index + 1) * group] - offsets[self.index * group], dtype=np.int64)

    @property
    def num_labels(self) -> npt.NDArray[np.int64]:
        """[n] label tokens of each example."""
        per_sequence = np.add.reduceat(self.table.labels.view(np.uint8), self.table.offsets[:-1], dtype=np.int64)
        per_example = per_sequence.reshape(-1, self.table.group).sum(axis=1)
        return np.asarray(per_example[self.index], dtype=np.int64)

    @property
    def max_sequence_tokens(self) -> int:
        lengths = np.diff(self.table.offsets)
        first = self.index * self.table.group
        rows = (first[:, None] + np.arange(self.table.group)[None, :]).ravel()
        return int(lengths[rows].max()) if len(rows) else 0


class TokenTableWriter:
    """Appends examples to two files at `path` with the suffixes .ids and .labels; `finish` maps them."""

    def __init__(self, path: Path, *, group: int) -> None:
        self._paths = (path.with_suffix(".ids"), path.with_suffix(".labels"))
        self._files = [open(name, "wb", buffering=0) for name in self._paths]  # noqa: SIM115 - closed by __exit__
        self._ids, self._labels = array("i"), bytearray()
        self._offsets, self._lines, self._digests = array("q", [0]), array("q"), bytearray()
        self._group = group

    def __enter__(self) -> TokenTableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def append(self, line: int, sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> bytes:
        """Add one example of `group` sequences (ids, labels); return its digest."""
        assert len(sequences) == self._group
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for ids, labels in sequences:
            packed, marks = array("i", ids), bytes(labels)
            assert len(packed) == len(marks)
            digest.update(len(marks).to_bytes(8, "big") + packed.tobytes() + marks)
            self._ids += packed
            self._labels += marks
            self._offsets.append(self._offsets[-1] + len(packed))
        self._lines.append(line)
        self._digests += digest.digest()
        if len(self._ids) >= BUFFER_TOKENS:
            self._flush()
        return digest.digest()

    def _flush(self) -> None:
        for file, data in zip(self._files, (self._ids.tobytes(), bytes(self._labels)), strict=True):
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        self._ids, self._labels = array("i"), bytearray()

    def finish(self) -> TokenTable:
        """Map what was written. The files may be unlinked at once; the map lives on."""
        self._flush()
        for file in self._files:
            file.close()
        ids: npt.NDArray[np.int32] = np.empty(0, np.int32)
        labels: npt.NDArray[np.bool_] = np.empty(0, np.bool_)
        if self.num_tokens:  # an empty file cannot be mapped
            ids = np.memmap(self._paths[0], dtype=np.int32, mode="r")
            labels = np.memmap(self._paths[1], dtype=np.bool_, mode="r")
        return TokenTable(
            ids=ids,
            labels=labels,
            offsets=np.frombuffer(self._offsets, dtype=np.int64).copy(),
            lines=np.frombuffer(self._lines, dtype=np.int64).copy(),
            digests=np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
            group=self._group,
        )
