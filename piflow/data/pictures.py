"""Prompts' pictures -> latents: read, turned upright, fitted to their size, encoded.

::

    threads: read the file --> decode, turn by EXIF, scale, crop     a few pictures ahead
    caller:                                     --> the recipe's codec, one picture at a time

A picture that is to be edited has a size of its own: of those of the family's pipeline the one with
the nearest ratio. It is looked at before shards are laid out: rows of one size lie together.

Latents are a function of the image file, the size and the codec alone, and, where they are drawn
from a VAE's posterior or some pictures are mirrored, of the seed and the row: what else is in the
job doesn't matter. Pictures to be edited are never mirrored, and their latents are the posterior's
mean always, as in the pipelines.
"""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from piflow import storage
from piflow.backbones.codec import build_codec, vae_uri
from piflow.config import ConditionSizes, EmbedConfig, ModelConfig, Recipe
from piflow.data.background import ahead
from piflow.data.colour import to_srgb
from piflow.data.manifest import ConditionInputs, SkippedPicture
from piflow.data.prompt_rows import open_parquet
from piflow.data.prompts import PictureSource, Prompt
from piflow.storage.fingerprint import CodecIdentity, files_sha256
from piflow.storage.foreign import ForeignDataError, shown
from piflow.storage.picture import (
    MAX_PICTURE_BYTES,
    MAX_PIXELS,
    BadPictureError,
    open_picture,
    pixels_of,
    size_of,
)
from piflow.storage.places import real_path

_Used = TypeVar("_Used")

_READERS = 4  # threads
_LOOKERS = 16  # threads that look at pictures' sizes, and mostly wait for the storage
_READ_AHEAD = 16  # pictures, decoded and fitted
_LARGE_PIXELS = 16 * 2**20  # one that has more is decoded while no other such is


def codec_identity(model: ModelConfig, embed: EmbedConfig | None = None) -> CodecIdentity:
    """What the recipe's codec is; a VAE's files are read once for their hash.

    Args:
        embed: says what of the posterior is taken, and how many pictures are mirrored; None: its
            mean, and no picture.

    Raises:
        FileNotFoundError: there is no VAE.
        ValueError: its folder holds no weights.
    """
    flips = ""
    if embed is not None and embed.flip_probability:
        flips = f", mirrored with probability {embed.flip_probability!r}, seed {embed.seed}"
    if model.codec == "pixels":
        name = f"pixels, unshuffled by 2{flips}"
        return CodecIdentity(name=name, weights_sha256=hashlib.sha256(name.encode()).hexdigest())
    uri = vae_uri(model)
    drawn = embed is not None and embed.latent_values == "sample"
    taken = f"sample, seed {embed.seed}" if embed is not None and drawn else "mean"
    name = f"{build_codec(model).name}, posterior {taken}{flips}"
    digest = files_sha256({uri: storage.local_folder(uri)}, {})
    return CodecIdentity(name=name, weights_sha256=digest)


def posterior_noise(prompt: Prompt, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of a prompt's row, the same in any job and on any machine.

    Args:
        shape: of the picture's latents.
    """
    generator = torch.Generator().manual_seed(_number_of(prompt, f"{seed}") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def is_flipped(prompt: Prompt, seed: int, probability: float) -> bool:
    """Whether a prompt's picture is mirrored, the same in any job and on any machine."""
    return _number_of(prompt, f"flip\0{seed}") < probability * 2**64


def _number_of(prompt: Prompt, purpose: str) -> int:
    """A number in [0, 2^64), uniform over prompts' rows."""
    picture = "" if prompt.picture is None else prompt.picture.key
    key = f"{purpose}\0{prompt.prompt_id}\0{picture}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def fit_picture(
    content: bytes,
    height: int,
    width: int,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str = "a picture",
) -> Tensor:
    """An image file's content as ``(3, height, width)`` float32 in [-1, 1].

    The picture is opened and turned by `open_picture`, its colours become sRGB by `to_srgb`, it is
    scaled down (Lanczos) until it just covers the size, and cropped around its centre. It is never
    enlarged.

    Raises:
        BadPictureError: no picture that can be opened, or it is too small or too large.
    """
    picture = to_srgb(open_picture(content, max_pixels=max_pixels), name)
    if picture.width < width or picture.height < height:
        raise BadPictureError(
            f"{picture.height}x{picture.width} pixels are too few for {height}x{width}"
        )
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def scale_picture(
    content: bytes,
    sizes: ConditionSizes,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str = "a picture",
) -> Tensor:
    """An image file's content as ``(3, height, width)`` float32 in [-1, 1], of one of the sizes.

    As `fit_picture`, but stretched (Lanczos) to the size that goes with it, larger or smaller: so
    do the pipelines of families that edit pictures.

    Raises:
        BadPictureError: no picture that can be opened, or it is too large.
    """
    picture = to_srgb(open_picture(content, max_pixels=max_pixels), name)
    height, width = sizes.of(picture.height, picture.width)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1


def condition_inputs(recipe: Recipe) -> ConditionInputs | None:
    """How the recipe's pictures to be edited become latents; None: it has none.

    Raises:
        FileNotFoundError, ValueError: as `codec_identity`.
    """
    sizes = recipe.condition_sizes
    if sizes is None:
        return None
    codec = codec_identity(recipe.model)
    return ConditionInputs(codec=codec, dtype=recipe.embed.latent_dtype, size=str(sizes))


def with_condition_sizes(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with the sizes that their pictures to be edited are scaled to.

    A bad picture that is to be skipped gets a size, too: the encoder says what is wrong with it.

    Raises:
        BadPictureError, ValueError, OSError: as `LatentEncoder.encode`.
    """
    sizes = recipe.condition_sizes
    if sizes is None:
        return list(prompts)
    reader = _Reader(recipe.embed, recipe.embed.condition_column or "")

    def size_of_one(prompt: Prompt) -> tuple[int, int] | BadPictureError:
        return reader.read(
            prompt,
            prompt.condition,
            lambda content: sizes.of(*size_of(content, max_pixels=recipe.embed.max_picture_pixels)),
        )

    found = ahead(size_of_one, iter(prompts), threads=_LOOKERS, depth=2 * _LOOKERS)
    sized = []
    for prompt, size in zip(prompts, found, strict=True):
        if isinstance(size, BadPictureError):
            reader.skipped(prompt, prompt.condition, size)  # raises, unless bad ones are skipped
            size = sizes.largest()
        sized.append(replace(prompt, condition_size=size))
    return sized


class PictureReader:
    """Reads the pictures to be edited for a text encoder that looks at them.

    Args:
        embed: condition column and the largest picture.
        sizes: that they are scaled to, as for the encoder.
    """

    def __init__(self, embed: EmbedConfig, sizes: ConditionSizes) -> None:
        self._reader = _Reader(embed, embed.condition_column or "")
        self._max_pixels, self._sizes = embed.max_picture_pixels, sizes

    def __call__(self, prompt: Prompt) -> Tensor:
        """The prompt's picture, ``(3, height, width)`` float32 in [-1, 1].

        Raises:
            BadPictureError: it has become bad since its latents were made.
            ValueError, OSError: as `LatentEncoder.encode`.
        """
        name = _named(prompt, prompt.condition)
        found = self._reader.read(
            prompt,
            prompt.condition,
            lambda content: scale_picture(
                content, self._sizes, max_pixels=self._max_pixels, name=name
            ),
        )
        if isinstance(found, BadPictureError):
            raise BadPictureError(f"{name}: {found}") from found
        return found


class _Reader:
    """Reads prompts' pictures of one column; says which are bad."""

    def __init__(self, embed: EmbedConfig, column: str) -> None:
        self._skip = embed.bad_pictures == "skip"
        self._embedded = _EmbeddedPictures(column)

    def read(
        self, prompt: Prompt, source: PictureSource | None, use: Callable[[bytes], _Used]
    ) -> _Used | BadPictureError:
        """What `use` makes of the file; only a picture's own fault comes back.

        An outage would leave out all prompts.
        """
        if source is None or not source.key:
            return BadPictureError("the row names no picture")
        try:
            return use(self._content(source))
        except BadPictureError as error:
            return error
        except OSError as error:
            code = error.errno or errno.EIO
            raise OSError(code, f"{_named(prompt, source)} can't be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"{_named(prompt, source)} can't be read: {error}") from error

    def _content(self, source: PictureSource) -> bytes:
        if source.row is not None:
            return self._embedded.read(source)
        uri = real_path(source.uri, source.folders) if source.folders else source.uri
        try:
            return storage.read_bytes(uri, max_bytes=MAX_PICTURE_BYTES)
        except (FileNotFoundError, ForeignDataError) as error:
            raise BadPictureError(shown(error, 500)) from error

    def skipped(
        self, prompt: Prompt, source: PictureSource | None, error: BadPictureError
    ) -> SkippedPicture:
        """The record of a prompt that is left out; raises BadPictureError if none is to be."""
        if self._skip:
            name = "" if source is None else source.key
            return SkippedPicture(prompt_id=prompt.prompt_id, picture=name, reason=str(error))
        raise BadPictureError(
            f"{_named(prompt, source)}: {error}; replace it or remove the row, "
            "or set embed.bad_pictures = skip to leave out all such prompts"
        )


class LatentEncoder:
    """Makes latents of prompts' pictures.

    Args:
        model: its codec is used.
        embed: image column, stored dtype, flips, and what to do about bad pictures.
        device: where the codec runs; results come back to the CPU.

    Raises:
        FileNotFoundError: there is no VAE.
        ValueError: its folder holds something else.
    """

    field = "latent"  # of an EncodedPrompt

    def __init__(self, model: ModelConfig, embed: EmbedConfig, device: str) -> None:
        self._codec = build_codec(model)
        self._dtype = torch.bfloat16 if embed.latent_dtype == "bf16" else torch.float32
        self._seed: int | None = embed.seed if embed.latent_values == "sample" else None
        self._flips = (embed.seed, embed.flip_probability)
        self._device = device
        self._max_pixels = embed.max_picture_pixels
        self._large = threading.Lock()
        self._reader = _Reader(embed, self.column(embed) or "")
        self.busy = 0.0  # seconds that the codec has worked

    @staticmethod
    def column(embed: EmbedConfig) -> str | None:
        """The column of its pictures; None: prompts bring none."""
        return embed.image_column

    def source(self, prompt: Prompt) -> PictureSource | None:
        """The picture of a prompt that it encodes."""
        return prompt.picture

    def encode(self, prompts: Sequence[Prompt]) -> Iterator[Tensor | SkippedPicture]:
        """For each prompt in order: ``(C, h, w)`` in the stored dtype, or why there is none.

        Raises:
            BadPictureError: bad pictures stop the job, and this is one.
            ValueError: a URI that means nothing, or a Parquet file that is damaged or was changed.
            OSError: the storage refused or didn't answer. All of them name picture and prompt.
        """
        pictures = ahead(self._read, iter(prompts), threads=_READERS, depth=_READ_AHEAD)
        for prompt, picture in zip(prompts, pictures, strict=True):
            if isinstance(picture, BadPictureError):
                yield self._reader.skipped(prompt, self.source(prompt), picture)
            else:
                begin = time.perf_counter()
                latent = self._latent(picture, prompt).to("cpu", self._dtype)
                self.busy += time.perf_counter() - begin
                yield latent

    def _latent(self, picture: Tensor, prompt: Prompt) -> Tensor:
        noise = None
        if self._seed is not None:
            shape = self._codec.latent_shape(*picture.shape[1:])
            noise = posterior_noise(prompt, self._seed, shape)[None].to(self._device)
        return self._codec.encode(picture[None].to(self._device), noise)[0]

    def _read(self, prompt: Prompt) -> Tensor | BadPictureError:
        def fitted(content: bytes) -> Tensor:
            # a file of a megabyte may be a large picture: one such at a time in memory
            with self._large if pixels_of(content) > _LARGE_PIXELS else nullcontext():
                return self._fitted(content, prompt)

        return self._reader.read(prompt, self.source(prompt), fitted)

    def _fitted(self, content: bytes, prompt: Prompt) -> Tensor:
        name = _named(prompt, prompt.picture)
        size = (prompt.height, prompt.width)
        fitted = fit_picture(content, *size, max_pixels=self._max_pixels, name=name)
        return fitted.flip(-1) if is_flipped(prompt, *self._flips) else fitted


class ConditionEncoder(LatentEncoder):
    """Makes latents of the pictures that prompts edit.

    Args:
        sizes: that they are scaled to.
        others: of `LatentEncoder`; the image column is embed.condition_column.

    Raises:
        as `LatentEncoder`.
    """

    field = "condition"

    def __init__(
        self, model: ModelConfig, embed: EmbedConfig, device: str, sizes: ConditionSizes
    ) -> None:
        super().__init__(model, embed, device)
        self._seed = None  # the posterior's mean, as the pipelines show it
        self._sizes = sizes

    @staticmethod
    def column(embed: EmbedConfig) -> str | None:
        """That of the pictures to be edited."""
        return embed.condition_column

    def source(self, prompt: Prompt) -> PictureSource | None:
        """The picture that the prompt edits."""
        return prompt.condition

    def _fitted(self, content: bytes, prompt: Prompt) -> Tensor:
        name = _named(prompt, prompt.condition)
        scaled = scale_picture(content, self._sizes, max_pixels=self._max_pixels, name=name)
        if tuple(scaled.shape[1:]) != prompt.condition_size:
            raise ValueError(
                "its size has changed since the shards were laid out; leave pictures as they are "
                "while a job runs, and start it again"
            )
        return scaled


def _named(prompt: Prompt, source: PictureSource | None) -> str:
    """A prompt's picture as messages name it."""
    name = "" if source is None else source.key
    return f"picture {shown(repr(name))} of prompt {shown(repr(prompt.text))}"


class _EmbeddedPictures:
    """Pictures that lie in Parquet files as bytes; keeps the row group used last.

    Safe to use from several threads.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._uri = ""
        self._file: Any = None
        self._ends: Any = None
        self._group = -1
        self._values: Any = None

    def read(self, source: PictureSource) -> bytes:
        """The content of the image file in a source's row.

        Raises:
            ValueError: the file isn't what it was when the prompts were read, or is damaged.
            OSError: the storage refused or didn't answer.
        """
        with self._lock, storage.explained(source.uri):
            content = self._value(source.uri, source.row or 0)
        if f"sha256:{hashlib.sha256(content or b'').hexdigest()}" != source.key:
            raise ValueError(
                f"row {(source.row or 0) + 1} of {source.uri} holds another picture than when the "
                "prompts were read; leave prompts files as they are while a job runs, and start it "
                "again"
            )
        return content or b""

    def _value(self, uri: str, row: int) -> bytes | None:
        if uri != self._uri:
            self._open(uri)
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group == len(self._ends) or self._column not in self._file.schema_arrow.names:
            return None
        if group != self._group:
            self._values = self._file.read_row_group(group, columns=[self._column])
            self._group = group
        start = self._ends[group] - self._values.num_rows
        value = self._values[self._column][int(row - start)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        return content if isinstance(content, bytes) else None

    def _open(self, uri: str) -> None:
        self._file = open_parquet(uri, [self._column], where=uri)
        metadata = self._file.metadata
        groups = range(metadata.num_row_groups)
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in groups])
        self._uri, self._group = uri, -1
