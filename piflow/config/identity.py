"""What makes two recipes the same run, across versions of piflow.

A run's identity is what its recipe sets to something else than the default, less the keys that are
`Operational`. So a new key changes no identity until somebody sets it. The defaults belong to a
schema version (tests/golden/recipe_schema.json holds them): changing one takes a new `SCHEMA`, and
in `MIGRATIONS` a function that turns an older recipe's tree into one of the next version with the
same meaning, old defaults written out.

Schema 0 is version 0.1.0's: there, an identity was the whole recipe less a list of exceptions.
Until schema 2, LoRA on a bfloat16 base was computed in float32. Until schema 3, a DX policy of mode
`polynomial` was what is `velocity_polynomial` since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from piflow.config.section import OPERATIONAL, RecipeError, Section, Variant

SCHEMA = 3
VERSION_KEY = "schema_version"
SINCE_SCHEMA_0 = frozenset(
    {
        "embed.condition_column",
        "embed.condition_sizes",
        "embed.flip_probability",
        "embed.latent_values",
        "guidance.keep_norm",
        "lora.init",
        "model.base_weights",
        "model.frames",
        "model.lora",
        "objective.substep_rounding",
        "training.init_from",
        "training.optimizer.warmup_start",
    }
)
"""Dotted keys that decide results and that schema 0 didn't have."""
_CLASSES_OF_SCHEMA_0 = "package://pipelines/recipes/imagenet_classes.txt"
_CLASSES = "package://piflow.backbones.dit/imagenet_classes.txt"


def migrate(tree: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """A recipe's tree, or a part of one, of an older schema version, as it is written today.

    Raises:
        RecipeError: the version is newer than this piflow's, or is none.
    """
    if not isinstance(version, int) or isinstance(version, bool):
        raise RecipeError(f"{VERSION_KEY} must be a whole number, got {version!r}")
    if not 0 <= version <= SCHEMA:
        raise RecipeError(
            f"{VERSION_KEY} = {version} isn't known to this piflow, which reads 0 to {SCHEMA}; use "
            "the piflow that wrote it, or a newer one"
        )
    migrated = dict(tree)
    for step in range(version, SCHEMA):
        migrated = MIGRATIONS[step](migrated)
    return migrated


def _from_schema_0(tree: dict[str, Any]) -> dict[str, Any]:
    """The ImageNet classes moved to another package; all defaults are the same."""
    return _with_prompts(tree, _CLASSES_OF_SCHEMA_0, _CLASSES)


def _from_schema_1(tree: dict[str, Any]) -> dict[str, Any]:
    """LoRA computed in float32, which on a float32 base is the default's meaning as well."""
    model, lora = tree.get("model"), tree.get("lora", {})
    if not isinstance(model, dict) or model.get("dtype") != "bfloat16" or lora is None:
        return tree
    return {**tree, "lora": {"compute_dtype": "float32", **lora}}


def _from_schema_2(tree: dict[str, Any]) -> dict[str, Any]:
    """`polynomial` was a polynomial of the velocity; now it is the published one, of x0."""
    return _with_mode(tree, {"polynomial": "velocity_polynomial"})


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    0: _from_schema_0,
    1: _from_schema_1,
    2: _from_schema_2,
}


def deciding_values(section: Section) -> dict[str, Any]:
    """Every key that decides results, with its value in JSON, defaults as well."""
    dumped = section.model_dump(mode="json")
    return {name: _whole(getattr(section, name), dumped[name]) for name in _deciding(type(section))}


def changed_values(section: Section) -> dict[str, Any]:
    """The same without those that are as the schema's defaults have them."""
    dumped, changed = section.model_dump(mode="json"), {}
    for name, field in _deciding(type(section)).items():
        value, default = getattr(section, name), field.get_default()
        if isinstance(value, Section):
            inner = changed_values(value)
            if isinstance(value, Variant) and type(value) is not type(default):
                inner["type"] = value.type
            if inner or default is None:  # a section in place of none is a choice, even by default
                changed[name] = inner
        elif field.is_required() or value != default:
            changed[name] = _whole(value, dumped[name])
    return changed


def hash_of(identity: Mapping[str, Any]) -> str:
    """sha256 (16 hex digits) of an identity, whatever the order of its keys."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def as_in_schema_0(deciding: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """An identity as version 0.1.0 made it, for where only its hash was stored.

    A key that it didn't have is left out only with its default: another value is no run of then.
    LoRA on a bfloat16 base is the exception: it was computed in float32, which is no default now.

    Args:
        deciding: today's `deciding_values`.
        changed: today's `changed_values`.
    """
    set_now = flatten(changed)
    unknown = {
        key
        for key in SINCE_SCHEMA_0
        if not any(name == key or name.startswith(f"{key}.") for name in set_now)
    }
    values = flatten(deciding)
    then = "float32" if values["model.dtype"] == "bfloat16" else "base"
    if values.get("lora.compute_dtype") == then:
        unknown |= {"lora.compute_dtype"}
    names = {"velocity_polynomial": "polynomial", "polynomial": "(not known then)"}
    then_named = _with_mode(deciding, names)
    return _with_prompts(_without(then_named, frozenset(unknown)), _CLASSES, _CLASSES_OF_SCHEMA_0)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two trees, with both values."""
    mine, other = flatten(ours), flatten(theirs)
    return [
        f"{key}: {mine.get(key, '(absent)')!r} here, {other.get(key, '(absent)')!r} there"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _deciding(section: type[Section]) -> dict[str, FieldInfo]:
    fields = section.model_fields
    return {name: field for name, field in fields.items() if OPERATIONAL not in field.metadata}


def _whole(value: Any, dumped: Any) -> Any:
    if isinstance(value, Section):
        return deciding_values(value)
    if isinstance(value, list):
        return [_whole(item, plain) for item, plain in zip(value, dumped, strict=True)]
    return dumped


def _without(tree: dict[str, Any], keys: frozenset[str], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in tree.items()
        if f"{prefix}{name}" not in keys
    }


def _with_prompts(tree: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    embed = tree.get("embed")
    if not isinstance(embed, dict) or embed.get("prompts") != before:
        return tree
    return {**tree, "embed": {**embed, "prompts": after}}


def _with_mode(tree: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """With another name for a DX policy's mode."""
    policy = tree.get("policy")
    if not isinstance(policy, dict) or policy.get("mode") not in names:
        return tree
    return {**tree, "policy": {**policy, "mode": names[policy["mode"]]}}
