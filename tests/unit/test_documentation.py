"""What README and docs point to is there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from piflow import cli
from tests.golden import make_cli_reference
from tests.golden.make_recipe_reference import PAGE, page
from tests.golden.make_recipe_schema import sections

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
PACKAGE = REPOSITORY / "tests" / "plugins" / "bria_family"
FOLDERS = "piflow|pipelines|tests|docs|benchmarks|cluster|infra"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w/-])(?:{FOLDERS})/[\w./-]*\w", page.read_text()))
    missing = {name for name in named if not (REPOSITORY / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    """`path::name`, and a bare `::name` after it that lies in the same file."""
    file = ""
    for path, name in re.findall(r"(tests/[\w/]+\.py)?::(\w+)", page.read_text()):
        file = path or file
        assert f"def {name}(" in (REPOSITORY / file).read_text(), f"{file}::{name}"


def test_readme_has_every_folder_in_a_line() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    table = readme[readme.index("## Every folder in a line") :]
    folders = {path.parent.name for path in (REPOSITORY / "piflow").glob("*/__init__.py")}
    missing = {name for name in folders if f"{name}/`" not in table}
    assert folders and missing == set()


def test_the_guides_family_is_the_package_that_tests_run() -> None:
    guide = (REPOSITORY / "docs" / "bring-your-own-teacher.md").read_text()
    shown = re.findall(r"^`bria_family/(\w+\.py)`:\n\n```python\n(.*?)^```$", guide, re.M | re.S)
    assert dict(shown) == {path.name: path.read_text() for path in PACKAGE.glob("*.py")}
    assert guide.count("```python") == len(shown)


def test_the_recipe_reference_is_current() -> None:
    """After a change: python -m tests.golden.make_recipe_reference."""
    text = page()
    assert PAGE.read_text() == text
    keys = [name for section in sections() for name in section.model_fields]
    assert all(f"| `{name}` |" in text for name in keys) and len(keys) > 100


def test_the_command_reference_is_current() -> None:
    """After a change: python -m tests.golden.make_cli_reference."""
    text = make_cli_reference.page()
    assert make_cli_reference.PAGE.read_text() == text
    group: Any = typer.main.get_command(cli.app)
    parts = re.split(r"^## piflow (\S+)$", text, flags=re.M)[1:]
    told = {
        name: set(re.findall(r"(?<=[`\s])--?[a-z][\w-]*(?=[`,\s])", "\n".join(rows)))
        for name, part in zip(parts[::2], parts[1::2], strict=True)
        for rows in [re.findall(r"^\| (`.*?`) \|", part, re.M)]
    }
    taken = {
        name: {
            option
            for item in command.params
            if item.param_type_name == "option"
            for option in (*item.opts, *item.secondary_opts)
        }
        for name, command in group.commands.items()
    }
    assert told == taken


# ------------------------------------------------------------------------------------ commands


def commands(page: Path) -> list[str]:
    """Lines of a page's shell blocks that call piflow, comments left out."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("piflow ")]


USAGE_ERROR: Any = typer.BadParameter.__base__  # of the click that typer brings along


def parse(command: str) -> None:
    """As the command line would, without running it.

    Raises:
        USAGE_ERROR: no such command or option, or a value that it doesn't take.
    """
    words = shlex.split(command, comments=True)[1:]
    group: Any = typer.main.get_command(cli.app)
    with group.context_class(group) as context:
        name, found, rest = group.resolve_command(context, words)
        found.make_context(name, list(rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_shows_are_taken(page: Path) -> None:
    for command in commands(page):
        if "\N{HORIZONTAL ELLIPSIS}" not in command:
            parse(command)


@pytest.mark.parametrize(
    "command",
    [
        "piflow preflght r.yaml",
        "piflow preflight r.yaml --jsn",
        "piflow render r.yaml --target ec2",
    ],
)
def test_a_planted_command_is_refused(command: str) -> None:
    with pytest.raises(USAGE_ERROR):
        parse(command)


RENDERS = [
    pytest.param(command, id=f"{page.name}-{number}")
    for page in PAGES
    for number, command in enumerate(commands(page))
    if command.startswith("piflow render my-recipe.yaml")
]


@pytest.mark.parametrize("command", RENDERS)
def test_renderings_that_a_page_shows_work_with_the_examples(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe", "values"):
        example = (REPOSITORY / "cluster" / f"{name}.yaml").read_text()
        (tmp_path / f"my-{name}.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    command = command.replace("/shared/", f"{tmp_path}/shared/")
    result = CliRunner().invoke(cli.app, shlex.split(command, comments=True)[1:])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.rglob("recipe.yaml"))


# ------------------------------------------------------------------------------------- runbook


def messages(tree: ast.AST) -> Iterator[str]:
    """Texts of a module, with an ellipsis for what an f-string puts in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                p.value if isinstance(p, ast.Constant) else "\N{HORIZONTAL ELLIPSIS}"
                for p in node.values
            ]
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def stands_in_code(message: str, texts: list[str]) -> bool:
    """Whether a text has the quoted message in it; its ellipses may stand for any words."""
    parts = [re.escape(part) for part in message.split("\N{HORIZONTAL ELLIPSIS}")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    modules = sorted((REPOSITORY / "piflow").rglob("*.py"))
    return [text for path in modules for text in messages(ast.parse(path.read_text()))]


def quoted() -> list[str]:
    """What stands in backticks in the first column of the runbook's tables."""
    runbook = (REPOSITORY / "docs" / "runbook.md").read_text()
    rows = re.findall(r"^\| (?!it says|---)(.*?) \|", runbook, re.M)
    found = [
        double or single
        for row in rows
        for double, single in re.findall(r"`` (.+?) ``|`(.+?)`", row)
    ]
    return [message for message in found if not message.startswith("~/")]


def test_what_the_runbook_quotes_is_what_the_code_says(texts: list[str]) -> None:
    assert len(quoted()) > 40
    assert [message for message in quoted() if not stands_in_code(message, texts)] == []


def test_a_planted_message_is_found(texts: list[str]) -> None:
    assert stands_in_code("nobody listens at RAY_ADDRESS=\N{HORIZONTAL ELLIPSIS}", texts)
    assert not stands_in_code("nobody listens on RAY_ADDRESS=\N{HORIZONTAL ELLIPSIS}", texts)
