"""How commands talk: results go to stdout and nothing else does, remarks go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime


def say(text: str) -> None:
    """A remark for the person at the terminal."""
    print(text, file=sys.stderr)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content, two blanks apart: read by people, cut by awk. Blank cells are a dash."""
    cells = [[cell or "-" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    for row in [list(header), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def moment(seconds: float | None) -> str:
    """Unix seconds as UTC, to the second."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
