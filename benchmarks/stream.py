"""Throughput of the store's reader against pyarrow's own scan of the same files.

    python benchmarks/stream.py [--prompts 8192] [--tokens 12] [--width 384] [--store URI ...]

For each place a store of made-up embeddings is written, then read in turn, once each round:

* by pyarrow: every row group of every file in file order, page checksums compared, into Arrow
  tables, through the same `piflow.storage` client;
* by `RowReader`: one epoch of the training order (shuffled row groups, rows shuffled in windows of
  8), a batch at a time, which is what one rank's reader does;
* the same with decoding to padded float32 tensors (`TrainStream`, its threads included);
* with ``--ray`` also `TrainStream` through Ray Data, as training reads: the rows go from an actor's
  process through Ray's object store. The time until the first step is there is left out.

MB are 10^6 bytes of the files' content. The best of the rounds counts, ratios are to pyarrow's. The
one by CPU time says less on a quiet machine, where row groups are read side by side, and more on a
busy one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow.parquet as pq
import torch

from piflow import storage
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.store import (
    SCHEMA_VERSION,
    EmbeddingStore,
    EncodedPrompt,
    EncoderIdentity,
    StoreInputs,
    StoreManifest,
    empty_prompt_plan,
    plan_store,
    write_manifest,
    write_shard,
)
from piflow.data.stream import TrainStream

ROWS_PER_SHARD, ROWS_PER_GROUP = 4096, 256  # a recipe's defaults
BATCH = 64


def write_store(uri: str, count: int, tokens: int, width: int) -> EmbeddingStore:
    """A store of `count` made-up prompts of `tokens` states of `width` in fp8."""
    prompts = tuple(Prompt(f"prompt {number}", 512, 512) for number in range(count))
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=EncoderIdentity(
            name="made-up", weights_sha256="0" * 64, max_tokens=tokens, hidden_size=width
        ),
        dtype="fp8",
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_group=ROWS_PER_GROUP,
        num_prompts=count,
        prompts_sha256=PromptSet(prompts, 0).digest,
    )
    buckets, plans = plan_store(prompts, ROWS_PER_SHARD, ROWS_PER_GROUP)
    generator = torch.Generator().manual_seed(0)

    def encoded() -> EncodedPrompt:
        states = torch.randn(tokens, width, generator=generator)
        return EncodedPrompt(states, torch.randn(768, generator=generator), False)

    *shards, empty = [
        write_shard(uri, plan, [encoded() for _ in plan.prompts], inputs)[0]
        for plan in [*plans, empty_prompt_plan()]
    ]
    write_manifest(
        uri,
        StoreManifest(
            inputs=inputs,
            inputs_sha256=inputs.digest,
            buckets=buckets,
            shards=tuple(shards),
            empty_prompt=empty,
            truncated_prompts=0,
        ),
    )
    return EmbeddingStore.open(uri)


def scan(store: EmbeddingStore) -> int:
    """pyarrow alone; returns the number of rows."""
    rows = 0
    for entry in store.manifest.shards:
        system, path = storage.filesystem(storage.join(store.uri, entry.path))
        with pq.ParquetFile(
            system.open_input_file(path), pre_buffer=True, page_checksum_verification=True
        ) as file:
            rows += sum(file.read_row_group(g).num_rows for g in range(file.num_row_groups))
    return rows


def read_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as Arrow tables."""
    stream = TrainStream(
        store.uri, seed=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
        reader="local",
    )  # fmt: skip
    steps = islice(stream.tables(), store.manifest.num_rows // BATCH)
    return sum(table.num_rows for _, table in steps)


def decode_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as padded tensors."""
    stream = TrainStream(
        store.uri, seed=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
        reader="local",
    )  # fmt: skip
    steps = islice(stream.batches(), store.manifest.num_rows // BATCH)
    return sum(len(micro.prompts) for batch in steps for micro in batch.micro_batches)


def decode_through_ray(store: EmbeddingStore, seconds: list[float]) -> int:
    """As `decode_in_order`, through Ray Data; appends the seconds from the second step on."""
    stream = TrainStream(
        store.uri, seed=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    steps = islice(stream.batches(), store.manifest.num_rows // BATCH)
    rows = sum(len(micro.prompts) for micro in next(steps).micro_batches)
    start = time.perf_counter()
    rows += sum(len(micro.prompts) for batch in steps for micro in batch.micro_batches)
    seconds.append(time.perf_counter() - start)
    return rows


METHODS: dict[str, Callable[[EmbeddingStore], int]] = {
    "pyarrow scan": scan,
    "training order, Arrow": read_in_order,
    "training order, tensors": decode_in_order,
}


@dataclass
class Best:
    """The least seconds of the rounds: by the clock, and of this process's CPU time."""

    clock: float = float("inf")
    cpu: float = float("inf")


def measure(store: EmbeddingStore, rounds: int, *, with_ray: bool) -> dict[str, Best]:
    """Each method's best; through Ray other processes work too, so without CPU time."""
    best = {name: Best() for name in METHODS}
    through_ray: list[float] = []
    for _ in range(rounds):
        for name, method in METHODS.items():
            clock, cpu = time.perf_counter(), time.process_time()
            rows = method(store)
            best[name].clock = min(best[name].clock, time.perf_counter() - clock)
            best[name].cpu = min(best[name].cpu, time.process_time() - cpu)
            if rows != store.manifest.num_rows:
                raise RuntimeError(f"{name} gave {rows} rows of {store.manifest.num_rows}")
        if with_ray:
            decode_through_ray(store, through_ray)
    if with_ray:
        best["training order, tensors, Ray Data"] = Best(min(through_ray))
    return best


def report(place: str, store: EmbeddingStore, best: dict[str, Best]) -> None:
    """Print the table's lines."""
    size = sum(entry.bytes for entry in store.manifest.shards) / 1e6
    scanned = best["pyarrow scan"]
    for name, ours in best.items():
        rows = store.manifest.num_rows / ours.clock
        cpu = "–" if ours.cpu == float("inf") else f"{scanned.cpu / ours.cpu:.0%}"
        print(
            f"| {place} | {name} | {rows:,.0f} | {size / ours.clock:,.0f} | "
            f"{scanned.clock / ours.clock:.0%} | {cpu} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="the stream's reader against pyarrow's scan")
    parser.add_argument("--prompts", type=int, default=8192, help=f"multiple of {BATCH}")
    parser.add_argument("--tokens", type=int, default=12, help="of a prompt")
    parser.add_argument("--width", type=int, default=384, help="of a token's state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--store", nargs="+", default=[], help="folders or s3://… to write to; default: a temporary"
    )
    parser.add_argument("--ray", action="store_true", help="also through Ray Data")
    arguments = parser.parse_args(argv)
    if arguments.prompts < BATCH or arguments.prompts % BATCH:
        parser.error(f"--prompts must be a positive multiple of {BATCH}, got {arguments.prompts}")
    if arguments.ray:
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    torch.set_num_threads(1)
    print(f"{arguments.prompts} prompts, {arguments.tokens} x {arguments.width} in fp8\n")
    print(
        "| place | reader | rows/s | MB/s | of pyarrow's | by CPU time |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for place in arguments.store or [folder]:
            uri = storage.join(place, "benchmark-store")
            store = write_store(uri, arguments.prompts, arguments.tokens, arguments.width)
            try:
                report(
                    storage.scheme(uri),
                    store,
                    measure(store, arguments.rounds, with_ray=arguments.ray),
                )
            finally:
                storage.delete_folder(uri)


if __name__ == "__main__":
    main()
