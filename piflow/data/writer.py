"""Writes the shards of an embedding store, and finds those that an earlier job wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from piflow import storage
from piflow.backbones.text import EncodedPrompt
from piflow.data.layout import ShardPlan
from piflow.data.manifest import Bucket, ShardEntry, SkippedPicture, StoreInputs
from piflow.data.parquet import METADATA_KEY, ParquetFile, open_parquet, shard_facts
from piflow.data.rows import NEGATIVE_COLUMNS, SCHEMA, encoded_table
from piflow.data.shard_checks import require_footer, require_pages

_COMPRESSION = {name: "zstd" for name in SCHEMA.names} | {"tokens": "none", "pooled": "none"}

_LATENT_COMPRESSION = {"picture": "zstd", "latent": "none", "latent_shape.list.element": "zstd"}

_CONDITION_COMPRESSION = {
    "condition": "zstd",
    "condition_latent": "none",
    "condition_shape.list.element": "zstd",
}


@dataclass(frozen=True)
class ShardReport:
    """What wasn't as it should be in a shard's inputs.

    ``truncated`` prompts were longer than the encoder takes, ``examples`` are a few of them.
    """

    truncated: int
    examples: tuple[str, ...]
    skipped: tuple[SkippedPicture, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON."""
        skipped = [picture.model_dump(mode="json") for picture in self.skipped]
        tree = {"truncated": self.truncated, "truncated_examples": self.examples}
        return json.dumps(tree | ({"skipped": skipped} if skipped else {}), sort_keys=True)

    @staticmethod
    def of_json(content: str | bytes) -> ShardReport:
        """The inverse of `to_json`."""
        return ShardReport.of_facts(json.loads(content))

    @staticmethod
    def of_facts(facts: Mapping[str, Any]) -> ShardReport:
        """What a shard's footer says.

        Raises:
            ValueError: it says something else.
        """
        truncated, examples = facts.get("truncated"), facts.get("truncated_examples")
        texts = isinstance(examples, list) and all(isinstance(text, str) for text in examples)
        if not isinstance(truncated, int) or not texts:
            raise ValueError("the footer doesn't say which prompts were truncated")
        skipped = tuple(map(SkippedPicture.model_validate, facts.get("skipped", ())))
        return ShardReport(truncated, tuple(examples or ()), skipped)


def write_shard(
    store_uri: str,
    plan: ShardPlan,
    encoded: Sequence[EncodedPrompt],
    inputs: StoreInputs,
    skipped: Sequence[SkippedPicture] = (),
) -> tuple[ShardEntry, ShardReport]:
    """Write one shard, whole or not at all. The file is built in memory first.

    Args:
        store_uri: the store.
        plan: what goes into the file, without the skipped prompts.
        encoded: an embedding for each prompt, with latents if the prompt has a picture, of either
            kind.
        inputs: the store's.
        skipped: prompts that were left out, for the record.

    Raises:
        ValueError: an embedding or a latent isn't finite (names the prompt), the counts differ, or
            only some embeddings have a pooled vector.
        OSError: the storage refused.
    """
    if len(encoded) != len(plan.prompts):
        raise ValueError(f"{plan.path} expects {len(plan.prompts)} embeddings, got {len(encoded)}")
    cut = [p.text for p, e in zip(plan.prompts, encoded, strict=True) if e.truncated]
    report = ShardReport(len(cut), tuple(cut[:3]), tuple(skipped))
    facts = {"inputs_sha256": inputs.digest} | json.loads(report.to_json())
    table = encoded_table(
        plan.prompts,
        encoded,
        inputs.dtype,
        inputs.latents,
        inputs.conditions,
        inputs.negative_prompt is not None,
    ).replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True).encode()})
    compression = dict(_COMPRESSION)
    compression |= {} if inputs.latents is None else _LATENT_COMPRESSION
    compression |= {} if inputs.conditions is None else _CONDITION_COMPRESSION
    if inputs.negative_prompt is not None:
        compression |= {field.name: "zstd" for field in NEGATIVE_COLUMNS}
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        start = 0
        for group in plan.row_groups:
            writer.write_table(table.slice(start, group.rows), row_group_size=group.rows)
            start += group.rows
    content = memoryview(sink.getvalue())
    storage.write_bytes(storage.join(store_uri, plan.path), content)
    return _entry(plan, len(content), hashlib.sha256(content).hexdigest()), report


def reusable_shard(
    store_uri: str, plan: ShardPlan, inputs: StoreInputs, buckets: Sequence[Bucket]
) -> tuple[ShardEntry, ShardReport] | None:
    """The entry of a shard that an earlier, interrupted job left behind; None if it must be made.

    The file is read whole, so that page checksums are compared.
    """
    uri = storage.join(store_uri, plan.path)
    system, path = storage.filesystem(uri)
    try:
        with open_parquet(uri, require_pages) as file:
            facts = shard_facts(file)
            if facts.get("inputs_sha256") != inputs.digest:
                return None
            report = ShardReport.of_facts(facts)
            skipped = {picture.prompt_id for picture in report.skipped}
            numbers = {n for n, prompt in enumerate(plan.prompts) if prompt.prompt_id in skipped}
            plan = plan.without(numbers)
            size = int(system.get_file_info(path).size)
            entry = _entry(plan, size, storage.sha256(uri))
            require_footer(file, entry, inputs, buckets)
            ids = [i for g in range(file.num_row_groups) for i in _read_ids(file, g)]
    except (pa.ArrowException, OSError, ValueError):
        return None
    return (entry, report) if ids == [prompt.prompt_id for prompt in plan.prompts] else None


def _read_ids(file: ParquetFile, group: int) -> list[str]:
    return file.read_row_group(group)["prompt_id"].to_pylist()


def _entry(plan: ShardPlan, size: int, sha256: str) -> ShardEntry:
    return ShardEntry(
        path=plan.path,
        rows=len(plan.prompts),
        bytes=size,
        sha256=sha256,
        row_groups=plan.row_groups,
    )
