"""What is wrong with a dataset, told so that its owner can mend it: code, line, message, field. No files, no SQL."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_KEPT = 50  # findings kept with their place; counts are always complete


class FindingCode(enum.StrEnum):
    """One class of fault per member; the API shows the value."""

    INVALID_GZIP = "invalid_gzip"  # damaged, cut off, or followed by something that is not gzip
    FILE_TOO_LARGE = "file_too_large"  # unpacked size over the limit
    TOO_MANY_EXAMPLES = "too_many_examples"
    LINE_TOO_LONG = "line_too_long"  # bytes of one line over the limit
    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    EMPTY_LINE = "empty_line"
    DATA_TYPE = "data_type"  # the line is JSON, but not an object
    WRONG_FORMAT = "wrong_format"  # a row of another kind than the job's method takes
    ROW_UNRECOGNIZED_KEY = "row_unrecognized_key"
    MISSING_MESSAGES_LIST = "missing_messages_list"
    MESSAGE_MISSING_KEY = "message_missing_key"
    MESSAGE_UNRECOGNIZED_KEY = "message_unrecognized_key"
    UNRECOGNIZED_ROLE = "unrecognized_role"
    MISSING_CONTENT = "missing_content"
    EXAMPLE_MISSING_ASSISTANT_MESSAGE = "example_missing_assistant_message"
    ROLE_ORDER = "role_order"
    TEMPLATE_REFUSED = "template_refused"  # the model's chat template cannot show these messages
    INVALID_WEIGHT = "invalid_weight"
    TOOL_REFERENCE = "tool_reference"
    TOOLS_UNSUPPORTED = "tools_unsupported"
    NO_TRAINABLE_TOKENS = "no_trainable_tokens"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"  # a warning
    TRAIN_VALIDATION_OVERLAP = "train_validation_overlap"  # a warning


WARNINGS = frozenset({FindingCode.DUPLICATE, FindingCode.TRAIN_VALIDATION_OVERLAP})


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault and its place. `line` and `message` count from 1."""

    line: int
    code: FindingCode
    detail: str
    message: int | None = None
    field: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"code": self.code.value}

    def sentence(self) -> str:
        """`line 3, message 2, field role: …`: what a job's error says of its first finding."""
        place = f"line {self.line}"
        if self.message is not None:
            place += f", message {self.message}"
        if self.field is not None:
            place += f", field {self.field}"
        return f"{place}: {self.detail} ({self.code.value})"


@dataclass(slots=True)
class FindingLog:
    """Every fault counted, the first `MAX_KEPT` errors and warnings kept. Filled by one reader, then only read."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        self.counts[finding.code.value] += 1
        kept = self.warnings if finding.code in WARNINGS else self.errors
        if len(kept) < MAX_KEPT:
            kept.append(finding)

    @property
    def has_errors(self) -> bool:
        return bool(self.errors)

    @property
    def num_errors(self) -> int:
        return sum(count for code, count in self.counts.items() if FindingCode(code) not in WARNINGS)

    def to_dict(self) -> dict[str, Any]:
        """`{"findings": […], "counts": {code: n}}`, errors before warnings."""
        kept = (self.errors + self.warnings)[:MAX_KEPT]
        return {"findings": [finding.to_dict() for finding in kept], "counts": dict(sorted(self.counts.items()))}
