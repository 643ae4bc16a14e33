"""`piflow preflight`: whether the workers' machines are fit for a long run, by trying them.

What is wrong with a recipe is found by `piflow check` (`piflow.training.preflight`), without a
machine. Here Ray Train starts the recipe's workers as it would for the run, and they measure:
`machine_probe` in the workers, `judge` on what they found.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from piflow import storage
from piflow.config import PreflightConfig, Recipe, RuntimeConfig
from piflow.runtime.machine_probe import PATIENCE, Findings
from piflow.runtime.workers import collectives, failed, scaling, session_with_room
from piflow.storage.scratch import scratch

_FOLDER = "preflight"
_NEVER_SECONDS = 1e8  # until workers are added to those that measure


@dataclass(frozen=True)
class Check:
    """What was checked, and how it came out.

    Attributes:
        name: of the check.
        ok: whether a run may start.
        found: what was measured, of the worst worker.
        wanted: what it is compared with; empty: nothing.
        where: machines or ranks that fail.
    """

    name: str
    ok: bool
    found: str
    wanted: str = ""
    where: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_machines(recipe: Recipe) -> list[Check]:
    """Start the recipe's workers, have them measure, and judge.

    Raises:
        ResourcesError: the cluster has no room for them.
        WorkersFailedError: a worker couldn't measure; says why.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from piflow.runtime.process_group import ClusterTorchConfig

    runtime = recipe.runtime
    folder = storage.join(storage.absolute(recipe.run_dir), f"{_FOLDER}-{uuid.uuid4().hex[:12]}")
    with (
        session_with_room(recipe),
        scratch("preflight") as notes,
    ):
        trainer = TorchTrainer(
            _probe,
            train_loop_config={"folder": folder},
            torch_config=ClusterTorchConfig(
                backend=collectives(runtime), timeout_s=int(PATIENCE.total_seconds())
            ),
            scaling_config=scaling(runtime, _NEVER_SECONDS),
            run_config=ray.train.RunConfig(name="preflight", storage_path=str(notes)),
        )
        try:
            result: Any = trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise failed(error) from error
        finally:
            storage.delete_folder(folder)
    return judge(result.return_value, runtime)


def _probe(config: dict[str, Any]) -> Any:
    """What Ray Train runs on every worker; rank 0's findings are the result's `return_value`."""
    import ray.train.torch

    from piflow.runtime.machine_probe import probe
    from piflow.runtime.nccl_log import keep_nccl_log

    device = ray.train.torch.get_device()
    log = keep_nccl_log() if device.type == "cuda" else None
    return probe(device, config["folder"], log)


def judge(found: Sequence[Findings], runtime: RuntimeConfig) -> list[Check]:
    """What the workers' findings say of a run with this configuration."""
    wanted = runtime.preflight
    return [
        _devices(found, runtime),
        _all(
            "matrix products", found, lambda one: one.wrong_products == 0, _products_told, "exact"
        ),
        *([_memory(found)] if runtime.use_gpu else []),
        _bandwidth(found, wanted),
        _transport(found, wanted),
        _storage(found, wanted),
        _clocks(found, wanted),
    ]


def _devices(found: Sequence[Findings], runtime: RuntimeConfig) -> Check:
    kinds = sorted({one.device for one in found})
    machines = len({one.machine for one in found})
    told = f"{len(found)} x {', '.join(kinds)} on {machines} machine(s)"
    wanted = "a GPU for each worker" if runtime.use_gpu else ""
    where = tuple(
        f"rank {one.rank} on {one.machine}"
        for one in found
        if runtime.use_gpu and one.device == "cpu"
    )
    if len(kinds) > 1 and not where:
        told += "; the slowest kind sets the pace"
    return Check("devices", not where, told, wanted, where)


def _all(
    name: str,
    found: Sequence[Findings],
    is_ok: Callable[[Findings], bool],
    told: Callable[[Findings], str],
    wanted: str,
) -> Check:
    """One check of each worker by itself; what is told is the first one's that fails."""
    bad = [one for one in found if not is_ok(one)]
    where = tuple(f"rank {one.rank} on {one.machine}" for one in bad)
    return Check(name, not bad, told((bad or list(found))[0]), wanted, where)


def _products_told(one: Findings) -> str:
    return f"{one.wrong_products} wrong" if one.wrong_products else "all right"


def _memory(found: Sequence[Findings]) -> Check:
    """Of GPUs; one that nvidia-smi tells nothing of doesn't fail."""

    def told(one: Findings) -> str:
        if one.memory_errors is None:
            return "unknown: nvidia-smi doesn't tell"
        return "; ".join(one.memory_errors) or "no errors"

    return _all("GPU memory", found, lambda one: not one.memory_errors, told, "no ECC errors")


def _bandwidth(found: Sequence[Findings], wanted: PreflightConfig) -> Check:
    floor = wanted.allreduce_gb_s
    measured = [one.allreduce_gb_s for one in found if one.allreduce_gb_s is not None]
    limit = "" if floor is None else f"at least {floor:g} GB/s"
    if not measured:  # with a floor this would pass unseen
        return Check("all-reduce", floor is None, "not measured: one worker", limit)
    slowest = min(measured)  # all wait for the slowest
    return Check("all-reduce", floor is None or slowest >= floor, f"{slowest:.3g} GB/s", limit)


def _transport(found: Sequence[Findings], wanted: PreflightConfig) -> Check:
    limit = "RDMA" if wanted.transport == "rdma" else ""
    networks = [one.network for one in found if one.network is not None]
    if not networks:
        return Check("transport", wanted.transport == "any", "gloo over TCP", limit)
    bad = [
        one
        for one in found
        if wanted.transport == "rdma" and (one.network is None or not one.network.is_rdma)
    ]
    told = sorted({str(network) for network in networks})
    where = tuple(f"rank {one.rank} on {one.machine}: NCCL uses {one.network}" for one in bad)
    return Check("transport", not bad, " | ".join(told), limit, where)


def _storage(found: Sequence[Findings], wanted: PreflightConfig) -> Check:
    floor = wanted.storage_mb_s
    limit = "every machine reads what another wrote"
    if floor is not None:
        limit += f", at least {floor:g} MB/s each"
    where = [f"{one.machine} {one.storage_problem}" for one in found if one.storage_problem]
    speeds = [(one.machine, one.write_mb_s, one.read_mb_s) for one in found]
    for machine, *of_machine in speeds:
        for what, speed in zip(("writes", "reads"), of_machine, strict=True):
            if floor is not None and speed is not None and speed < floor:
                where.append(f"{machine} {what} {speed:.3g} MB/s")
    slowest = [
        min((speed for speed in column if speed is not None), default=None)
        for column in ([one[1] for one in speeds], [one[2] for one in speeds])
    ]
    told = ", ".join(
        f"{what} {speed:.3g} MB/s" if speed is not None else f"{what} failed"
        for what, speed in zip(("write", "read"), slowest, strict=True)
    )
    return Check("storage", not where, told, limit, tuple(where))


def _clocks(found: Sequence[Findings], wanted: PreflightConfig) -> Check:
    seconds = [one.clock_s for one in found]
    apart = max(seconds) - min(seconds)
    where: tuple[str, ...] = ()
    if apart > wanted.clock_s:
        ends = (min(found, key=lambda one: one.clock_s), max(found, key=lambda one: one.clock_s))
        where = tuple(f"{one.machine}: {one.clock_s:+.3g} s of rank 0's" for one in ends)
    return Check(
        "clocks", not where, f"{apart:.2g} s apart", f"at most {wanted.clock_s:g} s", where
    )
