"""Whether an object is what its CustomResourceDefinition says, unknown fields refused."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).parent / "schemas"
_FILES = {
    "RayJob": "kuberay-rayjobs",
    "RayCluster": "kuberay-rayclusters",
    "ClusterQueue": "kueue-clusterqueues",
    "LocalQueue": "kueue-localqueues",
    "ResourceFlavor": "kueue-resourceflavors",
    "Topology": "kueue-topologies",
    "WorkloadPriorityClass": "kueue-workloadpriorityclasses",
}
KINDS = frozenset(_FILES)


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object of one of `KINDS`, a line each."""
    validator = _validator(document["kind"], document["apiVersion"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@functools.cache
def _validator(kind: str, api: str) -> Any:
    packed = (SCHEMAS / f"{_FILES[kind]}.crd.json.gz").read_bytes()
    definition = json.loads(gzip.decompress(packed))["spec"]
    versions = {version["name"]: version for version in definition["versions"]}
    group, _, name = api.partition("/")
    assert group == definition["group"] and versions[name]["served"]
    schema = _closed(versions[name]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # core's own
    return jsonschema.Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """An OpenAPI schema as JSON schema that takes no other fields than it names."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    elif isinstance(schema.get("properties"), dict):
        closed["properties"] = {key: _closed(part) for key, part in schema["properties"].items()}
        free = (
            schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        )
        if not free:
            closed["additionalProperties"] = False
    closed.pop("format", None)
    return closed
