"""Prints the unit tests of what changed since a commit, for `make quick`.

A changed `piflow/a/b.py` has its tests in `tests/unit/a/test_b.py`, or else in `tests/unit/a`; a
changed unit test is its own. Usage: python tests/changed.py [COMMIT], by default HEAD: everything
that isn't committed yet.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

UNIT = Path("tests/unit")
SECURITY = Path("tests/security")


def changed_files(commit: str) -> list[str]:
    """Files that differ from a commit, and those that git doesn't know yet."""
    known = _git("diff", "--name-only", "--diff-filter=d", commit)
    new = _git("ls-files", "--others", "--exclude-standard")
    return [*known, *new]


def unit_tests_of(files: Iterable[str], root: Path = Path()) -> list[str]:
    """Unit tests of the files, without those that another one holds; they are there in `root`."""
    found = sorted({test for file in files if (test := _test_of(Path(file), root)) is not None})
    return [str(test) for test in found if not any(parent in found for parent in test.parents)]


def _test_of(file: Path, root: Path) -> Path | None:
    if file.is_relative_to(SECURITY):
        return file if file.name.startswith("test_") else SECURITY
    if file.is_relative_to(UNIT) and file.name.startswith("test_") and file.suffix == ".py":
        return file
    if file.is_relative_to(UNIT):  # a conftest or a helper of a folder's tests
        return file.parent if file.parent != UNIT else None
    if file.suffix != ".py" or not file.is_relative_to("piflow"):
        return None
    folder = UNIT / file.relative_to("piflow").parent
    return next((test for test in _places(folder, file.stem) if (root / test).exists()), None)


def _places(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"test_{name}.py"
    if folder != UNIT:  # the tests of everything are no quick ones
        yield folder


def _git(*arguments: str) -> list[str]:
    return subprocess.check_output(["git", *arguments], text=True).splitlines()


if __name__ == "__main__":
    print("\n".join(unit_tests_of(changed_files(sys.argv[1] if len(sys.argv) > 1 else "HEAD"))))
