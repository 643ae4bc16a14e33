"""What the URIs of object stores have in common: ``scheme://store/key?option=value``."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

from piflow.storage.foreign import redacted, shown

OBJECT_STORES = ("s3", "gs", "abfs")

HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


def store_key_options(uri: str, allowed: tuple[str, ...]) -> tuple[str, str, dict[str, str]]:
    """What stands before the first slash, the unquoted key behind it, and the options.

    Args:
        allowed: names of options.

    Raises:
        ValueError: the URI has a ``#``, or unknown, doubled or wrong options; keys and passwords
            aren't repeated.
    """
    kind = uri.partition("://")[0].upper()
    if "#" in uri:
        raise ValueError(
            f"{kind} URI {redacted(uri)!r} has a '#', which would cut off what follows it; write "
            "%23 where it is part of a name"
        )
    written, _, query = uri.partition("://")[2].partition("?")
    store, _, path = written.partition("/")
    return store, unquote(path).strip("/"), _options(uri, kind, query, allowed)


def _options(uri: str, kind: str, query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if unknown := sorted(options.keys() - set(allowed)):
        raise ValueError(
            f"{kind} URI {redacted(uri)!r} has the option(s) {shown(', '.join(unknown))}; "
            f"supported: {', '.join(allowed)}"
        )
    if len(pairs) != len(options):
        raise ValueError(f"{kind} URI {redacted(uri)!r} has an option twice; leave one out")
    if options.get("scheme", "https") not in ("http", "https"):
        raise ValueError(
            f"{kind} URI {redacted(uri)!r} has another scheme than http and https for its endpoint"
        )
    if "endpoint_override" in options and not HOST.fullmatch(options["endpoint_override"]):
        raise ValueError(
            f"{kind} URI {redacted(uri)!r}: endpoint_override must be host or host:port, without "
            "protocol, path and keys; http is chosen by &scheme=http"
        )
    return options
