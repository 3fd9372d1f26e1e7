"""The tables of the reference pages, made from the code: `python -m tests.docs` writes them into deploy/docs.

A table stands between two marks, `<!-- table: NAME -->` and `<!-- end of NAME -->`; all else on a page is written by
hand and left alone. tests/unit/test_docs.py fails when a table is not what the code says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tests.docs_api import body_tables, route_rows
from tests.docs_errors import error_rows
from tests.docs_metrics import metric_rows
from tests.docs_settings import setting_sections

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "deploy" / "docs"
_MARK = re.compile(r"<!-- table: (?P<name>[a-z-]+) -->\n(?P<table>.*?)<!-- end of (?P=name) -->\n", re.DOTALL)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; pipes in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def settings_tables() -> Iterator[str]:
    for title, rows in setting_sections():
        yield f"### {title}\n\n" + markdown_table(["variable", "default", "meaning"], rows)


def bodies() -> Iterator[str]:
    for title, rows in body_tables():
        yield f"#### {title}\n\n" + markdown_table(["field", "type", "default"], rows)


# Name in the mark -> the table's text.
TABLES: dict[str, Callable[[], str]] = {
    "settings": lambda: "\n".join(settings_tables()),
    "metrics": lambda: markdown_table(["name", "type", "labels", "meaning"], metric_rows()),
    "routes": lambda: markdown_table(["method and path", "query", "what it does"], route_rows()),
    "bodies": lambda: "\n".join(bodies()),
    "errors": lambda: markdown_table(["code", "status", "type", "what happened, and what to do"], error_rows()),
}


def rendered(page: str) -> str:
    """A page with every table made anew. Raises KeyError for a mark that names no table."""

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- table: {name} -->\n\n{TABLES[name]().rstrip()}\n\n<!-- end of {name} -->\n"

    return _MARK.sub(fill, page)


def table_names(page: str) -> list[str]:
    return [found["name"] for found in _MARK.finditer(page)]


def main() -> int:
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text()
        after = rendered(before)
        if after != before:
            path.write_text(after)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
