"""URIs of files and folders: their schemes, joining and splitting them."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from piflow.storage.azure import azure_place
from piflow.storage.foreign import redacted, shown
from piflow.storage.gcs import gcs_place
from piflow.storage.hub import hub_place
from piflow.storage.object_uri import OBJECT_STORES
from piflow.storage.s3 import s3_place

SCHEMES = ("file", *OBJECT_STORES, "package", "hf")

READ_ONLY = ("package", "hf")

_CHOICES = "file:///…, s3://…, gs://…, abfs://…, package://…, hf://…"

_OTHER_NAMES = {"gcs": "gs", "abfss": "abfs", "az": "abfs", "azure": "abfs"}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)")

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")

_VARIABLE = re.compile(r"\$(\{|[A-Za-z_])")

_MAX_URI = 4096


def scheme(uri: str) -> str:
    """``file``, ``s3``, ``gs``, ``abfs``, ``package`` or ``hf``.

    Raises:
        ValueError: the URI is empty, has another scheme, or is nearly one; says what to write.
    """
    if not uri:
        raise ValueError(f"storage URI is empty; give a local path or one of {_CHOICES}")
    found = _SCHEME.match(uri)
    if found is not None and found[2]:
        return _known(uri, found[1], found[2])
    for name in SCHEMES:
        if uri.startswith(f"{name}//"):
            raise ValueError(
                f"storage URI {redacted(uri)!r} lacks a colon; write {name}://…, or ./{name}/… for "
                "a local folder"
            )
    if _WINDOWS.match(uri):
        raise ValueError(
            f"{redacted(uri)!r} is a Windows path; piflow runs on Linux and macOS: give a path of "
            f"this machine, or one of {_CHOICES}"
        )
    return "file"


def _known(uri: str, name: str, slashes: str) -> str:
    """The scheme of a URI that has one, if it is written as it must be."""
    if name in SCHEMES and len(slashes) > 1:
        return name
    meant = _OTHER_NAMES.get(name.lower(), name.lower())
    if meant in SCHEMES:
        rest = redacted(uri).partition(":")[2].lstrip("/")
        written = f"file:///{rest}" if meant == "file" else f"{meant}://{rest}"
        raise ValueError(f"storage URI {redacted(uri)!r} is misspelt; write {written}")
    raise ValueError(
        f"storage URI {redacted(uri)!r} has scheme {name!r}; supported: {', '.join(SCHEMES)}, or a "
        "local path. Mount or copy what lies elsewhere; stores that speak S3 are "
        "s3://bucket/prefix?endpoint_override=host:port"
    )


def require_valid(uri: str) -> None:
    """Check how a URI is written, without looking at what is there.

    Raises:
        ValueError: as `filesystem` and `require_plain`.
    """
    require_plain(uri)
    kind = scheme(uri)
    if kind in OBJECT_STORES:
        object_place(uri)
        return
    checks = {"hf": hub_place, "package": package_place, "file": local_path}
    checks[kind](uri)


def require_plain(uri: str) -> None:
    """Check the text of a URI of any scheme.

    Raises:
        ValueError: it has control characters or blanks around it, is too long, or holds a variable
            such as ``$HOME``, which nothing expands.
    """
    if len(uri) > _MAX_URI:
        raise ValueError(f"a URI of {len(uri)} characters; at most {_MAX_URI}")
    if uri != uri.strip() or shown(uri, _MAX_URI) != uri:
        raise ValueError(
            f"URI {redacted(uri)!r} has line breaks, other control characters or blanks around it; "
            "leave them out"
        )
    if _VARIABLE.search(uri):
        raise ValueError(
            f"URI {redacted(uri)!r} holds a variable, and recipes expand none; write the value, or "
            'have the shell do it: --set "key=$HOME/…" (a leading ~ is this user\'s home)'
        )


def on_objects(uri: str) -> bool:
    """Whether a place is in an object store, where nothing is locked, linked or half written."""
    return scheme(uri) in OBJECT_STORES


class ObjectPlace(NamedTuple):
    """What the URI of an object names."""

    store: tuple[object, ...]  # equal for two URIs of one bucket at one endpoint
    key: str


def object_place(uri: str) -> ObjectPlace:
    """Take the URI of an object or a prefix apart.

    Raises:
        ValueError: it is of no object store, names no bucket, or has other options or keys.
    """
    kind = scheme(uri)
    if kind == "s3":
        bucket, key, options = s3_place(uri)
    elif kind == "gs":
        bucket, key, options = gcs_place(uri)
    elif kind == "abfs":
        place = azure_place(uri)
        bucket, key, options = f"{place.container}@{place.address}", place.key, place.options
    else:
        raise ValueError(f"{redacted(uri)!r} is in no object store")
    return ObjectPlace((kind, bucket, *sorted(options.items())), key)


def absolute(uri: str) -> str:
    """The same place, independent of the working directory; other processes need this form."""
    return uri if scheme(uri) != "file" else str(local_path(uri))


def join(uri: str, *parts: str) -> str:
    """Append path parts; the query of an object's URI stays at the end."""
    tail = "/".join(part.strip("/") for part in parts)
    if not tail:
        return uri
    if not on_objects(uri):
        return f"{uri.rstrip('/') or '/'}/{tail}" if uri != "/" else f"/{tail}"
    pieces = urlsplit(uri)
    return urlunsplit(pieces._replace(path=f"{pieces.path.rstrip('/')}/{tail}"))


def sibling(uri: str, name: str) -> str:
    """What lies under `name` in the same folder; the query of an object's URI stays at the end.

    Raises:
        ValueError: the URI is a root and has no siblings.
    """
    if on_objects(uri):
        pieces = urlsplit(uri)
        parent, separator, _ = pieces.path.rstrip("/").rpartition("/")
        if separator:
            return urlunsplit(pieces._replace(path=f"{parent}/{name}"))
    elif scheme(uri) != "hf" or hub_place(uri).path:
        prefix, _, path = uri.rpartition("://")
        head, separator, leaf = path.rstrip("/").rpartition("/")
        if leaf not in ("", ".", "..") and (separator or not prefix):
            return f"{prefix}{'://' if prefix else ''}{head}{separator}{name}"
    raise ValueError(
        f"{redacted(uri)!r} is a root and has nothing beside it; name a folder inside it"
    )


def member(folder: str, name: str) -> str:
    """URI of a file that `list_files` named: characters that mean something in a URI are quoted."""
    return join(folder, quote(name) if on_objects(folder) else name)


def base_name(uri: str) -> str:
    """The last part of the path: of ``s3://bucket/folder/file.csv?region=x`` it is ``file.csv``."""
    return Path(urlsplit(uri).path if on_objects(uri) else uri).name


def suffix(uri: str) -> str:
    """The file name's ending with its dots, lower case: ``.csv``, ``.csv.gz``; '' if none."""
    name = Path(base_name(uri).lower())
    return Path(name.stem).suffix + name.suffix if name.suffix == ".gz" else name.suffix


def local_path(uri: str) -> Path:
    path = uri.removeprefix("file://")
    if "://" in uri and not path.startswith("/"):
        raise ValueError(
            f"file URI {redacted(uri)!r} must hold an absolute path: file:///folder/file"
        )
    return Path(os.path.abspath(os.path.expanduser(path)))


def package_place(uri: str) -> tuple[str, str]:
    """Package and path inside of it.

    Raises:
        ValueError: no package can have this name.
    """
    package, _, inside = uri.removeprefix("package://").partition("/")
    if not all(part.isidentifier() for part in package.split(".")):
        raise ValueError(
            f"{redacted(uri)!r} names no Python package; expected package://name/folder/file"
        )
    return package, inside


def package_path(uri: str) -> Path:
    package, inside = package_place(uri)
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{redacted(uri)!r} needs the Python package {package!r}, which is not installed here; "
            "install it, or give another URI"
        )
    candidates = [Path(folder) / inside for folder in spec.submodule_search_locations]
    return next((path for path in candidates if path.exists()), candidates[0])
