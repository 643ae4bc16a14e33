"""Pictures of the world, in a folder, that sets of drawn ones are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from PIL import Image

from piflow import storage
from piflow.data.colour import to_srgb
from piflow.storage.foreign import redacted, shown
from piflow.storage.picture import open_picture

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")


class References:
    """The pictures of a folder and the folders in it, in the order of their names.

    Args:
        uri: of the folder; other files there are left alone.
        least: how many are needed.

    Raises:
        ValueError: there are fewer.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, uri: str, least: int) -> None:
        self._uri = uri
        found = [name for name in storage.list_files(uri) if name.lower().endswith(_SUFFIXES)]
        self._names = sorted(found)
        self._digest = ""
        if len(found) < least:
            raise ValueError(
                f"evaluation.references = {redacted(uri)} holds {len(found)} pictures, expected at "
                f"least {least}, as files ending in {', '.join(_SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self._names)

    @property
    def identity(self) -> str:
        """Hash of names and contents of all pictures, once they were read."""
        return self._digest

    def stamp(self) -> str:
        """What changes when somebody changes a file of the folder; no picture is read."""
        folders = sorted({name.rpartition("/")[0] for name in self._names})
        stamps = {
            f"{folder}/{name}".removeprefix("/"): stamp
            for folder in folders
            for name, stamp in storage.file_stamps(
                storage.member(self._uri, folder) if folder else self._uri
            ).items()
        }
        told = "\n".join(f"{name}\0{stamps.get(name)}" for name in self._names)
        return hashlib.sha256(f"{storage.absolute(self._uri)}\n{told}".encode()).hexdigest()

    def found_as(self, identity: str) -> None:
        """Take the identity from an earlier reading of the same files."""
        self._digest = identity

    def read(self) -> Iterator[Image.Image]:
        """Every picture, RGB.

        Raises:
            ValueError: a file can't be used; names it.
        """
        digest = hashlib.sha256()
        for name in self._names:
            content = storage.read_bytes(storage.member(self._uri, name))
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
            try:
                picture = to_srgb(open_picture(content), shown(name)).convert("RGB")
            except ValueError as error:
                raise ValueError(
                    f"evaluation.references: {redacted(self._uri)}/{shown(name)}: {error}"
                ) from error
            yield picture
        self._digest = digest.hexdigest()
