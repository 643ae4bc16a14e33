"""Throughput of the store's reader against pyarrow's own scan of the same files.

    python benchmarks/stream.py [--prompts 8192] [--tokens 12] [--width 384] [--store URI ...]

For each place a store of made-up embeddings is written, then read in turn, once each round:

* by pyarrow: every row group of every file in file order, page checksums compared, into Arrow
  tables, through the same `piflow.storage.files` client;
* by `TrainStream`: one epoch of the training order (shuffled row groups, rows shuffled in windows
  of 8), a batch of 64 at a time, into Arrow tables of the same columns;
* the same with decoding to padded float32 tensors, which pyarrow's scan doesn't do;
* with ``--ray``, afterwards and beside a second scan, both of these through Ray Data, as training
  reads: the rows go from an actor's process through Ray's object store. The time until the first
  step is there is left out.

MB are 10^6 bytes of the files' content. A first round isn't counted; of the others the medians are
given, and of the ratios to the same round's scan also the least and the largest. The ratio by CPU
time says less on a quiet machine, where row groups are read beside other work, and more on a busy
one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from piflow import storage
from piflow.backbones.text import EncodedPrompt
from piflow.data.layout import empty_prompt_plan, plan_store
from piflow.data.manifest import SCHEMA_VERSION, StoreInputs, StoreManifest, write_manifest
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.data.writer import write_shard
from piflow.storage.fingerprint import EncoderIdentity

ROWS_PER_SHARD, ROWS_PER_GROUP = 4096, 256  # a recipe's defaults
BATCH = 64
SCAN = "pyarrow scan"


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


def stream(store: EmbeddingStore, reader: Literal["local", "ray"]) -> TrainStream:
    """The only rank's stream."""
    return TrainStream(
        store.uri, seed=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
        reader=reader,
    )  # fmt: skip


def read_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as Arrow tables."""
    steps = islice(stream(store, "local").tables(), store.manifest.num_rows // BATCH)
    return sum(table.num_rows for _, table in steps)


def decode_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as padded tensors."""
    steps = islice(stream(store, "local").batches(), store.manifest.num_rows // BATCH)
    return sum(len(micro.prompts) for batch in steps for micro in batch.micro_batches)


METHODS: dict[str, Callable[[EmbeddingStore], int]] = {
    SCAN: scan,
    "training order, Arrow": read_in_order,
    "training order, tensors": decode_in_order,
}


@dataclass
class Times:
    """Seconds of each round: by the clock, and of this process's CPU time."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(store: EmbeddingStore, rounds: int) -> dict[str, Times]:
    """Each method's times, one after the other in every round."""
    times = {name: Times() for name in METHODS}
    for number in range(rounds + 1):
        for name, method in METHODS.items():
            clock, cpu = time.perf_counter(), time.process_time()
            rows = method(store)
            if number:
                times[name].clock.append(time.perf_counter() - clock)
                times[name].cpu.append(time.process_time() - cpu)
            if rows != store.manifest.num_rows:
                raise RuntimeError(f"{name} gave {rows} rows of {store.manifest.num_rows}")
    return times


def measure_ray(store: EmbeddingStore, rounds: int) -> dict[str, Times]:
    """The scan again and Ray Data's times; other processes work too, so without CPU time."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        ignore_reinit_error=True,
    )
    times = {SCAN: Times()}
    for _ in range(rounds):
        clock = time.perf_counter()
        scan(store)
        times[SCAN].clock.append(time.perf_counter() - clock)
        for kind in ("Arrow", "tensors"):
            reader = stream(store, "ray")
            name = f"training order, {kind}, Ray Data"
            seconds = _after_the_first(
                store, reader.tables() if kind == "Arrow" else reader.batches()
            )
            times.setdefault(name, Times()).clock.append(seconds)
    return times


def _after_the_first(store: EmbeddingStore, steps: Iterator[object]) -> float:
    """Seconds from the second step of an epoch on."""
    next(steps)
    start = time.perf_counter()
    for _ in islice(steps, store.manifest.num_rows // BATCH - 1):
        pass
    return time.perf_counter() - start


def report(place: str, store: EmbeddingStore, times: dict[str, Times]) -> None:
    """Print the table's lines."""
    size = sum(entry.bytes for entry in store.manifest.shards) / 1e6
    scanned = times[SCAN]
    for name, ours in times.items():
        seconds = float(np.median(ours.clock))
        ratios = np.array(scanned.clock) / np.array(ours.clock)
        cpu = "–" if not ours.cpu else f"{np.median(np.array(scanned.cpu) / ours.cpu):.0%}"
        print(
            f"| {place} | {name} | {store.manifest.num_rows / seconds:,.0f} | "
            f"{size / seconds:,.0f} | {np.median(ratios):.0%} ({ratios.min():.0%} to "
            f"{ratios.max():.0%}) | {cpu} |"
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
                report(storage.scheme(uri), store, measure(store, arguments.rounds))
                if arguments.ray:
                    report(storage.scheme(uri), store, measure_ray(store, arguments.rounds))
            finally:
                storage.delete_folder(uri)


if __name__ == "__main__":
    main()
