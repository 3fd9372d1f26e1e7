"""The reference pages say what the code says: every setting, metric, error code and route, and nothing that is gone."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from app.__main__ import OPTIONAL, build_app
from app.api import http
from app.api.schemas import Body, ChatBody, GenerationBody, StoredBody
from app.settings import Settings
from app.settings_sources import variable_of
from app.training.findings import FindingCode
from tests.docs import PAGES, ROOT, TABLES, rendered, table_names
from tests.docs_api import BODIES, ROUTERS, routes
from tests.docs_errors import WORDS, all_codes
from tests.docs_metrics import metric_rows

DOCUMENTS = sorted([ROOT / "README.md", *PAGES.glob("*.md")])
JOB_ERRORS = ("JobError", "JobFailed", "DataRefused")


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


def first_cells(text: str) -> set[str]:
    """What stands in code marks at the beginning of a table's row."""
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_tables_are_what_the_code_says(path: Path) -> None:
    assert rendered(path.read_text()) == path.read_text(), "run: .venv/bin/python -m tests.docs"


def test_every_table_stands_on_a_page_once() -> None:
    assert sorted(name for path in PAGES.glob("*.md") for name in table_names(path.read_text())) == sorted(TABLES)


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    assert first_cells(page("settings")) == {variable_of(name) for name in Settings.model_fields}
    known = {variable_of(name) for name in Settings.model_fields}
    for path in DOCUMENTS:
        named = set(re.findall(r"\bLODGER_[A-Z0-9_]*[A-Z0-9]\b", path.read_text()))
        assert named <= known | {"LODGER_NAME", "LODGER_TEST_DATA"}, path.name


def test_every_metric_is_documented() -> None:
    named = first_cells(page("metrics"))
    assert named == {row[0].strip("`") for row in metric_rows()}
    written = set(re.findall(r'"(lodger_[a-z0-9_]+|vllm:[a-z0-9_]+)"', (ROOT / "app" / "metrics.py").read_text()))
    unseen = {name for name in written if name not in named and f"{name}_total" not in named}
    assert not unseen, "metrics that show nothing on a page where everything has a value"


def test_metrics_named_in_a_text_exist() -> None:
    known = {row[0].strip("`") for row in metric_rows()}
    for path in DOCUMENTS:
        named = set(re.findall(r"`((?:lodger_|vllm:)[a-z0-9_]+)", path.read_text()))
        assert named <= known, path.name


def test_every_error_code_is_documented() -> None:
    assert set(WORDS) <= set(all_codes()), "words for a code that no longer exists"
    top = page("errors").partition("## What ends")[0]
    assert first_cells(top) == set(all_codes())


def test_codes_named_beside_routes_exist() -> None:
    section = page("api").partition("## Errors by route")[2].partition("\n## ")[0]
    named = {
        code
        for row in re.findall(r"^\|[^|]+\|([^|]+)\|$", section, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", row)
    }
    assert len(named) > 20
    assert named <= set(all_codes()) | {code.value for code in FindingCode}


def test_every_finding_of_a_data_file_is_documented() -> None:
    last = page("errors").partition("## What can be wrong")[2]
    assert first_cells(last) == {code.value for code in FindingCode}


def test_every_code_that_ends_a_job_is_documented() -> None:
    middle = page("errors").partition("## What ends")[2].partition("## What can be wrong")[0]
    assert first_cells(middle) == job_codes()


def job_codes() -> set[str]:
    """The codes given where a job is failed; `invalid_{which}_file` is of each of its three files."""
    found: set[str] = set()
    for path in (ROOT / "app" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in JOB_ERRORS and node.args:
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    found.add(code.value)
                elif isinstance(code, ast.JoinedStr):
                    found |= {f"invalid_{which}_file" for which in ("training", "validation", "regression")}
    return found


def test_every_router_of_the_app_is_on_the_page() -> None:
    source = Path(http.__file__).read_text()
    used = set(re.findall(r"(\w+)\.router", source)) - {"app", "routes"}
    used |= {name.strip() for found in re.findall(r"for routes in \(([^)]+)\)", source) for name in found.split(",")}
    documented = {route.endpoint.__module__.rsplit(".", 1)[1] for route in routes()} - {"health"}
    aliases = {"adapter_routes": "adapters"}
    assert {aliases.get(name, name) for name in used} == documented
    assert len(ROUTERS) == len(documented) + 2  # the probes and /metrics


def test_every_path_named_in_a_text_exists() -> None:
    known = {re.sub(r"\{[^}]+\}", "{}", route.path) for route in routes()}
    for path in DOCUMENTS:
        for named in re.findall(r"(?:GET|POST|PUT|DELETE|PATCH)\s+(/[a-z0-9_/{}:@]+)", path.read_text()):
            assert re.sub(r"\{[^}]+\}", "{}", named.rstrip("/")) in known, f"{path.name}: {named}"


def test_every_body_is_on_the_page() -> None:
    shown = {cls.__name__ for cls in BODIES.values()}
    for cls in list(BODIES.values()):
        shown |= set(cls.model_json_schema().get("$defs", {}))
    bodies: set[str] = set()
    pending: list[type[Body]] = [Body]
    while pending:
        for cls in pending.pop().__subclasses__():
            bodies.add(cls.__name__)
            pending.append(cls)
    own = {name for name in bodies if name not in (GenerationBody.__name__, StoredBody.__name__)}
    assert own <= shown | {"HyperparametersBody"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_a_text_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:app|adapters|tests|deploy)/[A-Za-z0-9_./-]+)`", text):
        assert (ROOT / target).exists(), target


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words after `lodger` in shell blocks and in inline code."""
    blocks = "\n".join(code_blocks(path, "sh")).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`(lodger [^`]+)`", path.read_text()))
    for line in (blocks + "\n" + inline).splitlines():
        if found := re.match(r"(?:\.venv/bin/)?lodger (.+)", line):
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_a_text_exist_with_their_options(path: Path) -> None:
    root = typer.main.get_command(build_app())
    for words in command_lines(path):
        command: click.Command = root
        context = click.Context(root)
        if words[0] in OPTIONAL and words[0] not in root.list_commands(context):  # type: ignore[attr-defined]
            continue
        rest = list(words)
        while hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
            found = command.get_command(context, rest[0])
            assert found is not None, " ".join(words)
            command = found
            rest.pop(0)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= known, " ".join(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_can_be_read(path: Path) -> None:
    for block in code_blocks(path, "python"):
        compile(block, str(path), "exec")
    for block in code_blocks(path, "json"):
        json.loads(block)
    for block in code_blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-d" in words:
                ChatBody.model_validate(json.loads(words[words.index("-d") + 1]))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_text_is_left_unfinished(path: Path) -> None:
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|lorem)\b", path.read_text(), re.IGNORECASE)
