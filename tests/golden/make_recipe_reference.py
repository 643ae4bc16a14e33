"""Writes docs/recipe-reference.md: every key of a recipe, from the classes that read it.

To be run where a key was added or its docstring changed:
python -m tests.golden.make_recipe_reference
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from piflow.config import Recipe
from piflow.config.section import OPERATIONAL, Section
from tests.golden.make_recipe_schema import sections

PAGE = Path(__file__).parents[2] / "docs" / "recipe-reference.md"
_HEAD = """# Every key of a recipe

Generated from `piflow/config/` by `python -m tests.golden.make_recipe_reference`; a test keeps it
current. `piflow recipe RECIPE` prints a recipe with every default filled in.

A key marked *where*, and every key of a section that is marked so, says where, how fast or how
long a run goes: it may change from one start of a run to the next. All others decide what comes
out, and a run goes on only with the same ones.
"""
_BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))


def page() -> str:
    """The whole page, Markdown."""
    others = [item for item in sections() if item is not Recipe]
    return "\n".join([_HEAD, *(_of(item) for item in (Recipe, *others))])


def _of(section: type[Section]) -> str:
    title = "The recipe" if section is Recipe else section.__name__.removesuffix("Config")
    told = " ".join((section.__doc__ or "").split())
    lines = [
        f"## {title}",
        "",
        told,
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines + [_row(*item) for item in section.model_fields.items()]) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    if OPERATIONAL in field.metadata:
        meaning = f"*where.* {meaning}"
    cells = (f"`{name}`", _kind(field.annotation, field.metadata), _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, Section):
        return _link(type(value))
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def _link(section: type[Section]) -> str:
    name = section.__name__.removesuffix("Config")
    return f"[{name}](#{name.lower()})"


def _kind(kind: Any, metadata: Any = ()) -> str:
    """A type in words, with its bounds."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *notes = get_args(kind)
        return _kind(inner, notes)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(item) for item in get_args(kind))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(item)}`" for item in get_args(kind))
    if origin in (list, tuple):
        return f"list of {_kind(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return _link(kind) if kind in sections() else "section"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return f"{names.get(kind, 'null' if kind is type(None) else str(kind))}{_bounds(metadata)}"


def _bounds(metadata: Any) -> str:
    notes = [note for item in metadata for note in getattr(item, "metadata", [item])]
    said = [
        f"{sign} {_number(getattr(note, attribute))}"
        for note in notes
        for kind, attribute, sign in _BOUNDS
        if isinstance(note, kind)
    ]
    said += [f"at least {note.min_length} long" for note in notes if isinstance(note, MinLen)]
    said += [f"at most {note.max_length} long" for note in notes if isinstance(note, MaxLen)]
    return f" {', '.join(said)}" if said else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(page())
