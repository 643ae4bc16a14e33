"""What the workers send one another in a training step: weights that are gathered, and gradients.

    fsdp    every unit is gathered for the student's forward pass, for each call of the teacher and
            for the backward pass; the last backward pass of a step scatters the gradients' sums
    hsdp    the same within a group; the groups add up their gradients' parts
    ddp     gradients are added up once a step
    zero    stage 1 and 2 add up gradients and gather what the optimiser moved; stage 3 as fsdp

Losses, norms and choices are left out: they are a few bytes. FSDP pads each weight to rows that
divide evenly, and so do these figures. DeepSpeed's are to within its own padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from piflow.backbones.load import DTYPES
from piflow.config import PiIDConfig, Recipe
from piflow.planning.memory import Placement, keeps_codes, micro_batches, reshards, segments
from piflow.planning.model import Model, Unit, Weight
from piflow.planning.sizes import tokens_of

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]

_FLOAT = 4
_FLAG = 4  # whether a parameter has a gradient


@dataclass(frozen=True)
class Collective:
    """Collectives of a kind, all together in one step.

    Attributes:
        kind: which.
        phase: of the computation that it goes along with; "step" follows the last backward pass.
        nbytes: of the whole tensors, whatever a worker holds of them.
        workers: that take part in one.
    """

    kind: Kind
    phase: str
    nbytes: int
    workers: int

    @property
    def sent(self) -> int:
        """Bytes that a worker sends over a ring."""
        share = self.nbytes * (self.workers - 1) // self.workers
        return 2 * share if self.kind == "all-reduce" else share


def traffic(recipe: Recipe, model: Model, placement: Placement) -> list[Collective]:
    """The collectives of one step, as one worker takes part in them."""
    found = [*_weights_and_gradients(recipe, model, placement), *_tokens(recipe, model, placement)]
    return [collective for collective in found if collective.workers > 1 and collective.nbytes]


def _weights_and_gradients(recipe: Recipe, model: Model, placement: Placement) -> list[Collective]:
    world, trained = placement.world, _FLOAT * model.trained
    if placement.strategy == "ddp":
        flags = _FLAG * sum(_count(unit) for unit in model.student)
        return [Collective("all-reduce", "step", trained + flags, world)]
    if placement.strategy == "zero1":
        # gradients are added up, each worker moves its part, and the parts are gathered
        return [
            Collective("all-reduce", "step", trained, world),
            Collective("all-gather", "step", trained, world),
        ]
    if placement.strategy == "zero2":
        rounds = micro_batches(recipe, world) * segments(recipe)
        return [
            Collective("reduce-scatter", "backward", rounds * trained, world),
            Collective("all-gather", "step", trained, world),
        ]
    if placement.strategy in ("fsdp", "zero3"):
        return _sharded(recipe, model, placement)
    return []


def _sharded(recipe: Recipe, model: Model, placement: Placement) -> list[Collective]:
    shard = placement.shard
    rounds = micro_batches(recipe, placement.world) * segments(recipe)
    calls = teacher_calls(recipe)
    whole = placement.strategy == "fsdp" and not reshards(recipe)
    student = _gathered(model.student, shard)
    rest = _gathered([unit for unit in model.student if unit.part == "rest"], shard)
    codes = placement.strategy == "fsdp" and keeps_codes(recipe)
    teacher = calls * _gathered(model.teacher, shard, codes=codes)
    backward = rest if whole else student
    if model.shared and calls:
        head = _gathered([unit for unit in model.teacher if unit.part == "teacher head"], shard)
        if whole:  # blocks stay so from the student's pass on, heads from their first
            teacher = calls * rest + head
    found = [
        Collective("all-gather", phase, rounds * nbytes, shard)
        for phase, nbytes in (("student", student), ("teacher", teacher), ("backward", backward))
    ]
    scattered = sum(
        _FLOAT * _padded(weight, shard) for unit in model.student for weight in _trained(unit)
    )
    times = rounds if placement.strategy == "zero3" else 1
    found.append(Collective("reduce-scatter", "backward", times * scattered, shard))
    groups = placement.world // shard
    found.append(Collective("all-reduce", "backward", scattered // shard, groups))
    return found


def _tokens(recipe: Recipe, model: Model, placement: Placement) -> list[Collective]:
    """Ulysses: queries, keys, values and results change places before and after each attention."""
    together = recipe.runtime.context_parallel
    if together == 1:
        return []
    tokens = recipe.training.micro_batch_size * (tokens_of(recipe) // together)
    # of one pass; the backward pass does the same with gradients
    one = 4 * model.blocks * tokens * model.width * DTYPES[recipe.model.dtype].itemsize
    guided = 1 if recipe.guidance.scale == 1.0 else 2
    rounds = micro_batches(recipe, placement.world) * segments(recipe)
    passes = {"student": 1, "teacher": guided * teacher_calls(recipe), "backward": 1}
    return [
        Collective("all-to-all", phase, rounds * times * one, together)
        for phase, times in passes.items()
    ]


def teacher_calls(recipe: Recipe) -> int:
    """Of a segment."""
    objective = recipe.objective
    return objective.num_intermediate_states if isinstance(objective, PiIDConfig) else 0


def _trained(unit: Unit) -> list[Weight]:
    return [weight for weight in unit.weights if weight.owner == "student"]


def _count(unit: Unit) -> int:
    return len(_trained(unit))


def _gathered(units: Sequence[Unit], shard: int, *, codes: bool = False) -> int:
    """Bytes of these units, each weight padded to rows that divide.

    Args:
        codes: of weights that have some, codes and scales come in their place.
    """
    return sum(
        _padded(weight, shard) + _FLOAT * _rows(weight, shard)
        if codes and weight.coded
        else weight.itemsize * _padded(weight, shard)
        for unit in units
        for weight in unit.weights
    )


def _padded(weight: Weight, shard: int) -> int:
    """Values of a weight whose rows divide evenly."""
    return _rows(weight, shard) * math.prod(weight.shape[1:])


def _rows(weight: Weight, shard: int) -> int:
    rows, *_ = weight.shape or (1,)
    return -(-rows // shard) * shard
