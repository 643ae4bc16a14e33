"""How prompts become an embedding store."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from piflow.config.section import Operational, Positive, Section, Seed, Text, Uri

Pixels = Annotated[int, Field(gt=0, le=65_536)]
"""Of a picture's side; what the model's codec takes of them is checked before embedding."""


class EmbedConfig(Section):
    """prompts -> embedding store."""

    mode: Operational[Literal["store", "online"]] = "store"
    """store: training reads what `piflow embed` wrote; online: no store, prompts are encoded while
    training runs, each once an epoch, and batches are the same.
    """

    prompts: Uri
    """URI of a .txt (one a line), .jsonl, .csv or .parquet file, all but Parquet also as .gz; of a
    pattern such as s3://bucket/prompts/*.parquet, whose files are read in order of their names;
    or of a dataset folder, whose `train` split is read.
    """

    prompt_column: Text = "prompt"
    """The column, for files that have columns."""

    height_column: Text | None = None
    """Column of a prompt's own picture height in pixels; empty: see buckets."""

    width_column: Text | None = None
    """The same for the width; both or neither."""

    image_column: str | None = None
    """Column of the prompts' pictures: a path relative to the prompts file's folder, a URI (see
    allow_uris) or, in Parquet, bytes; their latents then lie in the store.
    """

    condition_column: Text | None = None
    """Column of the pictures that a teacher which edits is shown, named as those of image_column;
    their latents lie in the store beside the prompt. Needed by such families, and by them alone.
    """

    condition_sizes: list[Annotated[list[Pixels], Field(min_length=2, max_length=2)]] = []
    """[height, width] sizes in pixels that those are scaled to, each to the one of the nearest
    ratio; []: those of the family's pipeline.
    """

    allow_uris: Operational[list[Uri]] = []
    """Places that rows of the prompts files may name besides the files' own folder (in an
    object store: bucket), each with all below it: local paths, s3://bucket/prefix, gs://…,
    abfs://…, hf://owner/name. What a row names is read with this machine's keys and rights, so
    list what you trust.
    """

    max_picture_pixels: Operational[int] = Field(64 * 2**20, gt=0, le=178_956_970)
    """Larger pictures are bad pictures. Decoding takes 8 bytes of memory a pixel, of WebP 16."""

    max_prompts: Operational[Positive] = 10_000_000
    """Rows of all prompts files together, repeated ones counted; more end the job. Their texts may
    take 1 KiB of memory each on average.
    """

    latent_dtype: Literal["bf16", "fp32"] = "bf16"
    """Latents on disk, of both columns' pictures."""

    latent_values: Literal["mean", "sample"] = "mean"
    """What a VAE's latents of a picture are: its posterior's mean, or, as in the published recipes,
    a draw from it, by `seed` and the prompt's row alone.
    """

    flip_probability: float = Field(0.0, ge=0, le=1)
    """Share of image_column's pictures that are mirrored left to right before they are encoded, by
    `seed` and the prompt's row alone: one orientation a row, the same in each epoch.
    """

    bad_pictures: Operational[Literal["stop", "skip"]] = "stop"
    """Unreadable pictures, and those of image_column smaller than their size: stop, or leave the
    prompt out and list it in the manifest.
    """

    max_bad_pictures: Operational[float] = Field(0.2, ge=0, le=1)
    """Share of the prompts that skip may leave out; with more the job ends, since something else
    than pictures may be wrong.
    """

    buckets: list[Annotated[list[Pixels], Field(min_length=2, max_length=2)]] = []
    """[height, width] sizes in pixels, one chosen for each prompt that has no size of its own;
    listed twice, it is chosen twice as often; [] gives them height x width.
    """

    seed: Seed = 0
    """The seed of the choice among buckets, with the prompt's text, of latents' draws and of
    flips.
    """

    store: Operational[Uri]
    """URI of the embedding store's folder; in online mode, of the folder for the few embeddings
    that guidance and pictures need.
    """

    height: Pixels
    """pixels of the pictures that prompts stand for without a size of their own or buckets, and of
    samples and evaluation.
    """

    width: Pixels
    """pixels."""

    dtype: Literal["fp8", "bf16"] = "fp8"
    """Token states on disk."""

    rows_per_shard: Positive = 4096
    """Prompts a Parquet file."""

    rows_per_group: Positive = 256
    """Prompts a row group, the unit of reading and of encoding."""

    batch_size: Positive = 64
    """Prompts an encoder call."""

    encoders: Operational[Annotated[list[Positive], Field(min_length=2, max_length=2)]] = [1, 1]
    """[min, max] encoder actors of the pool."""

    gpus_per_encoder: Operational[float] = Field(0.0, ge=0, le=1000)
    """Below 1 it may be fractional: encoders then share a GPU."""

    @property
    def has_several_sizes(self) -> bool:
        """Whether prompts may stand for pictures of different sizes."""
        return bool(self.buckets) or self.height_column is not None

    @property
    def stores_pictures(self) -> bool:
        """Whether latents of pictures lie in the store."""
        return self.image_column is not None or self.condition_column is not None

    @field_validator("allow_uris")
    @classmethod
    def _are_places(cls, uris: list[str]) -> list[str]:
        from piflow.storage.places import require_prefix  # here: it imports pyarrow

        for uri in uris:
            require_prefix(uri)
        return uris

    @model_validator(mode="after")
    def _actors_can_be_had(self) -> EmbedConfig:
        if self.encoders[0] > self.encoders[1]:
            raise ValueError(
                f"encoders = {self.encoders} asks for at least {self.encoders[0]} and at most "
                f"{self.encoders[1]} actors; write [min, max]"
            )
        if self.gpus_per_encoder > 1 and self.gpus_per_encoder % 1:
            raise ValueError(
                f"gpus_per_encoder = {self.gpus_per_encoder} is neither a part of one GPU nor a "
                "whole number of them; Ray gives out nothing else"
            )
        return self

    @model_validator(mode="after")
    def _columns_in_pairs(self) -> EmbedConfig:
        if (self.height_column is None) != (self.width_column is None):
            raise ValueError(
                f"height_column is {self.height_column!r} and width_column is "
                f"{self.width_column!r}; a picture's size needs both, or neither"
            )
        if self.condition_sizes and self.condition_column is None:
            raise ValueError(
                "condition_sizes are those of condition_column's pictures, and there is no "
                "condition_column; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _flipped_pictures_stand_alone(self) -> EmbedConfig:
        if self.flip_probability and self.image_column is None:
            raise ValueError(
                f"flip_probability = {self.flip_probability} mirrors image_column's pictures, and "
                "there is no image_column; leave it out"
            )
        if self.flip_probability and self.condition_column is not None:
            raise ValueError(
                f"flip_probability = {self.flip_probability} would mirror edited pictures and not "
                "those of condition_column that they were made from; leave it out"
            )
        return self
