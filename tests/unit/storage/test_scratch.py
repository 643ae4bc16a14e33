"""Temporary folders: a killed process's are deleted, and nobody else's."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from piflow import storage
from piflow.storage import scratch as module
from piflow.storage.scratch import claim, scratch

_HOLD = """
import sys
from pathlib import Path
from piflow.storage.scratch import scratch

with scratch("work", Path(sys.argv[1])) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "shard").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_killed_processs_folder_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, theirs):
        with scratch("work", tmp_path) as ours, scratch("work", tmp_path) as second:
            assert len({ours, second, theirs}) == 3
            assert (theirs / "sub" / "shard").exists() and ours.is_dir()
        assert not ours.exists() and not second.exists()
        process.kill()
        process.wait()
        assert theirs.is_dir()
        with scratch("other", tmp_path):
            assert theirs.is_dir(), "another kind's is another's business"
        with scratch("work", tmp_path) as ours:
            assert list(tmp_path.iterdir()) == [ours]


def test_an_error_deletes_it_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch("work", tmp_path) as folder:
        (folder / "file").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_links_files_and_other_users_folders_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").touch()
    link, file = (tmp_path / f"piflow-scratch-work-{name}" for name in ("link", "file"))
    link.symlink_to(victim)
    file.touch()
    folder = tmp_path / "piflow-scratch-work-theirs"
    folder.mkdir()
    user = os.getuid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: user + 1)
        with scratch("work", tmp_path):
            pass
    assert folder.is_dir()
    with scratch("work", tmp_path):
        assert not folder.exists()
    assert (victim / "thesis.tex").exists() and link.is_symlink() and file.exists()


def test_a_folder_that_is_deleted_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another process had taken it for one that was left, twice."""
    make, made = module.tempfile.mkdtemp, []

    def deleted(**options: object) -> str:
        made.append(make(**options))  # type: ignore[call-overload]
        if len(made) < 3:
            os.rmdir(made[-1])
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", deleted)
    with scratch("work", tmp_path) as folder:
        assert str(folder) == made[2] and folder.is_dir()


def test_a_disk_without_locks_has_folders_and_keeps_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, lock = claim("work", tmp_path)
    os.close(lock)

    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refused)
        with scratch("work", tmp_path) as folder:
            assert folder.is_dir() and left.is_dir()
    with scratch("work", tmp_path):
        assert not left.exists()


def test_no_other_temporary_folder_is_made() -> None:
    """But by `piflow.testing`, whose checks take seconds."""
    product = Path(storage.__file__).parents[1]
    made = {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp"}
    found = {
        path.relative_to(product)
        for path in product.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and made & {getattr(node, key, None) for key in ("attr", "id", "name")}
    }
    assert {str(path) for path in found if path.parts[0] != "testing"} == {"storage/scratch.py"}
