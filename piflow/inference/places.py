"""Which places an adapter's notes may have opened here.

An adapter is somebody else's file: a base or encoder that it names by an absolute path, on another
object store or in a package would be opened with this machine's rights and keys. Its own folder and
bucket and the public hub are open to it; all else is the user's to name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piflow import storage
from piflow.storage.foreign import ForeignDataError, relative_name, shown


def resolve_places(
    places: Mapping[str, str], adapter: str, allowed: Sequence[str] = ()
) -> dict[str, str]:
    """URIs of the places that an adapter names.

    Args:
        places: what each is ("base", "encoder") -> what the adapter says: a URI, or a path from
            its own folder.
        adapter: URI or path of the adapter's folder.
        allowed: URIs that the user allows, with all that lies below them; ``package://`` allows
            every package.

    Raises:
        ForeignDataError: places that are neither open to adapters nor allowed; names them all,
            and the options that would allow them.
    """
    found = {what: _resolve(place, adapter, allowed) for what, place in places.items()}
    refused = {what: places[what] for what, uri in found.items() if uri is None}
    if refused:
        named = ", ".join(f"{what} {shown(repr(place))}" for what, place in refused.items())
        options = " ".join(f"--allow {shown(place)}" for place in refused.values())
        raise ForeignDataError(
            f"the adapter {adapter} names {named}; an adapter may name hf:// places, paths inside "
            "its own folder, and its own bucket, others only if you say so. If you know them, add "
            f"{options}, or say where they are with --base and --encoder (in Python: allowed=, "
            "base=, encoder=)"
        )
    return {what: uri for what, uri in found.items() if uri is not None}


def _resolve(place: str, adapter: str, allowed: Sequence[str]) -> str | None:
    """The place's URI, or None if it is neither open to the adapter nor allowed."""
    where = f"the adapter {adapter}"
    if "://" not in place and not place.startswith(("/", "~")):
        return storage.join(adapter, relative_name(place, where=where))
    if ".." in place.split("?")[0].split("/"):
        raise ForeignDataError(f"{where} names {shown(repr(place))}; expected a place without '..'")
    kind = storage.scheme(place)
    if kind == "hf":
        storage.require_valid(place)
        return place
    if any(_holds(prefix, place) for prefix in allowed):
        return storage.absolute(place)
    if kind == "s3" and storage.scheme(adapter) == "s3":
        own, other = storage.s3_place(adapter), storage.s3_place(place)
        if (own.bucket, own.options) == (other.bucket, other.options):
            return place
    return None


def _holds(prefix: str, place: str) -> bool:
    """Whether a place is what the user allows, or lies below it."""
    if prefix == place or prefix == "package://":
        return place.startswith(prefix)
    kind = storage.scheme(prefix)
    if kind != storage.scheme(place):
        return False
    if kind == "s3":
        outer, inner = storage.s3_place(prefix), storage.s3_place(place)
        same = (outer.bucket, outer.options) == (inner.bucket, inner.options)
        return same and f"{inner.key}/".startswith(f"{outer.key}/" if outer.key else "")
    outer_path, inner_path = storage.absolute(prefix), storage.absolute(place)
    return f"{inner_path}/".startswith(f"{outer_path.rstrip('/')}/")
