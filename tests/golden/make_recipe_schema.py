"""Writes tests/golden/recipe_schema.json: the schema version and the defaults that belong to it.

To be run where a key was added, or a default changed together with `piflow.config.identity.SCHEMA`:
python -m tests.golden.make_recipe_schema
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from piflow import config
from piflow.config.identity import SCHEMA
from piflow.config.section import OPERATIONAL, Section

GOLDEN = Path(__file__).with_name("recipe_schema.json")
REQUIRED = "(required)"


def schema() -> dict[str, Any]:
    """Version, and section -> key that decides results -> default in JSON."""
    return {"schema": SCHEMA, "defaults": {item.__name__: _defaults(item) for item in sections()}}


def sections() -> list[type[Section]]:
    """All sections of a recipe, variants and our families' encoders too, by their names."""
    exported = (getattr(config, name) for name in config.__all__)
    found = {item for item in exported if isinstance(item, type) and issubclass(item, Section)}
    found -= {config.EncoderConfig, config.TextEncoderConfig}  # what kinds of encoder derive from
    found |= {kind for name in config.BUILT_IN for kind in config.find_family(name).encoders}
    return sorted(found, key=lambda item: item.__name__)


def _defaults(section: type[Section]) -> dict[str, Any]:
    return {
        name: REQUIRED if field.is_required() else _plain(field.get_default())
        for name, field in section.model_fields.items()
        if OPERATIONAL not in field.metadata and name != "schema_version"
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):  # its own keys have their defaults in its own entry
        return type(value).__name__
    return TypeAdapter(type(value)).dump_python(value, mode="json")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(schema(), indent=1) + "\n")
