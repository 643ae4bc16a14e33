"""Which prompts an evaluation takes."""

from __future__ import annotations

import pyarrow as pa

from piflow.config import Recipe
from piflow.data.prompt_rows import text_lines
from piflow.storage.foreign import shown


def listed_prompts(uri: str) -> list[str]:
    """The prompts of a text file, one a line; blank lines are left out.

    Raises:
        OSError: there is no such file, or the storage refused.
        ValueError: it isn't UTF-8 text; names the line.
    """
    texts = (text.strip() for _, text in text_lines(uri))
    return [text for text in texts if text]


def evaluation_rows(recipe: Recipe, index: pa.Table) -> list[int]:
    """Row numbers of the evaluation prompts: evenly spaced over the list, or the smallest ids.

    Args:
        index: the store's.

    Raises:
        ValueError: the list or the store holds fewer prompts, or the store lacks one of them.
        OSError: the list can't be read.
    """
    config = recipe.evaluation
    spacing = 1.0
    if config.prompt_list is None:
        wanted = sorted(index["prompt_id"].to_pylist())
        column = "prompt_id"
    else:
        wanted = listed_prompts(config.prompt_list)
        column = "prompt"
        spacing = len(wanted) / config.prompts
    if len(wanted) < config.prompts:
        raise ValueError(
            f"evaluation.prompts asks for {config.prompts} prompts, "
            f"{config.prompt_list or recipe.embed.store} holds {len(wanted)}; ask for fewer"
        )
    position = dict(zip(index[column].to_pylist(), index["row"].to_pylist(), strict=True))
    chosen = [wanted[int(number * spacing)] for number in range(config.prompts)]
    missing = [name for name in chosen if name not in position]
    if missing:
        raise ValueError(
            f"store {recipe.embed.store} lacks the evaluation prompt {shown(repr(missing[0]))} and "
            f"{len(missing) - 1} more; embed them, or set another evaluation.prompt_list"
        )
    return [position[name] for name in chosen]
