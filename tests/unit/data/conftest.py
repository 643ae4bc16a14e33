"""Small embedding stores with made-up numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from piflow.backbones.text import EncodedPrompt
from piflow.data.layout import empty_prompt_plan, negative_prompt_plan, plan_store
from piflow.data.manifest import SCHEMA_VERSION, StoreInputs, StoreManifest, write_manifest
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.reader import EmbeddingStore
from piflow.data.writer import write_shard
from piflow.storage.fingerprint import EncoderIdentity

IDENTITY = EncoderIdentity(name="test-2x8", weights_sha256="ab" * 32, max_tokens=5, hidden_size=8)


def encode(prompt: Prompt) -> EncodedPrompt:
    """Random numbers that follow from the prompt, 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(int(prompt.prompt_id[:8], 16))
    count = 1 + int(prompt.prompt_id[0], 16) % 5
    return EncodedPrompt(
        3 * torch.randn(count, 8, generator=generator), torch.randn(6, generator=generator), False
    )


def encode_without_pooled(prompt: Prompt) -> EncodedPrompt:
    return encode(prompt)._replace(pooled=None)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """Build a store: `sizes` has the number of prompts of each (height, width)."""

    def build(
        sizes: dict[tuple[int, int], int],
        rows_per_shard: int = 10,
        rows_per_group: int = 4,
        dtype: str = "bf16",
        name: str = "store",
        *,
        pooled: bool = True,
        negative_prompts: Sequence[str] = (),
    ) -> EmbeddingStore:
        prompts = [
            Prompt(f"prompt {number}", height, width)
            for (height, width), rows in sizes.items()
            for number in range(rows)
        ]
        return write(
            str(tmp_path / name),
            prompts,
            encode if pooled else encode_without_pooled,
            rows_per_shard=rows_per_shard,
            rows_per_group=rows_per_group,
            dtype=dtype,
            negative_prompts=negative_prompts,
        )

    return build


@pytest.fixture
def write_store() -> Callable[..., EmbeddingStore]:
    """(uri, prompts, encode) -> a store of what `encode` makes of each prompt."""
    return write


def write(
    uri: str,
    prompts: Sequence[Prompt],
    encode: Callable[[Prompt], EncodedPrompt],
    *,
    identity: EncoderIdentity = IDENTITY,
    rows_per_shard: int = 10,
    rows_per_group: int = 4,
    dtype: str = "bf16",
    negative_prompts: Sequence[str] = (),
) -> EmbeddingStore:
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=identity,
        dtype=dtype,
        rows_per_shard=rows_per_shard,
        rows_per_group=rows_per_group,
        num_prompts=len(prompts),
        prompts_sha256=PromptSet(tuple(prompts), 0).digest,
    )
    buckets, plans = plan_store(prompts, rows_per_shard, rows_per_group)
    singles = [empty_prompt_plan(), *(negative_prompt_plan(text) for text in negative_prompts)]
    entries = [
        write_shard(uri, plan, [encode(prompt) for prompt in plan.prompts], inputs)[0]
        for plan in [*plans, *singles]
    ]
    manifest = StoreManifest(
        inputs=inputs,
        inputs_sha256=inputs.digest,
        buckets=buckets,
        shards=tuple(entries[: len(plans)]),
        empty_prompt=entries[len(plans)],
        truncated_prompts=0,
        negative_prompts=tuple(entries[len(plans) + 1 :]),
    )
    write_manifest(uri, manifest)
    return EmbeddingStore.open(uri)
