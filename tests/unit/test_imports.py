"""Who may import whom, read from the sources: what runs once is not enough to see a lazy import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import adapters

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("app", "adapters") for path in (ROOT / package).rglob("*.py"))

# A library, and the only files (or folders) that may import it.
ONLY_IN = {
    "boto3": ["adapters/s3.py"],
    "botocore": ["adapters/s3.py"],
    "bitsandbytes": ["app/engine/base_model.py", "app/training"],
    "prometheus_client": ["app/metrics.py"],
    "sqlalchemy": [
        "app/database.py",
        "app/idempotency.py",
        "app/tenants.py",
        "app/training",
        "app/training_side.py",
        "app/migrations",
    ],
    "alembic": ["app/database.py", "app/migrations"],
    "psycopg": [],
    "fastapi": ["app/api", "app/server.py"],
    "starlette": ["app/api", "app/server.py"],
    "uvicorn": ["app/server.py"],
    "typer": ["app/__main__.py", "app/cli"],
    "pydantic_settings": ["app/settings.py", "app/settings_sources.py"],
    "matplotlib": ["app/bench", "app/cli/train.py"],
    "peft": ["app/bench"],
    "pickle": [],
}
TORCH_FREE = [
    *(f"adapters/{name}.py" for name in (
        "breaker", "catalog", "checked", "disk_tier", "door", "errors", "fetch", "flights", "loader", "lru", "manifest",
        "module_plan", "peft_config", "publish", "rank_pool", "refusals", "s3", "safetensors_header", "store",
        "strict_json", "tensor_scan",
    )),
    *(f"app/engine/{name}.py" for name in (
        "base_files", "fairness", "kv_cache", "scheduler", "sequence", "training_budget",
    )),
    *(f"app/{name}.py" for name in (
        "api_keys", "database", "errors", "machine", "rate_limits", "settings", "settings_sources", "storage",
        "tenants", "ttl_cache",
    )),
]  # fmt: skip


@cache
def _imported(path: Path, *, at_import: bool = False) -> frozenset[str]:
    """Dotted names that a file imports, in functions too; `at_import`: only what runs when it is imported itself."""
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    for node in _top_level(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """A tree's nodes outside functions and outside `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _top_level(child)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module_file(name: str) -> Path | None:
    """The source of one of our modules by its dotted name."""
    base = ROOT / name.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _reaches(path: Path, library: str) -> list[str]:
    """A chain of imports of ours from a file to a library, at import time; empty if there is none."""
    seen: set[Path] = set()
    queue = [[path]]
    while queue:
        chain = queue.pop()
        for name in sorted(_imported(chain[-1], at_import=True)):
            if name.partition(".")[0] == library:
                return [*map(_name, chain), name]
            following = _module_file(name) if name.partition(".")[0] in ("app", "adapters") else None
            if following is not None and following not in seen:
                seen.add(following)
                queue.append([*chain, following])
    return []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_foreign_library_is_imported_where_it_belongs_and_nowhere_else(library: str) -> None:
    places = ONLY_IN[library]
    users = [_name(path) for path in SOURCES if library in {name.partition(".")[0] for name in _imported(path)}]
    strays = [user for user in users if not any(user == place or user.startswith(place + "/") for place in places)]
    assert strays == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_scheduling_and_book_keeping_need_no_torch(name: str) -> None:
    assert _reaches(ROOT / name, "torch") == []
    assert _reaches(ROOT / name, "transformers") == []


def test_the_chain_finder_finds_chains() -> None:
    assert _reaches(ROOT / "adapters/weights.py", "torch") == ["adapters/weights.py", "torch"]
    assert _reaches(ROOT / "app/database.py", "sqlalchemy")[-1].startswith("sqlalchemy")


def test_the_adapters_package_is_ours() -> None:
    """PyPI has a distribution of that name, which would take its place."""
    assert Path(str(adapters.__file__)).resolve() == ROOT / "adapters" / "__init__.py"


def test_nothing_is_unpickled() -> None:
    calls = [
        f"{_name(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "eval", "exec", "np.load", "numpy.load")
    ]
    assert calls == []


def test_only_settings_read_our_variables() -> None:
    """By `os.environ` or `os.getenv`; handing variables to a child process is no reading."""
    readers = [
        f"{_name(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call | ast.Subscript) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        if "environ" in (text := ast.unparse(node)) or "getenv" in text
        if any(isinstance(part, ast.Constant) and str(part.value).startswith("LODGER_") for part in ast.walk(node))
    ]
    assert readers == []


def test_the_import_rules_of_the_project_file_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
