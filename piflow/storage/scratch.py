"""Temporary folders that go with their process, however it ends.

A process that is killed deletes nothing, and a worker's unfinished checkpoint or download takes
gigabytes. So every such folder is locked while its process lives; the kernel lets go of the lock at
the end of any process, and whoever makes the next folder of the kind deletes those without one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def scratch(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """A fresh folder for the block.

    Args:
        kind: of work, such as "checkpoint"; what killed processes left of the same kind goes.
        parent: where it lies; default: the machine's folder for temporary files.
    """
    folder, lock = claim(kind, parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def claim(kind: str, parent: Path | None = None) -> tuple[Path, int]:
    """A fresh folder, and the file descriptor that is its claim as long as it is open.

    Args:
        kind, parent: as of `scratch`.
    """
    root = parent or Path(tempfile.gettempdir())
    prefix = f"piflow-scratch-{kind}-"
    for left in root.glob(f"{prefix}*"):
        _delete_if_left(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        with suppress(BlockingIOError, FileNotFoundError):  # taken for one that was left just now
            return folder, _locked(folder)


def _delete_if_left(folder: Path) -> None:
    """Delete it if it is this user's, no link, and no living process has it."""
    with suppress(OSError):
        lock = _locked(folder, is_needed=True)
        try:
            if os.fstat(lock).st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _locked(folder: Path, *, is_needed: bool = False) -> int:
    """The folder, open and locked; unless it is needed, open alone where a disk has no locks.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: it isn't there any more.
        OSError: it is a link or no folder; or a lock is needed, and the disk has none.
    """
    lock = os.open(folder, _FOLDER)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_needed or isinstance(error, BlockingIOError):
                raise
        if not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, "another folder has this name by now", folder)
    except BaseException:
        os.close(lock)
        raise
    return lock
