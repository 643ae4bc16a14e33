"""What a recipe may leave open, decided by memory: what costs time where there is room for more.

    runtime.reshard_after_forward     false: FSDP gathers a block once a segment, and keeps it whole
                                      for the teacher's calls and the backward pass
    model.fp8_teacher.keep_weights    true: 8-bit weights are made once, not in every call

Neither changes results. Training and `piflow plan` decide by the same estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from piflow.config import Recipe
from piflow.planning.memory import (
    GIB,
    SAFE_SHARE,
    Memory,
    Placement,
    fits,
    keeping_codes,
    may_keep_codes,
    memory_of,
)
from piflow.planning.model import Model
from piflow.planning.passes import Passes

WHOLE = "runtime.reshard_after_forward"
CODES = "model.fp8_teacher.keep_weights"


@dataclass(frozen=True)
class Settled:
    """A recipe with both decided where its strategy has the choice.

    Attributes:
        reasons: a sentence for each decision; none where nothing was open.
    """

    recipe: Recipe
    reasons: tuple[str, ...] = ()


def is_open(recipe: Recipe, strategy: str) -> bool:
    """Whether the recipe leaves something to memory.

    Args:
        strategy: of a `Placement`.
    """
    whole = recipe.runtime.reshard_after_forward is None and strategy == "fsdp"
    return whole or may_keep_codes(recipe, strategy)


def settle(
    recipe: Recipe,
    model: Model,
    passes: Passes,
    placement: Placement,
    free: int,
    *,
    context: int = 0,
) -> Settled:
    """Decides what is open.

    Blocks aren't kept whole beside an fp8 teacher, unless its recipe refuses to keep 8-bit weights:
    FSDP gathers those for it in half the bytes.

    Args:
        free: bytes of a worker's device without what isn't PyTorch's; `context` are the latter.
    """

    def needs(wanted: Recipe) -> Memory:
        return memory_of(wanted, model, passes, placement, context=context)

    def told(key: str, value: str, needed: Memory) -> str:
        relation = "fits" if fits(needed, free) else "doesn't fit"
        return (
            f"{key} = {value}: the faster way is estimated at {needed} a worker, and {relation} in "
            f"{SAFE_SHARE:.0%} of the {free / GIB:.2f} GiB that there are"
        )

    reasons = []
    if recipe.runtime.reshard_after_forward is None and placement.strategy == "fsdp":
        fp8 = recipe.model.fp8_teacher
        if fp8 is not None and fp8.keep_weights is not False:
            recipe = resharding(recipe, True)
            reasons.append(f"{WHOLE} = true: the fp8 teacher's blocks are gathered in 8 bits")
        else:
            whole = resharding(recipe, False)
            needed = needs(whole)
            recipe = whole if fits(needed, free) else resharding(recipe, True)
            value = "false" if recipe is whole else "true"
            reasons.append(told(WHOLE, value, needed))
    if may_keep_codes(recipe, placement.strategy):
        kept = keeping_codes(recipe, True)
        needed = needs(kept)
        recipe = kept if fits(needed, free) else keeping_codes(recipe, False)
        reasons.append(told(CODES, "true" if recipe is kept else "false", needed))
    return Settled(recipe, tuple(reasons))


def without_room(recipe: Recipe, strategy: str, why: str) -> Settled:
    """What is open decided for the least memory, since the estimate is missing.

    Args:
        strategy: of a `Placement`.
        why: it is.
    """
    reasons = []
    if recipe.runtime.reshard_after_forward is None and strategy == "fsdp":
        recipe = resharding(recipe, True)
        reasons.append(f"{WHOLE} = true: {why}")
    if may_keep_codes(recipe, strategy):
        recipe = keeping_codes(recipe, False)
        reasons.append(f"{CODES} = false: {why}")
    return Settled(recipe, tuple(reasons))


def resharding(recipe: Recipe, reshard: bool) -> Recipe:
    """The recipe with `reshard_after_forward` as given."""
    runtime = recipe.runtime.model_copy(update={"reshard_after_forward": reshard})
    return recipe.model_copy(update={"runtime": runtime})
