"""The committed file for Google Cloud against Compute Engine's own description of its interface."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster" / "gcp" / "cluster.yaml"
TYPES: dict[str, Any] = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Of compute.v1, as google-api-python-client brings them."""
    documents = resources.files("googleapiclient") / "discovery_cache" / "documents"
    return json.loads((documents / "compute.v1.json").read_text())["schemas"]


def problems(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str) -> list[str]:
    """What the interface would refuse: unknown keys, other types, other words."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"]]
    if schema.get("type") == "array":
        entries = value if isinstance(value, list) else [value]
        return [
            found
            for number, entry in enumerate(entries)
            for found in problems(entry, schema["items"], schemas, f"{path}[{number}]")
        ]
    if schema.get("type") == "object":
        if isinstance(value, list) and len(value) == 1:
            (value,) = value  # Ray's own files write `scheduling` as a list of one
        if not isinstance(value, dict):
            return [f"{path}: expected an object"]
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        found = []
        for key, inner in value.items():
            wanted = known.get(key, rest)
            if wanted is None:
                found.append(f"{path}.{key}: unknown")
            else:
                found += problems(inner, wanted, schemas, f"{path}.{key}")
        return found
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is none of {schema['enum']}"]
    wanted = TYPES.get(schema.get("type", ""), object)
    by_number = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
    return [] if isinstance(value, wanted) or by_number else [f"{path}: {value!r}"]


def node_configs() -> dict[str, Any]:
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    return {name: kind["node_config"] for name, kind in types.items()}


@pytest.mark.parametrize("kind", sorted(node_configs()))
def test_machines_are_what_compute_engine_takes(kind: str, schemas: dict[str, Any]) -> None:
    assert problems(node_configs()[kind], {"$ref": "Instance"}, schemas, kind) == []


def test_planted_mistakes_are_found(schemas: dict[str, Any]) -> None:
    planted = copy.deepcopy(node_configs()["cpu"])
    planted["machineTyp"] = planted.pop("machineType")
    planted["scheduling"][0]["provisioningModel"] = "CHEAP"
    planted["disks"][0]["boot"] = "yes"
    found = problems(planted, {"$ref": "Instance"}, schemas, "cpu")
    assert [line.split(":")[0] for line in sorted(found)] == [
        "cpu.disks[0].boot",
        "cpu.machineTyp",
        "cpu.scheduling.provisioningModel",
    ]


def test_the_image_has_what_rays_provider_imports() -> None:
    """The Dockerfile installs the extra `gcp`, and Ray's modules can be imported with it."""
    dockerfile = (CLUSTER.parents[2] / "infra" / "Dockerfile").read_text()
    assert ".[cluster,gcp,mlflow,s3,lowbit]" in dockerfile
    from ray.autoscaler._private.gcp import config, node_provider

    assert config.bootstrap_gcp and node_provider.GCPNodeProvider
