"""What README and docs point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
