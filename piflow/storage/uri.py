"""URIs of files and folders: their schemes, joining and splitting them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from piflow.storage.hub import hub_place

SCHEMES = ("file", "s3", "package", "hf")

READ_ONLY = ("package", "hf")

_CHOICES = "file://…, s3://…, package://…, hf://…"


def scheme(uri: str) -> str:
    """``file``, ``s3``, ``package`` or ``hf``.

    Raises:
        ValueError: the URI is empty or has another scheme.
    """
    if not uri:
        raise ValueError(f"storage URI is empty; give a local path or one of {_CHOICES}")
    name = uri.split("://", 1)[0] if "://" in uri else "file"
    if name not in SCHEMES:
        raise ValueError(
            f"storage URI {uri!r} has scheme {name!r}; supported: {', '.join(SCHEMES)}, or a "
            "local path"
        )
    return name


def absolute(uri: str) -> str:
    """The same place, independent of the working directory; other processes need this form."""
    return uri if scheme(uri) != "file" else str(local_path(uri))


def join(uri: str, *parts: str) -> str:
    """Append path parts; the query of an S3 URI stays at the end."""
    tail = "/".join(part.strip("/") for part in parts)
    if not tail:
        return uri
    if scheme(uri) != "s3":
        return f"{uri.rstrip('/') or '/'}/{tail}" if uri != "/" else f"/{tail}"
    pieces = urlsplit(uri)
    return urlunsplit(pieces._replace(path=f"{pieces.path.rstrip('/')}/{tail}"))


def sibling(uri: str, name: str) -> str:
    """What lies under `name` in the same folder; the query of an S3 URI stays at the end.

    Raises:
        ValueError: the URI is a root and has no siblings.
    """
    if scheme(uri) == "s3":
        pieces = urlsplit(uri)
        parent, separator, _ = pieces.path.rstrip("/").rpartition("/")
        if separator:
            return urlunsplit(pieces._replace(path=f"{parent}/{name}"))
    elif scheme(uri) != "hf" or hub_place(uri).path:
        prefix, _, path = uri.rpartition("://")
        head, separator, leaf = path.rstrip("/").rpartition("/")
        if leaf not in ("", ".", "..") and (separator or not prefix):
            return f"{prefix}{'://' if prefix else ''}{head}{separator}{name}"
    raise ValueError(f"{uri!r} is a root and has nothing beside it; name a folder inside it")


def member(folder: str, name: str) -> str:
    """URI of a file that `list_files` named: characters that mean something in a URI are quoted."""
    return join(folder, quote(name) if scheme(folder) == "s3" else name)


def base_name(uri: str) -> str:
    """The last part of the path: of ``s3://bucket/folder/file.csv?region=x`` it is ``file.csv``."""
    return Path(urlsplit(uri).path if scheme(uri) == "s3" else uri).name


def suffix(uri: str) -> str:
    """The file name's ending with its dots, lower case: ``.csv``, ``.csv.gz``; '' if none."""
    name = Path(base_name(uri).lower())
    return Path(name.stem).suffix + name.suffix if name.suffix == ".gz" else name.suffix


def local_path(uri: str) -> Path:
    path = uri.removeprefix("file://")
    if "://" in uri and not path.startswith("/"):
        raise ValueError(f"file URI {uri!r} must hold an absolute path: file:///folder/file")
    return Path(os.path.abspath(os.path.expanduser(path)))


def package_path(uri: str) -> Path:
    package, _, inside = uri.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{uri!r} needs the Python package {package!r}, which is not installed here; "
            "install it, or give another URI"
        )
    candidates = [Path(folder) / inside for folder in spec.submodule_search_locations]
    return next((path for path in candidates if path.exists()), candidates[0])
