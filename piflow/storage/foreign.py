"""What comes from outside, before anything is made of it: names, text and JSON.

A manifest, an adapter, a model folder, an object key or a server's answer may be written by
somebody who means harm. A name becomes a path only after `relative_name`, a text reaches a message
or a terminal only after `shown`, and JSON is read by `parse_json`. All limits are stated in the
error that they raise.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

MAX_JSON_BYTES = 64 * 2**20
"""An index of 20B weights has 2 MB; nothing that piflow reads as JSON comes near this."""

MAX_JSON_DEPTH = 64

_MAX_NAME = 1024  # characters; the longest key that S3 takes

_MAX_PART = 255  # bytes; the longest name of a file or folder that a disk takes

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


class ForeignDataError(ValueError):
    """Data from outside that can't be used; the message names its place and what is wrong."""


def shown(text: object, limit: int = 200) -> str:
    """A foreign text as it may stand in a message or a terminal: on one line, escaped, cut.

    Control, format, surrogate and private characters become ``\\x1b`` or ``\\u202e``; what goes
    beyond `limit` characters is cut, and the text's length is said.
    """
    whole = str(text)
    escaped = "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _HIDDEN
        else character
        for character in whole[:limit]
    )
    return escaped if len(whole) <= limit else f"{escaped}… ({len(whole)} characters)"


_AUTHORITY = re.compile(r"[/?#]")

_PORT = re.compile(r":\d{1,5}$")

_CONTAINER = re.compile(r"[a-z0-9-]{3,63}@[a-z0-9]{3,24}\.(dfs|blob)(\.[a-z]+){3}")

_OPTION = re.compile(r"(?<=[?&;#])([^=&;#]*=)([^&;#]*)")

_HARMLESS_OPTION = re.compile(
    r"(endpoint_override|region|scheme|sslmode|read_default_file)=[\w./~:\[\]-]*"
)


def redacted(uri: object) -> str:
    """A URI as it may stand in a message: without user and password, and without secret options.

    What stands before an ``@``, where it may be a user and a password, becomes ``…``; so do the
    values of all options but those that piflow knows to be none. A URI that is none, since it is
    cut short or has blanks, is treated alike. The rest is `shown`.
    """
    text = str(uri)
    kind, separator, rest = text.rpartition("://") if text.count("://") == 1 else ("", "", text)
    authority = _AUTHORITY.split(rest, maxsplit=1)[0]
    at = rest.rfind("@")
    if kind == "abfs" and _CONTAINER.fullmatch(authority):
        pass  # container and account, in Azure's way of writing them
    elif at >= 0 and (":" in rest[:at] or (separator and "@" in authority)):
        rest = f"…{rest[at:]}"
    elif separator and ":" in authority and not _PORT.search(authority):
        rest = f"…{rest[len(authority) :]}"
    rest = _OPTION.sub(
        lambda found: found[0] if _HARMLESS_OPTION.fullmatch(found[0]) else f"{found[1]}…", rest
    )
    return shown(f"{kind}{separator}{rest}", 500)


def relative_name(name: object, *, where: str) -> str:
    """A foreign name of a file below a folder, if it stays below that folder.

    Parts are divided by ``/``. `where` says for the message who gave the name
    (``"the manifest s3://…"``).

    Raises:
        ForeignDataError: it is no text, empty, absolute, too long, or holds ``..``, ``.``, an
            empty part, a backslash or a character that can't be printed.
    """
    expected = "expected a relative path below the folder, without '..'"
    if not isinstance(name, str) or not name:
        raise ForeignDataError(f"{where} names the file {shown(repr(name))}; {expected}")
    wrong = (
        len(name) > _MAX_NAME
        or any(len(part.encode(errors="replace")) > _MAX_PART for part in name.split("/"))
        or "\\" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    )
    if wrong:
        raise ForeignDataError(f"{where} names the file {shown(repr(name))}; {expected}")
    return name


def parse_json(
    content: bytes | str,
    *,
    where: str,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
) -> Any:
    """JSON from outside (UTF-8), within limits of size and depth and without duplicate keys.

    Raises:
        ForeignDataError: too large, too deep, a key twice in one object, not UTF-8, or not JSON.
    """
    if len(content) > max_bytes:
        raise ForeignDataError(f"{where} has {len(content)} bytes of JSON; at most {max_bytes}")
    too_deep = ForeignDataError(f"{where} nests JSON deeper than {max_depth} levels")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ForeignDataError(f"{where} isn't JSON: {shown(error)}") from None
    if _depth(tree, max_depth) > max_depth:
        raise too_deep
    return tree


def parse_object(content: bytes | str, *, where: str, **limits: int) -> dict[str, Any]:
    """As `parse_json`, for files whose outermost value is an object.

    Raises:
        ForeignDataError: as `parse_json`, or it is another value (a list, ``null``).
    """
    tree = parse_json(content, where=where, **limits)
    if not isinstance(tree, dict):
        raise ForeignDataError(
            f"{where} holds JSON of type {type(tree).__name__}; expected an object, {{…}}"
        )
    return tree


def refuse_lfs_pointer(head: bytes, *, where: str) -> None:
    """Refuse a file that Git LFS left in place of its content; `head` is its first 64 bytes.

    Raises:
        ForeignDataError: it is one; says how to get the content.
    """
    if head.startswith(_LFS_POINTER):
        raise ForeignDataError(
            f"{where} is a Git LFS pointer, not the content; fetch that with `git lfs pull`"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shown(repr(twice))} stands twice in one object")
    return found


def _depth(tree: Any, limit: int) -> int:
    """Levels of lists and objects, counted up to one above the limit."""
    level, depth = [tree], 0
    while depth <= limit:
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            break
        depth += 1
    return depth
