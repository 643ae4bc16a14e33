"""What a worker finds out about its machine, its network and the run's storage, before a run.

All workers call `probe` together: it measures what they do with one another as well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from piflow import storage
from piflow.runtime.nccl_log import NcclNetwork, read_nccl_log
from piflow.sharding.everyone import everyone
from piflow.storage.foreign import shown

_GPU_SIDE, _CPU_SIDE = 4096, 256  # of the matrices
_PRODUCTS = 8
_BF16_SUM = 256  # terms of -1, 0 and 1: their sums are whole numbers that bfloat16 holds exactly

_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 8 * 2**20  # of an all-reduce
_WARM_UPS, _ALL_REDUCES = 2, 5

_FILE_BYTES = 64 * 2**20  # of a machine's file on the run's storage
_CLOCK_ROUNDS = 10
_NVIDIA_SMI_SECONDS = 60

PATIENCE = timedelta(minutes=5)
"""Of one exchange between workers: a network that drops packets would hang."""
_MEMORY_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the driver's start",
    "retired_pages.pending": "memory pages to be retired at the next reset",
    "remapped_rows.pending": "memory rows to be remapped at the next reset",
    "remapped_rows.failure": "memory rows that could not be remapped",
}


@dataclass(frozen=True)
class Findings:
    """What one worker found.

    Attributes:
        machine: its host's name and address.
        device: the GPU's name, or ``cpu``.
        wrong_products: of the matrix products that were compared.
        memory_errors: what nvidia-smi tells of the GPU's memory; None: it isn't there or can't say.
        allreduce_gb_s: bus bandwidth, GB/s; None: there is one worker.
        network: by NCCL's log; None: gloo, over TCP.
        clock_s: seconds that this machine's clock is ahead of rank 0's.
        write_mb_s, read_mb_s: of a file on the run's storage; None: another worker of this machine
            wrote, or it failed.
        storage_problem: why it failed; empty: it didn't.
    """

    rank: int
    machine: str
    device: str
    wrong_products: int
    memory_errors: list[str] | None = field(default_factory=list)
    allreduce_gb_s: float | None = None
    network: NcclNetwork | None = None
    clock_s: float = 0.0
    write_mb_s: float | None = None
    read_mb_s: float | None = None
    storage_problem: str = ""


def probe(device: torch.device, folder: str, nccl_log: Path | None) -> list[Findings]:
    """Measure, and hear what the others found; a collective of all workers.

    Args:
        folder: URI of a folder that every machine can write; files in it are deleted again.
        nccl_log: that of `keep_nccl_log`; None without GPUs.

    Returns:
        All workers' findings, by rank.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    talk = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
    machine = f"{socket.gethostname()} ({_address()})"
    machines = everyone(machine, talk)
    bandwidth = allreduce_gb_s(device)
    written, read, problem = _storage_speed(folder, rank, machines, talk)
    mine = Findings(
        rank=rank,
        machine=machine,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        wrong_products=wrong_products(device),
        memory_errors=memory_errors(device) if device.type == "cuda" else [],
        allreduce_gb_s=bandwidth,
        network=None if nccl_log is None else read_nccl_log(nccl_log),
        clock_s=_clock_ahead(rank, talk),
        write_mb_s=written,
        read_mb_s=read,
        storage_problem=problem,
    )
    if nccl_log is not None:
        shutil.rmtree(nccl_log.parent, ignore_errors=True)
    return everyone(mine, talk)


def wrong_products(device: torch.device) -> int:
    """How many of some matrix products aren't what they must be.

    The matrices hold small whole numbers, so that every sum is exact in whatever precision the
    device adds. C = A B holds if C x = A (B x) for a random x, which a CPU computes in float64: a
    wrong element shows unless x is zero there.
    """
    side = _GPU_SIDE if device.type == "cuda" else _CPU_SIDE
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for number in range(_PRODUCTS):
        dtype, inner = ((torch.float32, side), (torch.bfloat16, _BF16_SUM))[number % 2]
        a = torch.randint(-1, 2, (side, inner), generator=generator).to(torch.float64)
        b = torch.randint(-1, 2, (inner, side), generator=generator).to(torch.float64)
        x = torch.randint(1, 1000, (side, 1), generator=generator).to(torch.float64)
        product = torch.mm(a.to(device, dtype), b.to(device, dtype)).to("cpu", torch.float64)
        wrong += not torch.equal(product @ x, a @ (b @ x))
    return wrong


def memory_errors(device: torch.device) -> list[str] | None:
    """What nvidia-smi tells of a GPU's memory that will fail a run; None: it can't tell."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", gpu, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--query-gpu={','.join(_MEMORY_FIELDS)}"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else told_errors(done.stdout)


def told_errors(line: str) -> list[str] | None:
    """Errors in nvidia-smi's line of `_MEMORY_FIELDS`; None: it is no such line, or all unknown."""
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(_MEMORY_FIELDS) or all(value.startswith("[") for value in values):
        return None
    return [
        f"{what}: {shown(value, 40)}"
        for what, value in zip(_MEMORY_FIELDS.values(), values, strict=True)
        if value not in ("0", "No") and not value.startswith("[")  # [N/A] of kinds without it
    ]


def allreduce_gb_s(device: torch.device) -> float | None:
    """Bus bandwidth of an all-reduce, the median of some; None: one worker has nothing to reduce.

    The bus bandwidth counts what each worker sends at least, 2 (n - 1) / n times the bytes, so that
    the figure can be compared with a link's speed whatever the number of workers.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    size = dist.get_world_size()
    values = torch.ones((_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4, device=device)
    seconds = []
    for _ in range(_WARM_UPS + _ALL_REDUCES):
        values.fill_(1.0)
        _wait_for(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _wait_for(device)
        seconds.append(time.perf_counter() - began)
        if not bool((values == size).all()):
            raise ArithmeticError(
                f"an all-reduce of ones over {size} workers gave values from "
                f"{float(values.min()):g} to {float(values.max()):g}, expected {size} everywhere: "
                "the network or a GPU changes what it carries"
            )
    moved = values.numel() * values.element_size() * 2 * (size - 1) / size
    return moved / statistics.median(seconds[_WARM_UPS:]) / 1e9


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock_ahead(rank: int, group: dist.ProcessGroup | None) -> float:
    """Seconds that this clock is ahead of rank 0's, from the quickest of some exchanges."""
    if group is None:
        return 0.0
    ahead = 0.0
    for other in range(1, dist.get_world_size(group)):
        if rank == 0:
            rounds = [_ask_clock(other, group) for _ in range(_CLOCK_ROUNDS)]
            ahead_of_mine = torch.tensor([min(rounds)[1]], dtype=torch.float64)
            dist.send(ahead_of_mine, other, group=group)
        elif rank == other:
            for _ in range(_CLOCK_ROUNDS):
                dist.recv(torch.zeros(1), 0, group=group)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=group)
            answer = torch.zeros(1, dtype=torch.float64)
            dist.recv(answer, 0, group=group)
            ahead = float(answer)
    return ahead


def _ask_clock(other: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """Seconds of the exchange, and by how many the other's clock is ahead: half-way through it."""
    answer = torch.zeros(1, dtype=torch.float64)
    before = time.time()
    dist.send(torch.zeros(1), other, group=group)
    dist.recv(answer, other, group=group)
    after = time.time()
    return after - before, float(answer) - (before + after) / 2


def _storage_speed(
    folder: str, rank: int, machines: list[str], group: dist.ProcessGroup | None
) -> tuple[float | None, float | None, str]:
    """MB/s of writing and of reading, and what went wrong.

    One worker a machine writes, and reads what the next machine wrote: from its own disk's memory
    it would be too fast, and a folder that machines don't share shows.
    """
    writers = [machines.index(machine) for machine in dict.fromkeys(machines)]
    writes = rank in writers
    written = read = None
    problem = ""
    mine = storage.join(folder, f"{rank}.bin")
    content = os.urandom(2**20) * (_FILE_BYTES // 2**20) if writes else b""
    if writes:
        try:
            began = time.perf_counter()
            storage.write_bytes(mine, content)
            written = _FILE_BYTES / 1e6 / (time.perf_counter() - began)
        except OSError as error:
            problem = f"can't write: {shown(error, 300)}"
    sums = everyone(hashlib.sha256(content).hexdigest(), group)  # after all have written
    if writes:
        theirs = writers[(writers.index(rank) + 1) % len(writers)]
        try:
            began = time.perf_counter()
            found = storage.read_bytes(storage.join(folder, f"{theirs}.bin"), max_bytes=_FILE_BYTES)
            read = _FILE_BYTES / 1e6 / (time.perf_counter() - began)
            if hashlib.sha256(found).hexdigest() != sums[theirs]:
                problem = f"what {machines[theirs]} wrote is read as something else"
        except (OSError, ValueError) as error:
            problem = problem or (
                f"can't read what {machines[theirs]} wrote ({shown(error, 300)}); run_dir must be "
                "s3:// or a disk that all machines share"
            )
    everyone(None, group)  # all have read
    if written is not None:
        storage.delete_file(mine)
    return written, read, problem


def _address() -> str:
    """This machine's, as Ray knows it."""
    import ray

    return str(ray.util.get_node_ip_address())
