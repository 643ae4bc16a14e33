"""Pictures that a student edits: read where a user names them, and encoded as in training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow import storage
from piflow.backbones import Codec
from piflow.config import ConditionSizes
from piflow.data.pictures import scale_picture
from piflow.storage.foreign import ForeignDataError, shown
from piflow.storage.picture import MAX_PICTURE_BYTES, BadPictureError
from piflow.storage.places import real_path


@dataclass(frozen=True)
class Edit:
    """A picture to be edited.

    Attributes:
        name: as messages call it.
        uri: of its file.
        folders: a local file must lie in one of these, all links followed; (): it may lie anywhere.
        sha256: of the file's content when it was named.
    """

    name: str
    uri: str
    folders: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, uri: str, folders: tuple[str, ...] = ()) -> Edit:
        """Reads the file for its hash, which tells pictures apart that have one name.

        Raises:
            BadPictureError: there is no such file, or it is too large.
            OSError: the storage refused.
        """
        return cls(name, uri, folders, hashlib.sha256(_content(name, uri, folders)).hexdigest())

    def content(self) -> bytes:
        """The file's.

        Raises:
            BadPictureError: it is gone, or another than when it was named.
            OSError: the storage refused.
        """
        content = _content(self.name, self.uri, self.folders)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadPictureError(
                f"picture {shown(repr(self.name))} has changed since the command began; leave "
                "pictures as they are meanwhile, and start it again"
            )
        return content


def _content(name: str, uri: str, folders: tuple[str, ...]) -> bytes:
    try:
        place = real_path(uri, folders) if folders else uri
        return storage.read_bytes(place, max_bytes=MAX_PICTURE_BYTES)
    except (FileNotFoundError, ForeignDataError) as error:
        raise BadPictureError(
            f"picture {shown(repr(name))} to be edited can't be read: {shown(error, 500)}"
        ) from error


def edited_picture(edit: Edit, sizes: ConditionSizes) -> Tensor:
    """The picture ``(3, height, width)`` in [-1, 1], scaled to one of the sizes.

    Raises:
        BadPictureError: it can't be opened, or has changed; names it.
        OSError: the storage refused.
    """
    try:
        return scale_picture(edit.content(), sizes, name=edit.name)
    except BadPictureError as error:
        raise BadPictureError(f"picture {shown(repr(edit.name))}: {error}") from error


@torch.no_grad()
def condition_latents(
    codec: Codec, sizes: ConditionSizes, edits: Sequence[Edit], device: torch.device
) -> Mapping[str, Tensor]:
    """sha256 -> latents ``(C, h, w)`` on the CPU, of each picture once.

    Raises:
        BadPictureError: one that can't be opened; names it.
    """
    latents: dict[str, Tensor] = {}
    for edit in edits:
        if edit.sha256 in latents:
            continue
        picture = edited_picture(edit, sizes)
        latents[edit.sha256] = codec.encode(picture[None].to(device))[0].cpu()
    return latents
