"""Recipes from YAML text, with errors that name the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from piflow.config import identity, plain_yaml
from piflow.config.family import encoder_kind, find_family
from piflow.config.model import ModelConfig
from piflow.config.picture_sizes import check_sizes
from piflow.config.recipe import Recipe
from piflow.config.section import RecipeError, Section
from piflow.storage.foreign import redacted, shown

_ITEMS = 8  # of a list that a message shows

_PROBLEMS = 20  # of a recipe that a message tells


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `key.sub=value` overrides, validate.

    Args:
        path: a YAML file.
        overrides: dotted keys with YAML values, e.g. ``training.optimizer.lr=1e-4``.

    Raises:
        RecipeError: the file is missing or isn't a YAML mapping, a key or value is wrong, or the
            model takes no pictures of a size.
    """
    path = Path(path)
    where = redacted(path)
    if path.is_dir():
        raise RecipeError(f"{where} is a folder; name the recipe's YAML file in it")
    if not path.exists():
        raise RecipeError(f"recipe not found: {where}; recipes shipped with piflow: {_shipped()}")
    with path.open("rb") as file:
        tree = plain_yaml.load_mapping(file.read(plain_yaml.MAX_BYTES + 1), where=where)
    for override in overrides or []:
        _apply_override(tree, override)
    recipe = parse_recipe(tree, where)
    check_sizes(recipe)
    return recipe


def parse_recipe(tree: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe's tree of plain values.

    Raises:
        RecipeError: names each wrong key, the value that came and what is allowed.
    """
    version = tree.get(identity.VERSION_KEY, identity.SCHEMA)
    tree = {**identity.migrate(tree, version), identity.VERSION_KEY: identity.SCHEMA}
    tree = _with_defaults(tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        told = [f"  - {_explain(problem, tree)}" for problem in error.errors()[:_PROBLEMS]]
        more = ["  - …"] if error.error_count() > _PROBLEMS else []
        problems = "\n".join(told + more)
        raise RecipeError(f"{source} has {error.error_count()} problem(s):\n{problems}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(
            f"--set expects key=value, got {redacted(override)!r}; example: --set "
            "training.steps=500"
        )
    said = f"--set {redacted(override)}"
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:  # absent, or a section's bare name
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"{said}: {parent!r} is a value, not a section")
    tree[leaf] = plain_yaml.load_value(text, where=f"{said}: the value")


def _explain(problem: Any, tree: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = shown(".".join(part for part in location if part not in _VARIANTS) or "(whole recipe)")
    if problem["type"] == "extra_forbidden":
        section = _section(location[:-1], tree)
        allowed = ", ".join(section.model_fields)
        near = difflib.get_close_matches(location[-1], section.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}{hint}; allowed here: {allowed}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return (
            f"{key}.type: expected one of {context['expected_tags']}; got {_shown(context['tag'])}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    if not isinstance(problem["input"], dict):
        message = f"{message}; got {_shown(problem['input'])}"
    if problem["type"] == "bool_type":
        message = f"{message}; write true or false"
    return f"{key}: {message}"


def _shown(value: Any) -> str:
    """A value of a recipe as a message may show it: cut, escaped, without a URI's secrets."""
    if isinstance(value, str):
        return repr(redacted(value))
    if isinstance(value, dict):
        return f"a section of {len(value)} keys"
    if not isinstance(value, list | tuple):
        return shown(repr(value))
    items = [
        f"a list of {len(item)}" if isinstance(item, list) else _shown(item)
        for item in value[:_ITEMS]
    ]
    items += ["…"] if len(value) > _ITEMS else []
    return shown(f"[{', '.join(items)}]", 500)


def _variants() -> dict[str, type[Section]]:
    """A union's tags, which stand in an error's place after the union's key, and their classes."""
    members = [get_args(field.annotation) for field in Recipe.model_fields.values()]
    kinds = [get_args(member)[0] for member in chain(*members) if get_origin(member) is Annotated]
    return {kind.model_fields["type"].default: kind for kind in kinds}


_VARIANTS = _variants()


def _section(location: list[str], tree: dict[str, Any]) -> type[BaseModel]:
    """The section at `location`, whose class may depend on what the recipe says there."""
    section: Any = Recipe
    for part in location:
        if part in _VARIANTS:
            section = _VARIANTS[part]
        elif section is Recipe and part == "encoder":
            section = encoder_kind(tree[part], _family(tree))
        elif not part.isdigit():  # a number is a place in a list
            annotation = section.model_fields[part].annotation
            members = [item for item in get_args(annotation) if item is not type(None)]
            section = members[0] if members else annotation  # of a list or an optional section
    return section


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """What the recipe leaves out, as its family has it."""
    family = _family(tree)
    return tree if family is None else _filled(tree, find_family(family).defaults)


def _filled(tree: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults under a tree; those of another variant than the tree's don't count."""
    filled = {**defaults, **tree}
    for key, default in defaults.items():
        section = filled[key]
        if isinstance(section, dict) and isinstance(default, Mapping):
            other = section.get("type", default.get("type")) != default.get("type")
            filled[key] = section if other and "type" in default else _filled(section, default)
    return filled


def _family(tree: dict[str, Any]) -> str | None:
    """The family that a recipe's tree names, if there is such a one."""
    model = tree.get("model")
    name = model.get("family", _FAMILY) if isinstance(model, dict) else None
    try:
        return name if isinstance(name, str) and find_family(name) else None
    except ValueError:
        return None


_FAMILY = ModelConfig.model_fields["family"].default


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the checkout, or where the wheel was installed."""
    checkout = Path(__file__).parents[2] / "pipelines" / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "piflow" / "recipes"
    return checkout if checkout.is_dir() else installed


def _shipped() -> str:
    folder = recipes_folder()
    return ", ".join(sorted(str(item) for item in folder.glob("*.yaml"))) or "none"
