"""Which places a foreign file may name: its own folder or bucket, and what a recipe allows.

A row of a prompts file may be written by somebody who means harm: an object store that it names
would get a request signed with this machine's keys, a path that it names would be read here. So a
name is resolved, normalised and compared with the allowed places before anything is opened, and a
local file is opened only where it lies once all links are followed.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

from piflow.storage.foreign import ForeignDataError, relative_name, shown
from piflow.storage.hub import hub_place
from piflow.storage.object_uri import OBJECT_STORES
from piflow.storage.uri import (
    absolute,
    local_path,
    object_place,
    on_objects,
    package_path,
    package_place,
    scheme,
    sibling,
)

ALLOWED_SCHEMES = ("file", *OBJECT_STORES, "hf")

_LONGEST = 4096  # characters of a URI


@dataclass(frozen=True)
class _Place:
    """A URI taken apart: what names server and volume, and the parts of the path below."""

    volume: tuple[object, ...]
    parts: tuple[str, ...]

    def holds(self, other: _Place) -> bool:
        """Whether the other one is this place or lies below it, by whole parts of the path."""
        return self.volume == other.volume and self.parts == other.parts[: len(self.parts)]


def _place(uri: str) -> _Place:
    kind = scheme(uri)
    if kind in OBJECT_STORES:
        store, key = object_place(uri)
        return _Place(store, _parts(key))
    if kind == "hf":
        hub = hub_place(uri)
        return _Place((kind, hub.repo_type, hub.repo_id, hub.revision), _parts(hub.path))
    if kind == "package":  # not looked up: that imports the parents of a dotted name
        package, inside = package_place(uri)
        return _Place((kind, package), _parts(inside))
    return _Place(("file",), _parts(os.path.abspath(local_path(uri))))


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def holds(prefix: str, place: str) -> bool:
    """Whether a place is the one that a prefix names, or lies below it; nothing is opened.

    Raises:
        ValueError: one of them is no URI.
    """
    return _place(prefix).holds(_place(place))


def require_prefix(uri: str) -> None:
    """Check how a place that a recipe allows is written.

    Raises:
        ValueError: it names no place that rows could be allowed to name.
    """
    if scheme(uri) not in ALLOWED_SCHEMES:
        raise ValueError(
            f"{uri!r} can't be allowed to rows of a prompts file; expected a local path, "
            "s3://bucket/prefix, gs://…, abfs://… or hf://owner/name"
        )
    if any(part in (".", "..") for part in _place(uri).parts):
        raise ValueError(f"{uri!r} holds '.' or '..'; write the place out")


class NamedPlaces:
    """The places that the rows of one file may name.

    Args:
        file: URI of the file that names them.
        allowed: URIs, each with all that lies below it, that may be named besides the file's
            folder or, on an object store, the file's bucket at the file's endpoint.
    """

    def __init__(self, file: str, allowed: Sequence[str] = ()) -> None:
        self._file = file
        folder = os.path.dirname(file.partition("?")[0])
        home = _place(str(package_path(file)) if scheme(file) == "package" else file)
        self._on_objects, self._is_local = on_objects(file), scheme(file) == "file"
        parts = () if self._on_objects else home.parts[:-1]
        self._home = f"the bucket of {file}" if self._on_objects else f"the folder {folder or '.'}"
        self._folder = home.parts[:-1]
        self._places = (_Place(home.volume, parts), *(_place(uri) for uri in allowed))
        self.folders = tuple(
            f"/{'/'.join(place.parts)}" for place in self._places if place.volume == ("file",)
        )
        """The local ones, absolute: a named local file must really lie in one of them."""

    def resolve(self, name: str) -> str:
        """The URI that a row's name stands for: local ones absolute and normalised.

        Raises:
            ValueError: it lies outside of the allowed places, or is no name of a file.
        """
        if len(name) > _LONGEST:
            raise ForeignDataError(
                f"{shown(repr(name), 60)} is no name of a file: at most {_LONGEST} characters"
            )
        if "://" not in name and not os.path.isabs(name):
            uri = self._beside(name)
            if not _climbs(posixpath.normpath(name)):
                return uri  # it stays in the folder, as it is written
        else:
            kind = name.partition("://")[0] if "://" in name else "file"
            if kind not in ALLOWED_SCHEMES:
                raise ForeignDataError(
                    f"a row names a place of scheme {shown(repr(kind), 20)}; expected a path "
                    "relative to the prompts file's folder, or file://, s3://, gs://, abfs:// or "
                    "hf:// (package:// is for recipes only)"
                )
            uri = absolute(name)
        place = _place(uri)
        if any(part in (".", "..") or "\0" in part for part in place.parts):
            raise ForeignDataError(
                f"{shown(repr(name))} isn't a plain path; expected one without .."
            )
        if not any(allowed.holds(place) for allowed in self._places):
            raise self._outside(name)
        return uri

    def _beside(self, name: str) -> str:
        """What a relative name stands for; `..` is resolved here, never by a server."""
        inside = posixpath.normpath(name)
        if not _climbs(inside):
            relative_name(inside, where="a row")
            if self._is_local:
                return f"{self.folders[0].rstrip('/')}/{inside}"
            return sibling(self._file, quote(inside) if self._on_objects else inside)
        if self._is_local:
            return os.path.normpath(f"{self.folders[0]}/{inside}")
        key = posixpath.normpath("/".join([*self._folder, inside]))
        if not self._on_objects or _climbs(key):
            raise self._outside(name)
        relative_name(key, where="a row")
        return urlunsplit(urlsplit(self._file)._replace(path=f"/{quote(key)}"))

    def _outside(self, name: str) -> ForeignDataError:
        return ForeignDataError(
            f"{shown(repr(name))} lies outside of {self._home}, and rows may name no other place; "
            "if you trust it, add its beginning to embed.allow_uris in the recipe"
        )


def _climbs(path: str) -> bool:
    return path.split("/", 1)[0] == ".."


def real_path(uri: str, folders: Sequence[str]) -> str:
    """Where a named local file really lies, all links followed, if that is in one of the folders.

    Raises:
        ValueError: a link leads out of them.
    """
    path = package_path(uri) if scheme(uri) == "package" else local_path(uri)
    real = _parts(os.path.realpath(path))
    for folder in folders:
        inside = _parts(os.path.realpath(folder))
        if real[: len(inside)] == inside:
            return f"/{'/'.join(real)}"
    raise ForeignDataError(
        f"{shown(uri)} is a link to {shown('/' + '/'.join(real))}, which rows may not name; if you "
        "trust it, add the place's beginning to embed.allow_uris in the recipe"
    )
