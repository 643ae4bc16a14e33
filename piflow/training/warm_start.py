"""A student that begins as another one: `training.init_from`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from piflow.backbones import Backbone
from piflow.config import Recipe
from piflow.inference.settings import BASE_KEY
from piflow.roles.adapter import Adapter, load_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.lora import ranks_of
from piflow.schedule import FewStep
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.foreign import shown

CLOCK_TOLERANCE = 1e-6


def read_start(recipe: Recipe) -> Adapter | None:
    """The adapter that the recipe's student begins as; None: as its teacher.

    Raises:
        ValueError: the recipe distils nothing, or there is no adapter, one of other base weights,
            or one of another head, rank or kind of training than the recipe's.
    """
    place = recipe.training.init_from
    if place is None:
        return None
    objective = recipe.distillation()
    adapter = load_adapter(place)
    _check_base(recipe, adapter, place)
    _check_head(recipe, PolicyClock.of(FewStep.of(objective)), adapter, place)
    _check_lora(recipe, adapter, place)
    return adapter


def check_start(recipe: Recipe, adapter: Adapter, backbone: Backbone) -> None:
    """Refuses an adapter that was made for another architecture than the untouched backbone's.

    Raises:
        ValueError: it was.
    """
    try:
        adapter.check_fits(backbone)
    except ValueError as error:
        raise ValueError(f"training.init_from = {recipe.training.init_from}: {error}") from error


def _check_base(recipe: Recipe, adapter: Adapter, place: str) -> None:
    noted = adapter.metadata.get(BASE_KEY)
    found = None if noted is None else weights_fingerprint(recipe.model.path)
    if noted is not None and found is not None and found != noted:
        raise ValueError(
            f"training.init_from = {place} was made from base weights {shown(noted, 16)}, those in "
            f"model.path = {recipe.model.path} are {found[:16]}: give an adapter of this base"
        )


def _check_head(recipe: Recipe, clock: PolicyClock, adapter: Adapter, place: str) -> None:
    theirs, ours = adapter.config.policy(), recipe.policy
    fields = ["type", "num_gaussians", "logstd_inner_dim", "mode", "num_points"]
    values: dict[str, tuple[Any, Any]] = {
        f"policy.{name}": (getattr(theirs, name, None), getattr(ours, name, None))
        for name in fields
        if hasattr(theirs, name) or hasattr(ours, name)
    }
    other = adapter.config.clock()
    if other is not None:
        values["segment size"] = (other.segment_size, clock.segment_size)
        values["objective.shift"] = (other.shift, clock.shift)
    for name, (had, has) in values.items():
        both = isinstance(had, float) and isinstance(has, float)
        if had != has and not (both and abs(had - has) <= CLOCK_TOLERANCE):
            raise ValueError(
                f"training.init_from = {place} has another head: {name} is {shown(had)} there and "
                f"{has} in the recipe; set it to the same, or leave training.init_from out"
            )


def _check_lora(recipe: Recipe, adapter: Adapter, place: str) -> None:
    if adapter.is_full_model or recipe.lora is None:
        if adapter.is_full_model != (recipe.lora is None):
            have, want = ("all weights", "LoRA") if recipe.lora else ("LoRA", "all weights")
            raise ValueError(
                f"training.init_from = {place} holds {have}, and the recipe trains {want}: set "
                f"lora to {'null' if recipe.lora else 'a section of the same rank'}"
            )
        return
    ranks = Counter(ranks_of(adapter.tensors).values())
    if set(ranks) != {recipe.lora.rank}:
        found = ", ".join(map(str, sorted(ranks))) or "none"
        raise ValueError(
            f"training.init_from = {place} has LoRA of rank {found}, lora.rank is "
            f"{recipe.lora.rank}: set lora.rank to the adapter's, or leave training.init_from out"
        )
