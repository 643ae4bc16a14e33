"""A set of prompts for an evaluation, wherever it lies, and the small store that it is read from.

    .txt  .csv  .jsonl  .parquet  (all also packed, .gz)     as prompts to embed
    .json    ["…", …]    [{"prompt": "…"}, …]    {"category": ["…", …], …}
             {"annotations": [{"image_id": 1, "caption": "…"}, …]}    COCO: one caption a picture

The store that training reads needn't hold these prompts: they are embedded into one of their own in
the evaluation's folder, by the recipe's encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from piflow import storage
from piflow.config import PromptSetConfig, Recipe
from piflow.data.prompt_rows import MAX_PROMPT_BYTES, Columns, read_rows
from piflow.data.prompts import FORMATS, PromptSet
from piflow.storage.foreign import ForeignDataError, parse_json, redacted, shown

MAX_SET_BYTES = 2**29
"""Of a JSON file, which is parsed whole; COCO's captions of 2014 are 66 MB."""

MAX_PROMPTS = 1_000_000

_Pair = tuple[Any, Any]  # text and category


@dataclass(frozen=True)
class ListedPrompts:
    """Distinct prompts in the file's order, each with its category; None: the set has none."""

    prompts: tuple[str, ...]
    categories: tuple[str, ...] | None


class _SetColumns(Columns):
    def key_of(self, name: str) -> str:
        own = "column" if name == self.text else "category_column"
        return f"evaluation.prompt_set.{own}"


def read_prompt_set(config: PromptSetConfig, count: int) -> ListedPrompts:
    """`count` prompts of the set, evenly spaced over it.

    Raises:
        ValueError: another file than the recipe's hash says, another format, no such column, a
            blank or too long prompt, or fewer prompts; names the file and where in it.
        OSError: it can't be read.
    """
    where = f"evaluation.prompt_set.path = {redacted(config.path)}"
    if config.sha256 is not None:
        found = storage.sha256(config.path)
        if found != config.sha256:
            raise ValueError(
                f"{where} has the sha256 {found}, and the recipe's is {config.sha256}: it is "
                "another set of prompts; copy the file again, or write the hash of the one that "
                "you mean"
            )
    pairs: dict[str, str] = {}
    for number, (value, category) in enumerate(_pairs(config, where), 1):
        text = _text(value, f"{where}, prompt {number}")
        pairs.setdefault(text, "" if category is None else str(category)[:200])
        if number > MAX_PROMPTS:
            raise ValueError(f"{where} holds more than {MAX_PROMPTS} prompts; give a part of it")
    if len(pairs) < count:
        raise ValueError(
            f"evaluation.prompts asks for {count} prompts, {where} holds {len(pairs)} that differ; "
            "ask for fewer"
        )
    texts = list(pairs)
    chosen = [texts[int(number * len(texts) / count)] for number in range(count)]
    categories = tuple(pairs[text] for text in chosen)
    return ListedPrompts(tuple(chosen), categories if any(categories) else None)


def _pairs(config: PromptSetConfig, where: str) -> Iterator[_Pair]:
    suffix = storage.suffix(config.path)
    if suffix == ".json":
        content = storage.read_bytes(config.path, max_bytes=MAX_SET_BYTES)
        yield from _of_json(parse_json(content, where=where), config, where)
    elif suffix in FORMATS:
        columns = _SetColumns(config.column, config.category_column, None, None)
        yield from ((row.text, row.height) for row in read_rows(config.path, columns))
    else:
        raise ValueError(f"{where}: expected a file ending in .json, {', '.join(FORMATS)}")


def _of_json(tree: Any, config: PromptSetConfig, where: str) -> Iterator[_Pair]:
    if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
        yield from _captions(tree["annotations"], where)
    elif isinstance(tree, dict):
        for category, texts in tree.items():
            if not isinstance(texts, list):
                raise ForeignDataError(
                    f"{where}: {shown(repr(category))} is no list; expected a list of prompts, or "
                    "of each category one"
                )
            yield from ((text, category) for text in texts)
    elif isinstance(tree, list):
        for entry in tree:
            if isinstance(entry, dict):
                category = entry.get(config.category_column) if config.category_column else None
                yield entry.get(config.column), category
            else:
                yield entry, None
    else:
        raise ForeignDataError(f"{where}: expected a list of prompts, or of each category one")


def _captions(annotations: Iterable[Any], where: str) -> Iterator[_Pair]:
    seen = set()
    for entry in annotations:
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            raise ForeignDataError(
                f'{where}: expected annotations like {{"image_id": 1, "caption": "…"}}'
            )
        if entry["image_id"] not in seen:
            seen.add(entry["image_id"])
            yield entry.get("caption"), None


def _text(value: Any, where: str) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not text or "\0" in text or len(text.encode()) > MAX_PROMPT_BYTES:
        raise ForeignDataError(
            f"{where} is {shown(repr(value), 60)}; expected a text of 1 to {MAX_PROMPT_BYTES} bytes"
        )
    return text


def set_recipe(recipe: Recipe, prompts: PromptSet, folder: str, kind: str) -> tuple[Recipe, bytes]:
    """The recipe of a small store of these prompts, and the content of its prompts' file.

    Args:
        folder: URI; the store's own folder in it is named by its kind and the prompts.
    """
    store = storage.join(folder, f"{kind}-{prompts.digest[:12]}")
    changes: dict[str, Any] = {
        "mode": "store",
        "store": store,
        "prompts": storage.join(store, "prompts.jsonl"),
        "prompt_column": "prompt",
        "height_column": "height",
        "width_column": "width",
        "image_column": None,
        "buckets": [],
    }
    lines = [
        json.dumps({"prompt": prompt.text, "height": prompt.height, "width": prompt.width})
        for prompt in prompts.prompts
    ]
    embed = recipe.embed.model_copy(update=changes)
    return recipe.model_copy(update={"embed": embed}), ("\n".join(lines) + "\n").encode()
