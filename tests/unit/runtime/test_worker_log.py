"""The end of a failed worker's log."""

from __future__ import annotations

import os
from pathlib import Path

from piflow.runtime.worker_log import last_lines


def test_the_newest_files_last_lines_are_fit_for_a_terminal(tmp_path: Path) -> None:
    old, new = tmp_path / "worker-1-01-7.err", tmp_path / "worker-2-01-7.err"
    old.write_text("of a process that had the number before\n")
    new.write_bytes(b"x" * 2**17 + b"\n\n" + b"line\n" * 40 + b"\x1b[31mlast\x1b[0m \xff\n")
    os.utime(old, (1, 1))
    lines = last_lines([old, new])
    assert len(lines) == 30 and lines[:29] == ["line"] * 29
    assert lines[-1] == "\\x1b[31mlast\\x1b[0m \ufffd"
    assert last_lines([]) == []


def test_a_long_line_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text("y" * 5000)
    assert last_lines([log]) == ["y" * 500 + "… (5000 characters)"]
