"""How prompts are laid out in a store's shards and row groups, before anything is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate, pairwise

from piflow.config import Recipe
from piflow.data.manifest import (
    EMPTY_PROMPT,
    SCHEMA_VERSION,
    Bucket,
    RowGroup,
    StoreInputs,
    require_same_inputs,
    shard_name,
)
from piflow.data.prompts import Prompt, PromptSet, read_prompts
from piflow.storage.fingerprint import EncoderIdentity


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one file: prompts, and rows of each row group in order."""

    path: str
    prompts: tuple[Prompt, ...]
    row_groups: tuple[RowGroup, ...]

    def prompts_by_group(self) -> list[tuple[Prompt, ...]]:
        """The prompts of each row group."""
        ends = list(accumulate(group.rows for group in self.row_groups))
        return [self.prompts[start:end] for start, end in pairwise([0, *ends])]

    def without(self, rows: AbstractSet[int]) -> ShardPlan:
        """The same file less these rows; row groups shrink, and those left empty are gone."""
        prompts = [prompt for row, prompt in enumerate(self.prompts) if row not in rows]
        groups, start = [], 0
        for group in self.row_groups:
            end = start + group.rows
            left = group.rows - sum(start <= row < end for row in rows)
            if left:
                groups.append(group.model_copy(update={"rows": left}))
            start = end
        return ShardPlan(self.path, tuple(prompts), tuple(groups))


def plan_store(
    prompts: Sequence[Prompt], rows_per_shard: int, rows_per_group: int
) -> tuple[tuple[Bucket, ...], list[ShardPlan]]:
    """Lay prompts out in shards and row groups.

    Buckets come in order of first appearance, prompts within a bucket in their given order; a row
    group ends where its bucket or its shard ends.
    """
    by_size: dict[tuple[int, int, tuple[int, int] | None], list[Prompt]] = {}
    for prompt in prompts:
        key = (prompt.height, prompt.width, prompt.condition_size)
        by_size.setdefault(key, []).append(prompt)
    buckets = tuple(
        Bucket(height=height, width=width, rows=len(members), condition_size=condition)
        for (height, width, condition), members in by_size.items()
    )
    rows = [(b, prompt) for b, members in enumerate(by_size.values()) for prompt in members]
    shards = []
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        part = rows[start : start + rows_per_shard]
        groups = _row_groups([bucket for bucket, _ in part], rows_per_group)
        shards.append(ShardPlan(shard_name(number), tuple(prompt for _, prompt in part), groups))
    return buckets, shards


def _row_groups(buckets: list[int], rows_per_group: int) -> tuple[RowGroup, ...]:
    groups: list[RowGroup] = []
    start = 0
    for end in range(1, len(buckets) + 1):
        full = end - start == rows_per_group
        if end == len(buckets) or full or buckets[end] != buckets[start]:
            groups.append(RowGroup(rows=end - start, bucket=buckets[start]))
            start = end
    return tuple(groups)


def empty_prompt_plan() -> ShardPlan:
    """The file of the empty prompt; it stands for every picture size, so its own is 0 x 0."""
    return ShardPlan(EMPTY_PROMPT, (Prompt("", 0, 0),), (RowGroup(rows=1, bucket=0),))


def negative_prompt_plan(text: str) -> ShardPlan:
    """The file of a negative prompt, named by its text; for every picture size, so 0 x 0."""
    prompt = Prompt(text, 0, 0)
    path = f"negative-prompt-{prompt.prompt_id}.parquet"
    return ShardPlan(path, (prompt,), (RowGroup(rows=1, bucket=0),))


@dataclass(frozen=True)
class Layout:
    """What a store of a recipe's prompts holds, before anything is encoded."""

    inputs: StoreInputs
    buckets: tuple[Bucket, ...]
    shards: list[ShardPlan]

    @property
    def num_rows(self) -> int:
        """Prompts, the empty and the negative ones not counted."""
        return self.inputs.num_prompts


def recipe_prompts(recipe: Recipe) -> PromptSet:
    """The recipe's distinct prompts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_prompts`.
    """
    embed = recipe.embed
    return read_prompts(
        embed.prompts,
        column=embed.prompt_column,
        height=embed.height,
        width=embed.width,
        height_column=embed.height_column,
        width_column=embed.width_column,
        image_column=embed.image_column,
        condition_column=embed.condition_column,
        allow_uris=embed.allow_uris,
        max_prompts=embed.max_prompts,
        buckets=embed.buckets,
        seed=embed.seed,
    )


def store_layout(recipe: Recipe, prompts: PromptSet, encoder: EncoderIdentity) -> Layout:
    """Lay the prompts out in shards and row groups."""
    embed = recipe.embed
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=encoder,
        dtype=embed.dtype,
        rows_per_shard=embed.rows_per_shard,
        rows_per_group=embed.rows_per_group,
        num_prompts=len(prompts.prompts),
        prompts_sha256=prompts.digest,
    )
    buckets, shards = plan_store(prompts.prompts, embed.rows_per_shard, embed.rows_per_group)
    return Layout(inputs, buckets, shards)


def require_recipes_prompts(recipe: Recipe, store: str, found: StoreInputs) -> None:
    """Check that a store holds the recipe's prompts, in the recipe's number format and layout.

    Where the prompts can't be found any more, that is said, and the store is taken as it is.

    Args:
        recipe: with `embed.mode` = store.
        store: the store's URI.
        found: what it was made from.

    Raises:
        StoreError: it was made from others; names what differs.
        ValueError: the prompts can't be read.
    """
    try:
        prompts = recipe_prompts(recipe)
    except FileNotFoundError:
        print(
            f"the recipe's prompts {recipe.embed.prompts} are not there to be compared with "
            f"embedding store {store}: its {found.num_prompts} prompts are taken as they are"
        )
        return
    ours = store_layout(recipe, prompts, found.encoder).inputs  # encoder and VAE: by their own
    same = {
        "schema_version": found.schema_version,
        "latents": found.latents,
        "conditions": found.conditions,
        "negative_prompt": found.negative_prompt,
    }
    require_same_inputs(store, found, ours.model_copy(update=same))
