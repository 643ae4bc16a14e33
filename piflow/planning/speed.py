"""A step's time by a roofline: each kernel takes as long as the slowest of what it needs.

    products      operations over the GPU's peak in their dtype
    bytes         what it reads and writes over the memory's bandwidth
    launch        the least time between two kernels

each at its own share of the peak, which the table states. Collectives that gather or scatter run
beside the computation of their phase; what they take longer than that is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piflow.config import Recipe
from piflow.config.model import BaseWeights
from piflow.planning.counting import Operation
from piflow.planning.hardware import Efficiency, Gpu, PlanError
from piflow.planning.memory import (
    GIB,
    Placement,
    keeps_codes,
    micro_batches,
    segments,
    weights_in_codes,
)
from piflow.planning.model import Model
from piflow.planning.passes import BACKWARD, LOSSES, PHASES, STUDENT, TEACHER, Passes
from piflow.planning.traffic import Collective, teacher_calls

_DTYPES = {"float16": "bfloat16"}  # of the same speed
_TOKEN_ROWS = 64  # operations a byte from which a product is one of tokens and not of a vector
_FP8_TRAFFIC = (
    19  # bytes a value: abs, maximum, division, clamping and cast are passes of their own
)
_WHOLE_TRAFFIC: Mapping[BaseWeights, int] = {"int8": 19, "nf4": 33}
"""Bytes a bfloat16 value that torchao's steps from codes to a weight read and write, as coded."""
_UPDATE = 36  # bytes a value: weight, gradient, two moments and average, read and written
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Phase:
    """Seconds of a step.

    Attributes:
        compute: of kernels.
        communication: of collectives, which run beside them.
        waiting: of collectives that nothing runs beside.
    """

    compute: float
    communication: float = 0.0
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.compute, self.communication) + self.waiting


@dataclass(frozen=True)
class Speed:
    """A step's phases by name; "update" is the optimiser's step and what is reduced before it."""

    phases: Mapping[str, Phase]

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(phase.seconds for phase in self.phases.values())


@dataclass(frozen=True)
class Machines:
    """What a run is placed on."""

    gpu_name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus_per_node


def speed_of(
    recipe: Recipe,
    model: Model,
    passes: Passes,
    placement: Placement,
    collectives: Sequence[Collective],
    machines: Machines,
    efficiency: Efficiency,
) -> Speed:
    """A step's phases.

    Raises:
        PlanError: the recipe's teacher computes in fp8 and the GPU doesn't.
    """
    gpu, cut = machines.gpu, recipe.runtime.context_parallel
    rounds = micro_batches(recipe, machines.world) * segments(recipe)
    times = {STUDENT: rounds, TEACHER: rounds * teacher_calls(recipe), LOSSES: rounds}
    times[BACKWARD] = rounds
    kernels = _Kernels(gpu, efficiency, recipe.runtime.compile)
    phases = {}
    for name in PHASES:
        counts: Mapping[Operation, int] = passes.operations.get(name, {})
        if name == TEACHER and recipe.model.fp8_teacher is not None:
            counts = _in_fp8(counts, recipe, model, machines)
        if recipe.model.base_weights is not None and name != LOSSES:
            counts = _from_codes(counts, recipe, model, backward=name == BACKWARD)
        compute = times[name] * kernels.seconds(counts) / cut
        beside = [c for c in collectives if c.phase == name and c.kind != "all-to-all"]
        alone = [c for c in collectives if c.phase == name and c.kind == "all-to-all"]
        sent = _seconds(beside, placement, machines, efficiency)
        sent += _from_host(recipe, beside, efficiency)
        phases[name] = Phase(compute, sent, _seconds(alone, placement, machines, efficiency))
    after = [c for c in collectives if c.phase == "step"]
    waiting = _seconds(after, placement, machines, efficiency)
    phases["update"] = Phase(_update(recipe, model, placement, gpu, efficiency), waiting=waiting)
    return Speed({name: phase for name, phase in phases.items() if phase.seconds})


class _Kernels:
    def __init__(self, gpu: Gpu, efficiency: Efficiency, compiled: bool) -> None:
        self._peaks = gpu.peaks
        self._share = {"matmul": efficiency.matmul, "attention": efficiency.attention}
        self._bandwidth = gpu.bandwidth * _GIGA * efficiency.bandwidth
        self._compiled = efficiency.compiled if compiled else 1.0
        self._launch = efficiency.launch_microseconds / 1e6

    def seconds(self, counts: Mapping[Operation, int]) -> float:
        return sum(count * self._one(operation) for operation, count in counts.items())

    def _one(self, operation: Operation) -> float:
        moved = operation.moved / self._bandwidth
        if operation.kind == "other":
            return max(moved * self._compiled, self._launch * self._compiled)
        dtype = _DTYPES.get(operation.dtype, operation.dtype)
        peak = self._peaks.get(dtype, self._peaks["float32"]) * _TERA
        computing = operation.flops / (peak * self._share[operation.kind])
        return max(computing, moved, self._launch)


def _in_fp8(
    counts: Mapping[Operation, int], recipe: Recipe, model: Model, machines: Machines
) -> Mapping[Operation, int]:
    """The same with products of tokens in fp8, and their weights quantised unless they are kept."""
    if "float8" not in machines.gpu.peaks:
        raise PlanError(
            f"model.fp8_teacher needs a GPU that multiplies in fp8, and {machines.gpu_name} has no "
            "peak for float8; leave model.fp8_teacher out, or choose another GPU"
        )
    changed: dict[Operation, int] = {}
    for operation, count in counts.items():
        if operation.kind == "matmul" and operation.flops > _TOKEN_ROWS * operation.moved:
            moved = operation.moved // 2
            operation = Operation("matmul", "float8", operation.flops, moved)
        changed[operation] = changed.get(operation, 0) + count
    values = 0 if keeps_codes(recipe) else sum(weight.numel for weight in model.coded)
    changed[Operation("other", "float8", 0, values * _FP8_TRAFFIC)] = 1
    return changed


def _from_codes(
    counts: Mapping[Operation, int], recipe: Recipe, model: Model, *, backward: bool
) -> Mapping[Operation, int]:
    """The same with each weight of a base in codes made whole, once more to compute blocks again.

    Args:
        backward: whether it is the phase in which blocks are computed again.
    """
    kind = recipe.model.base_weights
    if kind is None:
        return counts
    again = backward and recipe.runtime.activation_checkpointing != "none"
    moved = [weight.numel * _WHOLE_TRAFFIC[kind] for weight in weights_in_codes(recipe, model)]
    passes = Operation("other", kind, 0, sum(moved))
    return {**counts, passes: 2 if again else 1}


def _seconds(
    collectives: Sequence[Collective],
    placement: Placement,
    machines: Machines,
    efficiency: Efficiency,
) -> float:
    """Of collectives one after the other.

    A group of neighbours within a machine has its links. One over several machines is a ring that
    enters and leaves each machine once; groups of one GPU a machine share the machine's network.
    """
    link = machines.gpu.link * _GIGA * efficiency.link
    network = machines.gpu.network_gbits / 8 * _GIGA * efficiency.network
    total = 0.0
    for collective in collectives:
        across = collective.phase == BACKWARD and collective.kind == "all-reduce"
        local = placement.shard if across else 1  # groups that share a machine's network
        seconds = collective.sent / link
        if machines.nodes > 1 and (across or collective.workers > machines.gpus_per_node):
            leaving = collective.sent * min(local, machines.gpus_per_node)
            seconds = max(seconds, leaving / network)
        total += seconds
    return total


def _from_host(recipe: Recipe, collectives: Sequence[Collective], efficiency: Efficiency) -> float:
    """Of a worker's parts that lie in host memory, on their way to the GPU."""
    if recipe.runtime.offload != "cpu":
        return 0.0
    parts = sum(c.nbytes // c.workers for c in collectives if c.kind == "all-gather")
    return parts / (efficiency.host_gb_per_second * _GIGA)


def _update(
    recipe: Recipe, model: Model, placement: Placement, gpu: Gpu, efficiency: Efficiency
) -> float:
    split = placement.shard if placement.strategy == "fsdp" else 1
    split = placement.world if placement.strategy.startswith("zero") else split
    moved = model.trained * _UPDATE / split
    options = recipe.runtime.deepspeed
    host = recipe.runtime.offload == "cpu" or (
        options is not None and options.offload_optimizer == "cpu"
    )
    if host:
        return moved / (efficiency.host_gb_per_second * _GIGA)
    return moved / (gpu.bandwidth * _GIGA * efficiency.bandwidth)


def context_bytes(efficiency: Efficiency, world: int) -> int:
    """Of a GPU's memory that isn't PyTorch's."""
    return int((efficiency.context_gib + (efficiency.nccl_gib if world > 1 else 0)) * GIB)
