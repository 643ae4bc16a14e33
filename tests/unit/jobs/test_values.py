"""Values: every mistake is one line that says what would be right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow.jobs.values import Values, ValuesError, load_values, parse_values

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "cluster" / "values.yaml"


@pytest.fixture
def tree() -> dict[str, Any]:
    return yaml.safe_load(EXAMPLE.read_text())


def set_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    *parents, leaf = key.split(".")
    section = tree
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    return tree


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("image", "registry/piflow:latest", "@sha256:"),
        ("image", "registry/piflow@sha256:123", "@sha256:"),
        ("ray_version", "latest", "ray_version"),
        ("run_name", "My_Run", "run_name"),
        ("environment", {"HF_TOKEN": "hf_x"}, "HF_TOKEN looks like a secret"),
        ("environment", {"aws_secret_access_key": "x"}, "looks like a secret"),
        ("environment", {"A B": "x"}, "no name of an environment variable"),
        ("head.cpus", "4", "head.cpus"),
        ("head.cpus", 0, "head.cpus"),
        ("head.cores", 4, "unknown key 'head.cores'"),
        ("limits.hours", -1, "limits.hours"),
        ("kubernetes.egress", [{"cidr": "10.0.0.0", "port": 80}], "kubernetes.egress.0.cidr"),
        ("kubernetes.spot.notice_seconds", 90, "leave spot out"),
        ("kubernetes.namespace", "a/b", "kubernetes.namespace"),
    ],
)
def test_a_wrong_value_names_its_key(tree: dict[str, Any], key: str, value: Any, told: str) -> None:
    with pytest.raises(ValuesError) as error:
        parse_values(set_key(tree, key, value), "v.yaml")
    assert told in str(error.value) and "v.yaml" in str(error.value)


def test_a_refused_secret_is_not_repeated(tree: dict[str, Any]) -> None:
    with pytest.raises(ValuesError) as error:
        parse_values(set_key(tree, "environment", {"API_KEY": "s3cret-value"}))
    assert "s3cret-value" not in str(error.value)


def test_files_that_hold_no_values(tmp_path: Path) -> None:
    with pytest.raises(ValuesError, match="not found"):
        load_values(tmp_path / "absent.yaml")
    for text, told in [("- a\n", "mapping"), ("a: [", "not valid YAML"), ("", "mapping")]:
        (tmp_path / "v.yaml").write_text(text)
        with pytest.raises(ValuesError, match=told):
            load_values(tmp_path / "v.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes: 1\nnodes: 2\n", "key 'nodes' stands twice, also in line 1"),
        ("a: &a [x, x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(3)), "unknown key"),
        ("a: &a0 [x, x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)),
         "more than 10000 values"),
        ("a: " + "[" * 500 + "]" * 500, "more than 32 levels"),
        ("a: !!python/name:os.system\n", "not valid YAML"),
        ("#" * 300_000, "more than 262144 bytes"),
        ("a: \xff", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_values_file_is_read_as_a_recipe_is(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValuesError, match=told):
        load_values(tmp_path / "v.yaml")


def test_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """YAML 1.1 would take 010 for 8 and 1:30 for 90, and no for false."""
    text = EXAMPLE.read_text()
    (tmp_path / "v.yaml").write_text(
        text.replace("  cpus: 4\n", "  cpus: 010\n").replace(
            "environment:", "environment:\n  A: no"
        )
    )
    found = load_values(tmp_path / "v.yaml")
    assert found.head.cpus == 10 and found.environment["A"] == "no"
    (tmp_path / "v.yaml").write_text(text.replace("  cpus: 4\n", "  cpus: 1:30\n"))
    with pytest.raises(ValuesError, match="head.cpus"):
        load_values(tmp_path / "v.yaml")


def test_every_key_says_what_it_means() -> None:
    def undocumented(section: Any, name: str = "") -> list[str]:
        missing = []
        for key, field in section.model_fields.items():
            inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
            sections = [kind for kind in inner if hasattr(kind, "model_fields")]
            for kind in sections:
                assert kind.__doc__
                missing += undocumented(kind, f"{name}{key}.")
            if not sections and not field.description and section.__name__ != "Toleration":
                missing.append(f"{name}{key}")
        return missing

    assert undocumented(Values) == []


def test_the_examples_ray_is_the_one_that_tests_run() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={load_values(EXAMPLE).ray_version}" in pins
