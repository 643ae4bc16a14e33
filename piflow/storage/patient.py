"""A pyarrow file system whose requests are tried again for half a minute.

pyarrow's client of Azure gives up after three tries, which an outage of five seconds outlasts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

_Result = TypeVar("_Result")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, of which a random part is waited


class PatientFileSystem(fs.FileSystemHandler):
    """Reads, lists and deletes through another file system; nothing is written through it.

    Args:
        system: whose requests may fail.
        is_passing: whether an error may be gone in a moment.
    """

    def __init__(self, system: fs.FileSystem, is_passing: Callable[[OSError], bool]) -> None:
        self._system, self._is_passing = system, is_passing

    def _tried(self, request: Callable[[], _Result]) -> _Result:
        for pause in PAUSES:
            try:
                return request()
            except OSError as error:
                if not self._is_passing(error):
                    raise
                time.sleep(pause * random.uniform(0.5, 1.0))
        return request()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFileSystem) and self._system == other._system

    def __hash__(self) -> int:
        return hash(self.get_type_name())

    def get_type_name(self) -> str:
        return f"patient {self._system.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self._system.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self._tried(lambda: self._system.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self._tried(lambda: self._system.get_file_info(selector))

    def delete_dir(self, path: str) -> None:
        self._tried(lambda: self._system.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._tried(lambda: self._system.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_file(self, path: str) -> None:
        self._tried(lambda: self._system.delete_file(path))

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        file = self._tried(lambda: self._system.open_input_file(path))
        return pa.PythonFile(_File(file, self._tried), mode="r")

    def _refused(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("objects are written by the store's own client")

    create_dir = move = copy_file = open_output_stream = open_append_stream = _refused
    delete_root_dir_contents = _refused


class _File:
    """A file in Python's own way, so that a read which failed is tried again at its place."""

    def __init__(self, file: pa.NativeFile, tried: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._file, self._tried = file, tried
        self._at, self._size = 0, int(file.size())
        self.closed = False

    def read(self, size: int | None = None) -> bytes:
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        content = self._tried(lambda: self._file.read_at(wanted, self._at))
        self._at += len(content)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        self._file.close()
