"""The embedding store's manifest: what the store holds and what it was made from."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Literal

from pydantic import ValidationError

from piflow import storage
from piflow.storage.fingerprint import CodecIdentity, EncoderIdentity, Record

SCHEMA_VERSION = 2

SCHEMA_VERSION_WITH_LATENTS = 3

MANIFEST = "manifest.json"

EMPTY_PROMPT = "empty-prompt.parquet"

TokenDtype = Literal["fp8", "bf16"]

DamagedRows = Literal["stop", "replace"]

LatentDtype = Literal["bf16", "fp32"]

_PADDED_TOKENS = 512  # what FLUX.1's and Qwen-Image's pipelines pad to at most

REMEDY = "delete it and run `piflow embed` again: only what is missing is made anew"


class StoreError(ValueError):
    """A store that can't be used; the message names the file and what to do."""


class DamageError(StoreError):
    """A file that is gone, or bytes that can't be decoded, while the storage itself answers."""


class LatentInputs(Record):
    """How pictures become latents."""

    codec: CodecIdentity
    dtype: LatentDtype


class SkippedPicture(Record):
    """A prompt that was left out because of its picture."""

    prompt_id: str
    picture: str
    reason: str


class Bucket(Record):
    """One picture size in pixels, its prompts, and the shape of its pictures' latents."""

    height: int
    width: int
    rows: int
    latent_shape: tuple[int, int, int] | None = None


class RowGroup(Record):
    """The unit of reading; `bucket` is an index into the manifest's buckets."""

    rows: int
    bucket: int


class ShardEntry(Record):
    """One Parquet file of the store."""

    path: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[RowGroup, ...]


class StoreInputs(Record):
    """Everything that the store's content follows from."""

    schema_version: int
    encoder: EncoderIdentity
    dtype: TokenDtype
    rows_per_shard: int
    rows_per_group: int
    num_prompts: int
    prompts_sha256: str
    latents: LatentInputs | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return _canonical_sha256(self)


class StoreManifest(Record):
    """``manifest.json``."""

    inputs: StoreInputs
    inputs_sha256: str
    buckets: tuple[Bucket, ...]
    shards: tuple[ShardEntry, ...]
    empty_prompt: ShardEntry
    truncated_prompts: int
    negative_prompts: tuple[ShardEntry, ...] = ()
    skipped_pictures: tuple[SkippedPicture, ...] = ()

    @property
    def encoder(self) -> EncoderIdentity:
        """The text encoder that made the store."""
        return self.inputs.encoder

    @property
    def num_rows(self) -> int:
        """Prompts in the store, the empty and the negative ones not counted."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> tuple[ShardEntry, ...]:
        """All Parquet files."""
        return (*self.shards, *self.singles)

    @property
    def singles(self) -> tuple[ShardEntry, ...]:
        """The files of one prompt each, the empty one's and the negative ones'."""
        return (self.empty_prompt, *self.negative_prompts)

    @property
    def latent_bytes(self) -> int:
        """What all latents take."""
        if self.inputs.latents is None:
            return 0
        size = 2 if self.inputs.latents.dtype == "bf16" else 4
        return size * sum(b.rows * math.prod(b.latent_shape or (0,)) for b in self.buckets)

    @property
    def times_smaller(self) -> float:
        """What padding to 512 tokens would take in fp8 over what the files take without latents."""
        padded = self.num_rows * _PADDED_TOKENS * self.encoder.hidden_size
        return padded / (sum(shard.bytes for shard in self.shards) - self.latent_bytes)

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 of the canonical JSON: names the content, less the negative prompts."""
        return _canonical_sha256(self, exclude={"negative_prompts"})

    def to_json(self) -> str:
        """Indented JSON, ends with a line end."""
        return self.model_dump_json(indent=1) + "\n"


def _canonical_sha256(record: Record, exclude: set[str] | None = None) -> str:
    # without defaults: what a record without pictures is called doesn't change with newer fields
    tree = record.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(store_uri: str, manifest: StoreManifest) -> None:
    """Write ``manifest.json``; from then on the store is complete."""
    storage.write_bytes(storage.join(store_uri, MANIFEST), manifest.to_json().encode())


def read_manifest(uri: str) -> StoreManifest:
    """Read and validate ``manifest.json``.

    Raises:
        StoreError: it is missing, unreadable or of another version.
    """
    try:
        content = storage.read_bytes(storage.join(uri, MANIFEST))
    except FileNotFoundError as error:
        raise StoreError(
            f"no embedding store at {uri}: {MANIFEST} is missing; make it with `piflow embed`"
        ) from error
    try:
        tree = json.loads(content)
        version = tree["inputs"]["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{MANIFEST} of embedding store {uri} is corrupt; {REMEDY}") from error
    if version not in (SCHEMA_VERSION, SCHEMA_VERSION_WITH_LATENTS):
        raise StoreError(
            f"embedding store {uri} has format version {version}, this piflow reads "
            f"{SCHEMA_VERSION} and {SCHEMA_VERSION_WITH_LATENTS}; remove the folder and make the "
            "store anew with `piflow embed`"
        )
    try:
        return StoreManifest.model_validate(tree)
    except ValidationError as error:
        raise StoreError(
            f"{MANIFEST} of embedding store {uri} is corrupt; {REMEDY}:\n{error}"
        ) from error


def require_same_inputs(uri: str, found: StoreInputs, expected: StoreInputs) -> None:
    """Check that a store's folder belongs to the job at hand.

    Raises:
        StoreError: it was built for another encoder, or from other prompts or settings.
    """
    if found == expected:
        return
    if found.encoder != expected.encoder:
        raise StoreError(other_encoder(uri, found.encoder, expected.encoder))
    ours, theirs = expected.model_dump(mode="json"), found.model_dump(mode="json")
    changes = [
        f"{key}: {theirs[key]} there, {ours[key]} in the recipe"
        for key in ours
        if ours[key] != theirs[key]
    ]
    raise StoreError(
        f"the folder {uri} holds an embedding store of other inputs ({'; '.join(changes)}); "
        "choose another embed.store or remove the folder"
    )


def other_encoder(uri: str, found: EncoderIdentity, expected: EncoderIdentity) -> str:
    return (
        f"embedding store {uri} was built for another encoder: it holds {found}, the recipe asks "
        f"for {expected}; choose another embed.store, remove the folder, or set the recipe's "
        "encoder to the store's"
    )
