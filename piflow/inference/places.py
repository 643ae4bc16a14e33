"""Which places an adapter's notes may have opened here, and how they name folders of a machine.

An adapter is somebody else's file: a base or encoder that it names by an absolute path, on another
object store or in a package would be opened with this machine's rights and keys. Its own folder and
bucket and the public hub are open to it; all else is the user's to name.

A local folder is written into an adapter by its name alone, since its path means nothing elsewhere.
It is found again in the adapter's own folder, or below what the user allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from piflow import storage
from piflow.roles.adapter import CONFIG_FILE
from piflow.roles.merged import TRANSFORMER, is_merged
from piflow.storage.foreign import ForeignDataError, relative_name, shown
from piflow.storage.places import holds

_MOST_NAMED = 20  # folders in a message
_PARTS = ("transformer", "vae", "text_encoder")  # folders whose name says nothing of the model
_PIPELINE = "model_index.json"
_PACKAGES = "package://"  # allows all of them
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[^/]+)?")


def on_hub(place: str) -> str:
    """``owner/name`` without such a folder here is the hub's; every other place stays as it is."""
    return f"hf://{place}" if _HUB_NAME.fullmatch(place) and not storage.exists(place) else place


def adapter_place(adapter: str, subfolder: str | None = None) -> str:
    """URI of an adapter's folder.

    Args:
        adapter: path, URI, or a repository's name on the hub.
        subfolder: of it; a repository may hold several adapters.

    Raises:
        ValueError: a subfolder that leads out of it.
    """
    if subfolder is not None:
        subfolder = relative_name(subfolder, where="--subfolder")
    place = on_hub(adapter)
    return place if subfolder is None else storage.join(place, subfolder)


def adapter_files(uri: str) -> str:
    """Where an adapter's files are read: of one on the hub, in the hub client's cache.

    Of a merged student, a pipeline's folder or one laid out alike, that is its transformer's.

    Raises:
        ValueError: there is none, but in folders below it; names them.
        OSError: the hub has no such repository or folder, or doesn't let it be read.
    """
    if storage.exists(storage.join(uri, CONFIG_FILE)):
        return str(storage.local_folder(uri)) if storage.scheme(uri) == "hf" else uri
    inner = storage.join(uri, TRANSFORMER)
    if storage.exists(storage.join(inner, CONFIG_FILE)):
        files = str(storage.local_folder(inner)) if storage.scheme(uri) == "hf" else inner
        if is_merged(files):
            return files
    below = [name for name in storage.list_files(uri) if name.endswith(f"/{CONFIG_FILE}")]
    if below and not storage.exists(storage.join(uri, _PIPELINE)):
        folders = [shown(name.removesuffix(f"/{CONFIG_FILE}")) for name in below[:_MOST_NAMED]]
        more = f" and {len(below) - _MOST_NAMED} more" if len(below) > _MOST_NAMED else ""
        raise ValueError(
            f"{uri} has no {CONFIG_FILE} of its own, only in {', '.join(folders)}{more}: say which "
            "adapter with --subfolder, or append its folder's name"
        )
    return uri  # `load_adapter` says what is missing


def portable(place: str) -> str:
    """How an adapter names a place: a store's URI as it is, a local folder by its last name.

    ``/home/a/models/FLUX.1-dev/transformer`` is ``FLUX.1-dev/transformer``.
    """
    if storage.scheme(place) != "file":
        return place
    parts = [part for part in storage.absolute(place).split("/") if part] or ["model"]
    return "/".join(parts[-2:] if parts[-1] in _PARTS else parts[-1:])


def parts_of_base(base: str) -> dict[str, str]:
    """What lies where in a base that the user names.

    Args:
        base: a transformer's folder, or a diffusers pipeline's with transformer, VAE and text
            encoders: a path, a URI, or a repository's name on the hub (``owner/name``).

    Returns:
        "base" alone, or "base", "VAE" and "encoder".
    """
    base = on_hub(base)
    if not storage.exists(storage.join(base, _PIPELINE)):
        return {"base": base}
    return {
        "base": storage.join(base, "transformer"),
        "VAE": storage.join(base, "vae"),
        "encoder": base,
    }


def is_name(place: str) -> bool:
    """Whether a place is a folder's name and no path or URI."""
    return "://" not in place and not place.startswith(("/", "~"))


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
    if is_name(place):
        name = relative_name(place, where=where)
        found = (uri for prefix in allowed for uri in _below(prefix, name) if storage.exists(uri))
        return next(found, storage.join(adapter, name))
    if ".." in place.split("?")[0].split("/"):
        raise ForeignDataError(f"{where} names {shown(repr(place))}; expected a place without '..'")
    kind = storage.scheme(place)
    if kind == "hf":
        storage.require_valid(place)
        return place
    for prefix in allowed:
        if storage.scheme(prefix) == kind and (prefix == _PACKAGES or holds(prefix, place)):
            return storage.absolute(place)
    if storage.on_objects(place) and storage.on_objects(adapter):
        if storage.object_place(adapter).store == storage.object_place(place).store:
            return place
    return None


def _below(prefix: str, name: str) -> Iterator[str]:
    """Where a named folder may lie: below a place, or beginning with the place's own last parts.

    Below ``/models/FLUX.1-dev`` that is, of ``FLUX.1-dev/transformer``,
    ``/models/FLUX.1-dev/transformer`` and ``/models/FLUX.1-dev/FLUX.1-dev/transformer``.
    """
    remote = storage.on_objects(prefix)
    if not remote and storage.scheme(prefix) != "file":
        return
    path = storage.object_place(prefix).key if remote else storage.absolute(prefix)
    own, parts = path.strip("/").split("/"), name.split("/")
    whole = prefix if remote else storage.absolute(prefix)
    for count in range(len(parts), -1, -1):
        if own[len(own) - count :] == parts[:count]:
            yield storage.join(whole, *parts[count:])
