"""One URI for everything that is read or written.

========================  ====================================================================
``path`` or ``file://…``  a local path; relative ones start at the working directory
``s3://bucket/prefix``    an object store; ``?endpoint_override=host:port&scheme=http`` for others
                          than AWS, or ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``; credentials
                          from the usual ``AWS_*`` variables; ``#`` and ``?`` of a name are ``%23``
                          and ``%3F``
``gs://bucket/prefix``    Google Cloud Storage (extra ``piflow[gcs]``), with Application Default
                          Credentials; ``?endpoint_override`` and ``scheme`` as above
``abfs://c@a.dfs.core.windows.net/prefix``  container ``c`` of the account ``a`` of Azure Blob
                          Storage (extra ``piflow[azure]``); credentials from ``AZURE_*``
                          variables, identities or ``az login``
``package://name/sub``    files shipped inside an installed Python package; read-only
``hf://owner/name/sub``   files of a model repository on the Hugging Face hub; read-only.
                          ``hf://datasets/owner/name/…`` of a dataset, ``owner/name@revision``
                          for a branch, tag or commit; private ones need ``HF_TOKEN``
========================  ====================================================================

Data goes through ``pyarrow.fs``. A write is whole or invisible: local files are written beside
their target and renamed, objects appear when their upload is complete. Bytes are what lies there:
pyarrow's streams would pack and unpack by a name's ending (``.gz``) unless told not to.

A request to an object store is tried up to 8 times, with random waits that double each time: an
outage of half a minute is sat out, and a refusal (wrong keys) fails at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit, urlunsplit

from piflow.storage import azure, gcs
from piflow.storage.azure import azure_filesystem
from piflow.storage.foreign import MAX_JSON_BYTES, ForeignDataError, redacted, relative_name, shown
from piflow.storage.gcs import gcs_filesystem
from piflow.storage.hub import hub_at_commit, hub_filesystem, hub_place, hub_snapshot
from piflow.storage.object_uri import OBJECT_STORES
from piflow.storage.s3 import refusal, s3_filesystem
from piflow.storage.scratch import scratch
from piflow.storage.uri import READ_ONLY, local_path, member, on_objects, package_path, scheme

if TYPE_CHECKING:  # it takes a while, and recipes are read without
    from pyarrow import fs

_Arguments = ParamSpec("_Arguments")

_Result = TypeVar("_Result")

_PARTIAL = ".partial"  # suffix of a local file that is still being written
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # `_write_local`'s name for one
_LEFT_SECONDS = 600.0  # without a change, after which nobody writes to one any more

_LISTED_BY_SERVERS = (*OBJECT_STORES, "hf")  # schemes whose names of files come from elsewhere

_COPY_BYTES = 8 * 2**20

# pyarrow has no field for an error's code: it stands at one place of the message, behind it the
# HTTP status where the AWS SDK has no name for the error
_AWS_ERROR = re.compile(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d+)\))?")

_REFUSING_CODES = {
    "ACCESS_DENIED",
    "INTERNAL_FAILURE",  # no keys at all, or an answer that the SDK can't read
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "MISSING_AUTHENTICATION_TOKEN",
    "REQUEST_TIME_TOO_SKEWED",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
}

_REFUSING_STATUSES = {"400", "401", "402", "403"}


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system behind a URI and the path inside it.

    Raises:
        ValueError: unknown scheme, an object's URI without a bucket or with other options or with
            keys in it, a package that isn't installed, or a hub URI without a repository.
    """
    kind = scheme(uri)
    if kind == "s3":
        return s3_filesystem(uri)
    if kind == "gs":
        return gcs_filesystem(uri)
    if kind == "abfs":
        return azure_filesystem(uri)
    if kind == "hf":
        return hub_filesystem(uri)
    from pyarrow import fs

    local = package_path(uri) if kind == "package" else local_path(uri)
    return fs.LocalFileSystem(), str(local)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """An object store's refusals as PermissionError, with its reason and what to do.

    Its client says little of them ("ACCESS_DENIED", "INTERNAL_FAILURE during GetObject"), and
    Azure's has errors that are none of Python's: they become OSError.
    """
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        if (reason := _reason(uri, error)) is None:
            raise
        raise PermissionError(errno.EACCES, f"{redacted(uri)}: {reason}") from error
    except Exception as error:
        if not _is_unknown(uri, error):
            raise
        if (reason := _reason(uri, error)) is not None:
            raise PermissionError(errno.EACCES, f"{redacted(uri)}: {reason}") from error
        raise OSError(errno.EIO, f"{redacted(uri)}: {shown(error, 500)}") from error


def _reason(uri: str, error: BaseException) -> str | None:
    """Why a store refused, if that is what the error says."""
    kind = scheme(uri)
    if kind == "s3":
        return refusal(uri) if _is_refusal(error) else None
    stores = {"gs": gcs.refusal, "abfs": azure.refusal}
    return stores[kind](error) if kind in stores else None


def _is_unknown(uri: str, error: BaseException) -> bool:
    """Whether it is an error of Azure's client that pyarrow has no class of Python's for."""
    if scheme(uri) != "abfs":
        return False
    from pyarrow import ArrowException

    return isinstance(error, ArrowException) and not isinstance(error, ValueError)


def _is_refusal(error: BaseException) -> bool:
    """Whether pyarrow's S3 client says that the store won't, not that it can't be reached."""
    found = _AWS_ERROR.search(str(error))
    if found is None:
        return False
    code, status = found.groups()
    return code in _REFUSING_CODES or status in _REFUSING_STATUSES


def _explains(
    function: Callable[Concatenate[str, _Arguments], _Result],
) -> Callable[Concatenate[str, _Arguments], _Result]:
    """A function of a URI whose refusals are explained."""

    @wraps(function)
    def wrapper(uri: str, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with explained(uri):
            return function(uri, *args, **kwargs)

    return wrapper


@_explains
def exists(uri: str) -> bool:
    """Whether a file or a non-empty prefix (folder) is there."""
    from pyarrow import fs

    system, path = filesystem(uri)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


@_explains
def file_sizes(uri: str, *, recursive: bool = True) -> dict[str, int]:
    """Finished files below a folder, sorted: relative path -> bytes; {} without a folder.

    Raises:
        ForeignDataError: an object store or the hub names a file that isn't below the folder.
    """
    system, path = filesystem(uri)
    found = {
        name: int(info.size)
        for name, info in _files_below(system, path, uri, recursive=recursive).items()
    }
    return {name: size for name, size in found.items() if not name.endswith(_PARTIAL)}


def _files_below(
    system: fs.FileSystem, root: str, uri: str, *, recursive: bool = True
) -> dict[str, fs.FileInfo]:
    """Files below a folder by their paths relative to it, sorted.

    A local disk has no names that lead out of a folder. An object's key is any text, and so is
    what a server answers, so those are checked before a path is made of them.
    """
    from pyarrow import fs

    infos = system.get_file_info(fs.FileSelector(root, recursive=recursive, allow_not_found=True))
    prefix, where = f"{root.rstrip('/')}/", f"the listing of {redacted(uri)}"
    named = {
        info.path.removeprefix(prefix): info for info in infos if info.type == fs.FileType.File
    }
    if scheme(uri) in _LISTED_BY_SERVERS:
        named = {relative_name(name, where=where): info for name, info in named.items()}
    return dict(sorted(named.items()))


@_explains
def file_stamps(uri: str) -> dict[str, str]:
    """Files right in a folder -> what changes when somebody writes to one; {} without a folder.

    On a disk that is its size, its number, and the time of its last change, which nobody can set;
    of objects their size and time.
    """
    system, path = filesystem(uri)
    found = _files_below(system, path, uri, recursive=False)
    if scheme(uri) in _LISTED_BY_SERVERS:
        return {name: f"{info.size} {info.mtime_ns}" for name, info in found.items()}
    states = {name: os.stat(info.path) for name, info in found.items()}
    return {
        name: f"{state.st_size} {state.st_dev} {state.st_ino} {state.st_ctime_ns}"
        for name, state in states.items()
    }


def list_files(uri: str, *, recursive: bool = True) -> list[str]:
    """Relative paths of finished files below a folder, sorted; [] if there is no folder."""
    return list(file_sizes(uri, recursive=recursive))


def expand(uri: str) -> list[str]:
    """URIs of the files that a pattern matches, sorted by path; any other URI stands for itself.

    ``*`` matches within a name, ``**`` any number of folders, ``[ab]`` one of these characters,
    ``?`` one character (not in an object's URI, where it starts the query). Hidden names, with a
    leading dot, must be spelled out. A local file whose name merely looks like a pattern is itself.

    Raises:
        FileNotFoundError: the pattern matches no file.
    """
    remote = on_objects(uri)

    def whole(path: str) -> str:
        return urlunsplit(urlsplit(uri)._replace(path=path)) if remote else path

    wildcards = "*[" if remote else "*[?"
    parts = (urlsplit(uri).path if remote else uri).split("/")
    special = [any(wildcard in part for wildcard in wildcards) for part in parts]
    fixed = (*special, True).index(True)
    folder, pattern = "".join(f"{part}/" for part in parts[:fixed]), parts[fixed:]
    if not pattern or (not remote and exists(uri)):
        return [uri]
    found = [
        member(whole(folder) or ".", name)
        for name in list_files(whole(folder) or ".", recursive=len(pattern) > 1 or "**" in pattern)
        if _matches(name.split("/"), pattern)
    ]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no file matches the pattern", uri)
    return found


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match the parts of a pattern."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    name, part = names[0], pattern[0]
    if name.startswith(".") and not part.startswith("."):
        return part == "**" and _matches(names, pattern[1:])
    if part == "**":
        return _matches(names, pattern[1:]) or _matches(names[1:], pattern)
    return fnmatchcase(name, part) and _matches(names[1:], pattern[1:])


@_explains
def read_bytes(uri: str, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """A file's content, which is held in memory whole.

    Args:
        max_bytes: what a file of its kind may have. A sparse file of a terabyte is made in a
            moment, so there is always a limit; files larger than JSON's say so here.

    Raises:
        FileNotFoundError: names the URI.
        ForeignDataError: it has more than `max_bytes`, and isn't read.
    """
    from pyarrow import fs

    system, path = filesystem(uri)
    info = system.get_file_info(path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, "no such file", uri)
    if info.size > max_bytes:
        raise ForeignDataError(
            f"{redacted(uri)} has {info.size} bytes; at most {max_bytes} are read"
        )
    with system.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


@_explains
def sha256(uri: str) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    system, path = filesystem(uri)
    digest = hashlib.sha256()
    with system.open_input_stream(path, compression=None) as stream:
        while piece := stream.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@_explains
def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Write a file, whole or not at all; folders are made as needed.

    Raises:
        ValueError: the URI is read-only (``package://``, ``hf://``).
        OSError: the storage refused; names the URI, and says so when there is no space left.
    """
    _refuse_read_only(uri)
    try:
        if scheme(uri) == "abfs":
            azure.upload(uri, content)
        elif on_objects(uri):
            system, path = filesystem(uri)
            with system.open_output_stream(path, compression=None) as stream:
                stream.write(content)
        else:
            _write_local(local_path(uri), [content])
    except OSError as error:
        raise _write_error(uri, len(content), error) from error


def copy_file(source: str, target: str) -> None:
    """Copy a file of any size a piece at a time, whole or not at all.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the target is read-only.
        OSError: a storage refused.
    """
    _refuse_read_only(target)
    with explained(source):
        system, path = filesystem(source)
        with system.open_input_stream(path, compression=None) as stream, explained(target):
            pieces = iter(lambda: stream.read(_COPY_BYTES), b"")
            if scheme(target) == "abfs":
                azure.upload(target, pieces)
                return
            if not on_objects(target):
                _write_local(local_path(target), pieces)
                return
            other, place = filesystem(target)
            try:
                with other.open_output_stream(place, compression=None) as copy:
                    for piece in pieces:
                        copy.write(piece)
            except BaseException:
                delete_file(target)  # closing it made an object of what had come so far
                raise


@_explains
def upload_folder(uri: str, folder: Path) -> None:
    """Copy a local folder's files into an object store, each whole or not at all.

    Raises:
        OSError: the store refused.
    """
    from pyarrow import fs

    if scheme(uri) == "abfs":
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    azure.upload(member(uri, path.relative_to(folder).as_posix()), file)
        return
    system, path_there = filesystem(uri)
    system.create_dir(path_there)
    fs.copy_files(str(folder), path_there, destination_filesystem=system)


@_explains
def delete_file(uri: str) -> None:
    """Delete a file; nothing happens if it isn't there."""
    from pyarrow import fs

    _refuse_read_only(uri)
    system, path = filesystem(uri)
    if system.get_file_info(path).type == fs.FileType.File:
        system.delete_file(path)


@_explains
def delete_folder(uri: str) -> None:
    """Delete a folder and all below it; nothing happens if it isn't there.

    Links are never followed: a link in the folder's place, or below it, goes, what it points to
    stays.

    Raises:
        ValueError: the URI is read-only, a whole bucket or the root of a file system.
    """
    from pyarrow import fs

    _refuse_read_only(uri)
    system, path = filesystem(uri)
    if not path.strip("/") or (on_objects(uri) and "/" not in path.strip("/")):
        raise ValueError(f"refusing to delete {redacted(uri)!r}, a root; name a folder inside it")
    if system.get_file_info(path).type != fs.FileType.Directory:
        return
    if scheme(uri) == "gs":  # where a folder that has no object of its own goes with its files
        system.delete_dir_contents(path)
        if system.get_file_info(path).type != fs.FileType.Directory:
            return
    system.delete_dir(path)


def delete_left_over(uri: str, *, recursive: bool = True) -> list[str]:
    """Delete what killed processes left half written below a local folder; returns the paths.

    Such a file was never there under its own name. One that was written to within ten minutes
    stays, since a worker that outlives its driver for a moment may be at it. Links aren't followed.
    On an object store nothing is left: an upload that isn't finished is no object.
    """
    if scheme(uri) != "file":
        return []
    newest, deleted = time.time() - _LEFT_SECONDS, []
    for folder, _, names in os.walk(local_path(uri)):
        for name in filter(_UNFINISHED.fullmatch, names):
            path = Path(folder, name)
            try:
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mtime < newest:
                    path.unlink()
                    deleted.append(str(path))
            except OSError:
                pass  # another process was faster, or may delete there and this one mayn't
        if not recursive:
            break
    return sorted(deleted)


@_explains
def local_folder(uri: str, cache_dir: Path | None = None) -> Path:
    """A local path that holds the folder's files, for libraries that only read local files.

    Local and package folders are returned as they are. Objects are downloaded once into
    ``cache_dir`` (default ``$XDG_CACHE_HOME/piflow`` or ``~/.cache/piflow``), in a folder named by
    the URI and every file's size and time, so a changed source is downloaded anew. Of several
    processes of a machine one downloads, and the others wait for it. What comes from the hub lies
    in the hub client's own cache (``HF_HOME``), and is found there without a network.

    Raises:
        FileNotFoundError: there is no such folder, or it is empty.
        ForeignDataError: the store names a file that isn't below the folder; nothing is written.
    """
    if scheme(uri) == "hf":
        return hub_snapshot(uri)
    system, path = filesystem(uri)
    if not on_objects(uri):
        if not Path(path).is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", uri)
        return Path(path)
    found = _files_below(system, path, uri)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no such folder, or it is empty", uri)
    files = [(info.path, info.size, info.mtime_ns) for info in found.values()]
    key = hashlib.sha256(repr((uri, sorted(files))).encode()).hexdigest()[:24]
    target = (cache_dir or default_cache()) / key
    if not target.is_dir():
        with _downloading(target):
            if not target.is_dir():
                _download(system, found, target)
    return target


def at_commit(uri: str, commit: str | None = None) -> str:
    """A place on the hub as it is at one commit, and any other place as it is.

    Args:
        commit: None: the one that the URI's revision names now.

    Raises:
        OSError: the hub knows no such revision, or can't be asked.
    """
    return hub_at_commit(uri, commit) if scheme(uri) == "hf" else uri


def commit_of(uri: str) -> str | None:
    """The revision in a hub URI; None: it has none, or is another place."""
    return hub_place(uri).revision if scheme(uri) == "hf" else None


def for_ranges(uri: str) -> str:
    """Where to read a big folder by byte ranges, again in every attempt: a hub's from its cache.

    A machine then downloads it once, however many workers and restarts read it.
    """
    return str(local_folder(uri)) if scheme(uri) == "hf" else uri


@contextmanager
def _downloading(target: Path) -> Iterator[None]:
    """A block that one process of those sharing the cache is in; it looks again for `target`.

    The kernel lets go of the lock of a process that was killed. Where a file system has no locks,
    everybody downloads.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.with_name(f"{target.name}.lock")
    with name.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        yield
        name.unlink(missing_ok=True)  # whoever waits for it, or comes now, finds the folder


def _download(system: fs.FileSystem, files: Mapping[str, fs.FileInfo], target: Path) -> None:
    """Copy into a fresh folder, then rename: a folder under its final name is complete.

    Args:
        system: where the files lie.
        files: by their checked paths below `target`.
        target: the folder to be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch("download", target.parent) as fresh:
        for name, info in files.items():
            destination = fresh / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            with (
                system.open_input_stream(info.path, compression=None) as source,
                open(destination, "xb", opener=without_links) as copy,
            ):
                shutil.copyfileobj(source, copy, _COPY_BYTES)
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster: its copy is the same
                raise


def without_links(path: str, flags: int) -> int:
    """`open`'s opener for files that must not be written through a link in their place."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/piflow`` or ``~/.cache/piflow``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "piflow"


def _refuse_read_only(uri: str) -> None:
    if scheme(uri) in READ_ONLY:
        raise ValueError(
            f"{redacted(uri)!r} is read-only; write to a local path or an object store"
        )


def _write_local(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        with partial.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_error(uri: str, size: int, error: OSError) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space left; free some, or choose another place; what was there is unchanged"
    else:
        reason = str(error)
    return OSError(
        error.errno or errno.EIO, f"cannot write {size} bytes to {redacted(uri)}: {reason}"
    )
