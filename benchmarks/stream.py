"""Throughput of the store's reader against pyarrow's own scan of the same files.

    python benchmarks/stream.py [--prompts 8192] [--tokens 12] [--width 384] [--store URI ...]

For each place a store of made-up embeddings is written, then read in turn, once each round:

* by pyarrow: every row group of every file in file order, page checksums compared, into Arrow
  tables, through the same `piflow.storage.files` client;
* by `TrainStream`: one epoch of the training order (shuffled row groups, rows shuffled in windows
  of 8), a batch of 64 at a time, into Arrow tables of the same columns;
* the same with decoding to padded float32 tensors, which pyarrow's scan doesn't do;
* with ``--ray``, afterwards and in a table of its own, batches as training takes them from the
  `RayReader`, whose actor decodes and hands the rows on through Ray's object store, against those
  of the `LocalReader`: the time until the first batch, rows/s from then on, and the CPU time from
  the start, of the rank's own process and of it with all of Ray's.

MB are 10^6 bytes of the files' content. A first round isn't counted; of the others the medians are
given, and of the ratios to the same round's scan also the least and the largest. The ratio by CPU
time says less on a quiet machine, where row groups are read beside other work, and more on a busy
one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from piflow import storage
from piflow.backbones.text import EncodedPrompt
from piflow.data.blocks import LocalReader, Reader
from piflow.data.layout import empty_prompt_plan, plan_store
from piflow.data.manifest import SCHEMA_VERSION, StoreInputs, StoreManifest, write_manifest
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.ray_reader import RayReader
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


def stream(store: EmbeddingStore, reader: Reader) -> TrainStream:
    """The only rank's stream."""
    return TrainStream(
        store.uri, seed=0, batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
        reader=reader,
    )  # fmt: skip


def read_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as Arrow tables of what lies on disk."""
    reader = LocalReader()
    steps = reader.undecoded(stream(store, reader).plan)
    return sum(table.num_rows for _, table in islice(steps, store.manifest.num_rows // BATCH))


def decode_in_order(store: EmbeddingStore) -> int:
    """One epoch in training order, as padded tensors."""
    steps = islice(stream(store, LocalReader()).batches(), store.manifest.num_rows // BATCH)
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


class CpuTime:
    """CPU seconds of this process and of those that it starts, also of ones that end meanwhile."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._poll()
        self._before = dict(self._seen)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def seconds(self) -> tuple[float, float]:
        """Until now: this process's own, and all together. Ends the measurement."""
        self._ended.set()
        self._thread.join()
        self._poll()
        spent = {key: time - self._before.get(key, 0) for key, time in self._seen.items()}
        own = sum(time for (pid, _), time in spent.items() if pid == os.getpid())
        return own, sum(spent.values())

    def _follow(self) -> None:
        while not self._ended.wait(0.5):
            self._poll()

    def _poll(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                pass


@dataclass(frozen=True)
class Reading:
    """An epoch's batches through a reader; seconds."""

    first_batch: float
    others: float
    own_cpu: float
    all_cpu: float


def read_batches(store: EmbeddingStore, reader: Reader) -> Reading:
    """Read one epoch as training does."""
    cpu, start = CpuTime(), time.perf_counter()
    batches = stream(store, reader).batches()
    next(batches)
    first = time.perf_counter()
    for _ in islice(batches, store.manifest.num_rows // BATCH - 1):
        pass
    end = time.perf_counter()
    own, everything = cpu.seconds()
    batches.close()
    time.sleep(2)  # until Ray has ended the actors
    return Reading(first - start, end - first, own, everything)


def compare_readers(store: EmbeddingStore, rounds: int) -> None:
    """Print the table of readers; they take turns, and a first round isn't counted."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        ignore_reinit_error=True,
    )
    readings: dict[str, list[Reading]] = {"LocalReader": [], "RayReader": []}
    for number in range(rounds + 1):
        for reader in (LocalReader(), RayReader()):
            reading = read_batches(store, reader)
            if number:
                readings[type(reader).__name__].append(reading)
    rows = store.manifest.num_rows - BATCH
    print(
        "\n| reader | first batch, s | rows/s | rank's CPU, s | all CPU, s |\n|---|---|---|---|---|"
    )
    for name, found in readings.items():
        first, others, own, everything = (
            float(np.median([getattr(reading, field) for reading in found]))
            for field in ("first_batch", "others", "own_cpu", "all_cpu")
        )
        print(f"| {name} | {first:.2f} | {rows / others:,.0f} | {own:.2f} | {everything:.2f} |")


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
                    compare_readers(store, arguments.rounds)
            finally:
                storage.delete_folder(uri)


if __name__ == "__main__":
    main()
