"""The embedding store's manifest: what the store holds and what it was made from."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from piflow import storage
from piflow.storage.fingerprint import CodecIdentity, EncoderIdentity, Record
from piflow.storage.foreign import ForeignDataError, parse_object, shown

SCHEMA_VERSION = 2

SCHEMA_VERSION_WITH_LATENTS = 3

SCHEMA_VERSION_WITH_CONDITIONS = 4

SCHEMA_VERSION_WITH_NEGATIVES = 5

SCHEMA_VERSIONS = (
    SCHEMA_VERSION,
    SCHEMA_VERSION_WITH_LATENTS,
    SCHEMA_VERSION_WITH_CONDITIONS,
    SCHEMA_VERSION_WITH_NEGATIVES,
)

MANIFEST = "manifest.json"

EMPTY_PROMPT = "empty-prompt.parquet"

_NEGATIVE_PROMPT = r"negative-prompt-[0-9a-f]{16}\.parquet"

TokenDtype = Literal["fp8", "bf16"]

DamagedRows = Literal["stop", "replace"]

LatentDtype = Literal["bf16", "fp32"]

_PADDED_TOKENS = 512  # what FLUX.1's and Qwen-Image's pipelines pad to at most

_MAX_BYTES = 512 * 2**20  # of a manifest; one of 100 million prompts has a quarter of it

_MAX_STATES = 2**28  # numbers that a prompt's padded token states may be, 1 GiB as float32

_Count = Annotated[int, Field(ge=0, lt=2**48)]

_Positive = Annotated[int, Field(ge=1, lt=2**48)]

_Length = Annotated[int, Field(ge=1, lt=2**20)]  # of a picture's side, or of its latents'

REMEDY = "delete it and run `piflow embed` again: only what is missing is made anew"


class StoreError(ValueError):
    """A store that can't be used; the message names the file and what to do."""


class DamageError(StoreError):
    """A file that is gone, or bytes that can't be decoded, while the storage itself answers."""


class LatentInputs(Record):
    """How pictures become latents."""

    codec: CodecIdentity
    dtype: LatentDtype


class ConditionInputs(LatentInputs):
    """How pictures that are to be edited become latents; `size` says what they are scaled to."""

    size: str

    @property
    def latents(self) -> LatentInputs:
        """Without the size."""
        return LatentInputs(codec=self.codec, dtype=self.dtype)


class SkippedPicture(Record):
    """A prompt that was left out because of its picture."""

    prompt_id: str
    picture: str
    reason: str


class _Extended(Record):
    """A record with fields that came later, which are not written where they are None.

    So that a store that needs none of them is written as it was before, and read by any piflow.
    """

    later: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_later(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = serialise(self)
        return {
            name: value
            for name, value in tree.items()
            if name not in self.later or value is not None
        }


class Bucket(_Extended):
    """One picture size in pixels, its prompts, and the shape of its pictures' latents.

    Likewise the size of the pictures that are to be edited, and the shape of their latents.
    """

    later = ("condition_size", "condition_shape")

    height: _Length
    width: _Length
    rows: _Count
    latent_shape: tuple[_Length, _Length, _Length] | None = None
    condition_size: tuple[_Length, _Length] | None = None
    condition_shape: tuple[_Length, _Length, _Length] | None = None


class RowGroup(Record):
    """The unit of reading; `bucket` is an index into the manifest's buckets."""

    rows: _Positive
    bucket: _Count


class ShardEntry(Record):
    """One Parquet file of the store."""

    path: str
    rows: _Count
    bytes: _Positive
    sha256: str
    row_groups: tuple[RowGroup, ...]


class StoreInputs(_Extended):
    """Everything that the store's content follows from.

    `negative_prompt` is the one that every row has with its own picture, where the text encoder
    reads pictures; None: rows have none.
    """

    later = ("conditions", "negative_prompt")

    schema_version: int
    encoder: EncoderIdentity
    dtype: TokenDtype
    rows_per_shard: _Positive
    rows_per_group: _Positive
    num_prompts: _Positive
    prompts_sha256: str
    latents: LatentInputs | None = None
    conditions: ConditionInputs | None = None
    negative_prompt: str | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return _canonical_sha256(self)


class StoreManifest(Record):
    """``manifest.json``.

    It names no place outside of its folder: encoder and VAE are known by their contents, and a
    file's name follows from its number or its prompt.
    """

    inputs: StoreInputs
    inputs_sha256: str
    buckets: tuple[Bucket, ...]
    shards: tuple[ShardEntry, ...]
    empty_prompt: ShardEntry
    truncated_prompts: _Count
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
        return sum(
            bucket.rows * (latent_size(self.inputs, bucket) + condition_bytes(self.inputs, bucket))
            for bucket in self.buckets
        )

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
    """Read ``manifest.json`` and compare every number in it with every other one.

    Raises:
        StoreError: it is missing, unreadable, of another version, or contradicts itself.
    """
    where = storage.join(uri, MANIFEST)
    try:
        content = storage.read_bytes(where, max_bytes=_MAX_BYTES)
    except FileNotFoundError as error:
        raise StoreError(
            f"no embedding store at {uri}: {MANIFEST} is missing; make it with `piflow embed`"
        ) from error
    corrupt = f"{MANIFEST} of embedding store {uri} is corrupt; {REMEDY}"
    try:
        version = _version(parse_object(content, where=where, max_bytes=_MAX_BYTES))
    except ForeignDataError as error:
        raise StoreError(f"{corrupt}: {error}") from error
    if version not in SCHEMA_VERSIONS:
        *others, last = map(str, SCHEMA_VERSIONS)
        raise StoreError(
            f"embedding store {uri} has format version {shown(version)}, this piflow reads "
            f"{', '.join(others)} and {last}; remove the folder and make the store anew with "
            "`piflow embed`"
        )
    try:
        manifest = StoreManifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise StoreError(f"{corrupt}: {_explained(error)}") from error
    problem = next(contradictions(manifest), None)
    if problem is not None:
        raise StoreError(
            f"{MANIFEST} of embedding store {uri} contradicts itself: {problem}; {REMEDY}"
        )
    return manifest


def read_inputs(uri: str) -> StoreInputs:
    """The inputs of an unfinished store, from the file at `uri`.

    Raises:
        StoreError: they can't be read; names the file.
    """
    try:
        content = storage.read_bytes(uri)
        parse_object(content, where=uri)
        return StoreInputs.model_validate_json(content, strict=True)
    except (ForeignDataError, ValidationError) as error:
        problem = _explained(error) if isinstance(error, ValidationError) else str(error)
        raise StoreError(
            f"{uri} doesn't say whose unfinished shards lie there: {problem}; delete it if they "
            "are of this recipe (files of others are made anew), or choose another embed.store"
        ) from error


def _version(tree: dict[str, Any]) -> Any:
    inputs = tree.get("inputs")
    if not isinstance(inputs, dict) or "schema_version" not in inputs:
        raise ForeignDataError("inputs.schema_version is missing")
    return inputs["schema_version"]


def _explained(error: ValidationError) -> str:
    """What is wrong, on one line; keys may be anything that somebody wrote."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    texts = [
        f"{shown('.'.join(str(part) for part in problem['loc']))}: {shown(problem['msg'])}"
        for problem in problems[:3]
    ]
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(texts) + more


def contradictions(manifest: StoreManifest) -> Iterator[str]:
    """What of a manifest's numbers and names doesn't go with the others; nothing if all does."""
    yield from _contradicting_inputs(manifest.inputs, manifest.inputs_sha256)
    yield from _contradicting_rows(manifest)
    yield from _contradicting_buckets(manifest)
    for number, shard in enumerate(manifest.shards):
        yield from _contradicting_shard(manifest, shard, number)
    for entry in manifest.singles:
        if entry.row_groups != (RowGroup(rows=1, bucket=0),) or entry.rows != 1:
            yield f"{shown(entry.path)} is of one prompt and has not one row in one row group"
    if manifest.empty_prompt.path != EMPTY_PROMPT:
        yield f"the empty prompt's file is {shown(manifest.empty_prompt.path)}, not {EMPTY_PROMPT}"
    negatives = [entry.path for entry in manifest.negative_prompts]
    for path in negatives:
        if re.fullmatch(_NEGATIVE_PROMPT, path) is None:
            yield f"a negative prompt's file is {shown(path)}, not negative-prompt-<id>.parquet"
    if len(set(negatives)) != len(negatives):
        yield "a negative prompt is there twice"


def _contradicting_inputs(inputs: StoreInputs, digest: str) -> Iterator[str]:
    if inputs.digest != digest:
        yield f"inputs_sha256 is {shown(digest[:12])}…, the inputs' own is {inputs.digest[:12]}…"
    if inputs.schema_version != expected_version(
        inputs.latents, inputs.conditions, inputs.negative_prompt
    ):
        yield (
            f"format version {inputs.schema_version} with{'out' * (inputs.latents is None)} latents"
            f"{' and with pictures to be edited' * (inputs.conditions is not None)}"
            f"{' and negative prompts of their own' * (inputs.negative_prompt is not None)}"
        )
    if inputs.negative_prompt is not None and inputs.conditions is None:
        yield "negative prompts of pictures to be edited, and no such pictures"
    tokens, size = inputs.encoder.max_tokens, inputs.encoder.hidden_size
    if tokens < 1 or size < 1 or tokens * size > _MAX_STATES:
        yield f"a prompt has {tokens} tokens of {size} numbers, at most {_MAX_STATES} together"


def _contradicting_rows(manifest: StoreManifest) -> Iterator[str]:
    inputs, skipped = manifest.inputs, manifest.skipped_pictures
    if manifest.num_rows + len(skipped) != inputs.num_prompts:
        yield (
            f"{manifest.num_rows} rows and {len(skipped)} skipped pictures of "
            f"{inputs.num_prompts} prompts"
        )
    if manifest.num_rows == 0:
        yield "no row at all"
    if skipped and inputs.latents is None and inputs.conditions is None:
        yield "skipped pictures in a store without latents"
    if len({picture.prompt_id for picture in skipped}) != len(skipped):
        yield "a prompt was skipped twice"
    if manifest.truncated_prompts > manifest.num_rows:
        yield f"{manifest.truncated_prompts} truncated prompts of {manifest.num_rows}"
    if len(manifest.shards) != -(-inputs.num_prompts // inputs.rows_per_shard):
        yield (
            f"{len(manifest.shards)} shards of {inputs.rows_per_shard} rows for "
            f"{inputs.num_prompts} prompts"
        )


def _contradicting_buckets(manifest: StoreManifest) -> Iterator[str]:
    inputs = manifest.inputs
    sizes = {(bucket.height, bucket.width, bucket.condition_size) for bucket in manifest.buckets}
    if len(sizes) != len(manifest.buckets):
        yield "a picture size has two buckets"
    found = Counter[int]()
    for shard in manifest.shards:
        for group in shard.row_groups:
            found[group.bucket] += group.rows
    for number, bucket in enumerate(manifest.buckets):
        if bucket.rows != found[number]:
            yield f"bucket {number} has {bucket.rows} rows, its row groups hold {found[number]}"
        if (bucket.latent_shape is None) != (inputs.latents is None):
            yield f"bucket {number} has latents of shape {bucket.latent_shape}, the inputs differ"
        for told in (bucket.condition_size, bucket.condition_shape):
            if (told is None) != (inputs.conditions is None):
                yield f"bucket {number} has pictures to be edited of {told}, the inputs differ"


def _contradicting_shard(manifest: StoreManifest, shard: ShardEntry, number: int) -> Iterator[str]:
    inputs, name = manifest.inputs, shard_name(number)
    if shard.path != name:
        yield f"the file of shard {number} is {shown(shard.path)}, not {name}"
        return
    held = sum(group.rows for group in shard.row_groups)
    if shard.rows != held:
        yield f"{name} has {shard.rows} rows, its row groups hold {held}"
    start = number * inputs.rows_per_shard
    planned = min(inputs.rows_per_shard, inputs.num_prompts - start)
    if held > planned or (held < planned and not manifest.skipped_pictures):
        yield f"{name} has {held} rows where the inputs have {planned} prompts"
    for group in shard.row_groups:
        if group.rows > inputs.rows_per_group:
            yield f"{name} has a row group of {group.rows}, more than {inputs.rows_per_group} rows"
        if group.bucket >= len(manifest.buckets):
            yield f"{name} has rows of bucket {group.bucket}, of {len(manifest.buckets)}"
            return
    latents = 0
    for group in shard.row_groups:
        bucket = manifest.buckets[group.bucket]
        latents += group.rows * (latent_size(inputs, bucket) + condition_bytes(inputs, bucket))
    if shard.bytes <= latents:
        yield f"{name} has {shard.bytes} bytes, fewer than its {latents} of latents"


def shard_name(number: int) -> str:
    """The file of the shard with this number, from 0."""
    return f"shard-{number:05d}.parquet"


def latent_size(inputs: StoreInputs, bucket: Bucket) -> int:
    """Bytes that a row's latents take."""
    return _bytes_of(inputs.latents, bucket.latent_shape)


def condition_bytes(inputs: StoreInputs, bucket: Bucket) -> int:
    """Bytes that the latents of a row's picture to be edited take."""
    return _bytes_of(inputs.conditions, bucket.condition_shape)


def _bytes_of(latents: LatentInputs | None, shape: tuple[int, ...] | None) -> int:
    if latents is None or shape is None:
        return 0
    return (2 if latents.dtype == "bf16" else 4) * math.prod(shape)


def expected_version(
    latents: LatentInputs | None,
    conditions: ConditionInputs | None,
    negative_prompt: str | None = None,
) -> int:
    """The format of a store with these inputs."""
    if negative_prompt is not None:
        return SCHEMA_VERSION_WITH_NEGATIVES
    if conditions is not None:
        return SCHEMA_VERSION_WITH_CONDITIONS
    return SCHEMA_VERSION if latents is None else SCHEMA_VERSION_WITH_LATENTS


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
        f"{key}: {theirs.get(key)} there, {ours.get(key)} in the recipe"
        for key in {**theirs, **ours}
        if ours.get(key) != theirs.get(key)
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
