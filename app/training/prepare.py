"""Dataset files -> a `TrainingSet` of token ids, and a report of what was counted, cut or left out. No torch, no SQL.

Deterministic: the same files, renderer and options give the same sequences in the same order and the same hold-out,
whatever the machine, so that a restarted worker continues on the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.training.dataset import DatasetLimits, read_rows
from app.training.dataset_rows import (
    Method,
    parse_row,
)
from app.training.examples import Examples, TokenTable, TokenTableWriter
from app.training.findings import Finding, FindingCode, FindingLog
from app.training.fitting import ExampleFitter, PrepareOptions, TrainingRenderer

HOLD_OUT_FROM = 50  # examples; below it nothing is held out
HOLD_OUT_RANGE = (10, 500)  # examples
PROGRESS_ROWS = 500  # rows between two calls of `on_progress`


@dataclass(frozen=True, slots=True)
class FileReport:
    """What one file held. Dropped rows are in no other count."""

    examples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    duplicate: int = 0
    fully_masked: int = 0
    longest_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of both files, the split and the findings; shown to the tenant as it is."""

    training: FileReport
    validation: FileReport | None
    held_out: int  # examples of the training file that only measure
    leaked: int  # validation examples whose tokens are also trained on
    findings: FindingLog = field(default_factory=FindingLog)
    validation_findings: FindingLog = field(default_factory=FindingLog)

    def to_dict(self) -> dict[str, Any]:
        return {
            "training": asdict(self.training),
            "validation": asdict(self.validation) if self.validation is not None else None,
            "held_out": self.held_out,
            "leaked": self.leaked,
        } | self.findings.to_dict()


class DataRefused(Exception):
    """The files cannot be trained on. `code`, `param` and the message become the job's error."""

    def __init__(self, code: str, param: str, message: str, findings: FindingLog) -> None:
        super().__init__(message)
        self.code, self.param, self.findings = code, param, findings


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What a job trains and measures on. `valid` is None where there is nothing to measure on."""

    method: Method
    train: Examples
    valid: Examples | None
    report: DataReport


def prepare(
    train: Path,
    valid: Path | None,
    options: PrepareOptions,
    renderer: TrainingRenderer,
    *,
    scratch: Path,
    limits: DatasetLimits = DatasetLimits(),  # noqa: B008 - frozen
    on_progress: Callable[[int], None] = lambda rows: None,
) -> TrainingSet:
    """Read, check and tokenize a job's files (JSONL or gzip of it) into maps below `scratch`.

    `on_progress` is called with the rows read so far and may raise to stop the work.
    Raises DataRefused with all findings of the file that is at fault, training file first.
    """
    reader = _FileReader(options, renderer, limits, on_progress)
    table, findings, training = reader.read(train, scratch / "train")
    _refuse_faults("training", findings, training, limits)
    if valid is None:
        kept, held = _hold_out(table)
        held_out = Examples(table, held) if len(held) else None
        report = DataReport(training, None, held_out=len(held), leaked=0, findings=findings)
        return TrainingSet(options.method, Examples(table, kept), held_out, report)
    valid_table, valid_findings, validation = reader.read(valid, scratch / "valid")
    _refuse_faults("validation", valid_findings, validation, limits)
    leaked = _note_overlap(table, valid_table, findings)
    report = DataReport(training, validation, 0, leaked, findings, valid_findings)
    return TrainingSet(options.method, _all(table), _all(valid_table), report)


def read_examples(
    path: Path, options: PrepareOptions, renderer: TrainingRenderer, *, scratch: Path, limits: DatasetLimits
) -> Examples:
    """The examples of a file that only measures, such as the gate's regression file. Raises DataRefused."""
    reader = _FileReader(options, renderer, limits, lambda rows: None)
    table, findings, report = reader.read(path, scratch / "regression")
    _refuse_faults("regression", findings, report, limits)
    return _all(table)


def _all(table: TokenTable) -> Examples:
    return Examples(table, np.arange(len(table), dtype=np.int64))


def _refuse_faults(which: str, log: FindingLog, report: FileReport, limits: DatasetLimits) -> None:
    if log.has_errors:
        more = log.num_errors - 1
        tail = f"; {more} more finding(s)" if more else ""
        message = f"The {which} file cannot be used: {log.errors[0].sentence()}{tail}"
        raise DataRefused(f"invalid_{which}_file", f"{which}_file", message, log)
    if report.examples < limits.min_examples:
        least = limits.min_examples
        message = f"{which.capitalize()} file has {report.examples} example(s), but must have at least {least} examples"
        raise DataRefused("invalid_n_examples", f"{which}_file", message, log)


def _hold_out(table: TokenTable) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split example numbers into (trained, held out): 10 %, 10 to 500, chosen by content alone.

    Chosen by a hash of the tokens, not by the job's seed, so that every job on a file is measured on the same rows;
    equal examples stay on one side, so that nothing that is measured was trained on.
    """
    n = len(table)
    none = np.empty(0, np.int64)
    if n < HOLD_OUT_FROM:
        return np.arange(n, dtype=np.int64), none
    wanted = min(max(n // 10, HOLD_OUT_RANGE[0]), HOLD_OUT_RANGE[1])
    groups: dict[bytes, list[int]] = {}
    for number in range(n):
        groups.setdefault(table.digests[number].tobytes(), []).append(number)
    order = sorted(groups, key=lambda digest: hashlib.blake2b(b"lodger-hold-out\0" + digest, digest_size=16).digest())
    held: list[int] = []
    for digest in order:
        if len(held) + len(groups[digest]) <= wanted:
            held += groups[digest]
        if len(held) == wanted:
            break
    chosen = np.array(sorted(held), dtype=np.int64)
    kept = np.setdiff1d(np.arange(n, dtype=np.int64), chosen, assume_unique=True)
    return kept, chosen


def _note_overlap(train: TokenTable, valid: TokenTable, log: FindingLog) -> int:
    trained = {digest.tobytes() for digest in train.digests}
    leaked = 0
    for line, digest in zip(valid.lines, valid.digests, strict=True):
        if digest.tobytes() in trained:
            leaked += 1
            detail = "this example of the validation file is also in the training file"
            log.add(Finding(int(line), FindingCode.TRAIN_VALIDATION_OVERLAP, detail))
    return leaked


class _FileReader:
    """Reads one file after another with one job's options."""

    def __init__(
        self,
        options: PrepareOptions,
        renderer: TrainingRenderer,
        limits: DatasetLimits,
        on_progress: Callable[[int], None],
    ) -> None:
        self._options, self._limits, self._on_progress = options, limits, on_progress
        self._renderer = renderer
        self._fitter = ExampleFitter(options, renderer)
        self._rows = 0

    def read(self, path: Path, target: Path) -> tuple[TokenTable, FindingLog, FileReport]:
        log = FindingLog()
        truncated = dropped = longest = label_tokens = 0
        lines_by_digest: dict[bytes, int] = {}
        group = 2 if self._options.method is Method.DPO else 1
        with open(path, "rb") as source, TokenTableWriter(target, group=group) as writer:
            for row in read_rows(source, self._limits, log):
                self._tick()
                example = parse_row(row, self._options.method, log, alternating_roles=self._renderer.alternating_roles)
                if example is None:
                    continue
                fitted = self._fitter.fit(example)
                if isinstance(fitted, Finding):
                    log.add(fitted)
                    continue
                if fitted is None:
                    dropped += 1
                    continue
                truncated += fitted.truncated
                longest = max(longest, *(len(ids) for ids, _ in fitted.sequences))
                label_tokens += sum(sum(labels) for _, labels in fitted.sequences)
                first = lines_by_digest.setdefault(writer.append(row.line, fitted.sequences), row.line)
                if first != row.line:
                    log.add(Finding(row.line, FindingCode.DUPLICATE, f"the same example as line {first}"))
            table, num_tokens = writer.finish(), writer.num_tokens
        report = FileReport(
            examples=len(table),
            tokens=num_tokens,
            label_tokens=label_tokens,
            truncated=truncated,
            dropped=dropped,
            duplicate=log.counts[FindingCode.DUPLICATE],
            fully_masked=log.counts[FindingCode.NO_TRAINABLE_TOKENS],
            longest_tokens=longest,
        )
        return table, log, report

    def _tick(self) -> None:
        self._rows += 1
        if self._rows % PROGRESS_ROWS == 0:
            self._on_progress(self._rows)
