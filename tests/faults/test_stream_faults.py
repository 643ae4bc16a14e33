"""The training stream while its object store dies and comes back."""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import Any

import pytest
import torch

from piflow import storage
from piflow.backbones.text import EncodedPrompt
from piflow.data.batch import StreamBatch
from piflow.data.blocks import LocalReader
from piflow.data.layout import empty_prompt_plan, plan_store
from piflow.data.manifest import SCHEMA_VERSION, StoreInputs, StoreManifest, write_manifest
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.data.writer import write_shard
from piflow.storage.fingerprint import EncoderIdentity

pytestmark = pytest.mark.timeout(240)


def _write_store(uri: str) -> None:
    """96 prompts in 12 files of 2 row groups."""
    prompts = tuple(Prompt(f"prompt {number}", 32, 32) for number in range(96))
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=EncoderIdentity(name="t", weights_sha256="0", max_tokens=3, hidden_size=8),
        dtype="bf16",
        rows_per_shard=8,
        rows_per_group=4,
        num_prompts=96,
        prompts_sha256=PromptSet(prompts, 0).digest,
    )
    buckets, plans = plan_store(prompts, 8, 4)
    generator = torch.Generator().manual_seed(0)
    *shards, empty = [
        write_shard(
            uri,
            plan,
            [
                EncodedPrompt(torch.randn(3, 8, generator=generator), torch.zeros(2), False)
                for _ in plan.prompts
            ],
            inputs,
        )[0]
        for plan in [*plans, empty_prompt_plan()]
    ]
    manifest = StoreManifest(
        inputs=inputs,
        inputs_sha256=inputs.digest,
        buckets=buckets,
        shards=tuple(shards),
        empty_prompt=empty,
        truncated_prompts=0,
    )
    write_manifest(uri, manifest)


def _stream(uri: str) -> Any:
    stream = TrainStream(
        uri,
        seed=1,
        batch_size=8,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        damaged_rows="replace",  # an outage is no damage
        reader=LocalReader(),
    )
    return stream.batches()


def _ids(batches: list[StreamBatch]) -> list[tuple[str, ...]]:
    return [micro.prompt_ids for batch in batches for micro in batch.micro_batches]


def test_a_server_that_is_killed_and_comes_back_costs_time_only(s3_server: Any) -> None:
    """Promise: reads are tried again; the steps are the ones of an uninterrupted run."""
    uri = storage.join(s3_server.uri, "store")
    _write_store(uri)
    expected = list(islice(_stream(uri), 12))
    batches = _stream(uri)
    found = [next(batches)]
    s3_server.kill()
    returns = threading.Timer(5, s3_server.start)
    returns.start()
    started = time.monotonic()
    found += islice(batches, 11)
    assert time.monotonic() - started > 4, "nothing was read while the server was away"
    returns.join()
    batches.close()  # nothing is being read any more when the server ends
    assert _ids(found) == _ids(expected) and not any(batch.replaced for batch in found)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert torch.equal(a.tokens, b.tokens)


def test_wrong_keys_are_refused_at_once(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a refusal isn't retried as an outage is."""
    uri = storage.join(s3_server.uri, "wrong-keys")
    _write_store(uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    started = time.monotonic()
    with pytest.raises(OSError, match="SignatureDoesNotMatch: the secret"):
        EmbeddingStore.open(uri)
    assert time.monotonic() - started < 10
