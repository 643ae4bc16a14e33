"""No source of the project turns bytes from a storage into code: read as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OURS = [
    path
    for folder in ("piflow", "tests", "benchmarks", "pipelines", "scripts", "docs")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]
PRODUCT = [path for path in OURS if not path.is_relative_to(REPOSITORY / "tests")]

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN = {
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
    "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader", "yaml.CLoader", "yaml.CFullLoader",
    "yaml.CUnsafeLoader", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "ray.cloudpickle", "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip
KEYWORDS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True}
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
READERS = {"dcp.load": "storage_reader", "dcp.save": "storage_writer"}  # ours, without pickles


def faults(tree: ast.AST, *, product: bool) -> Iterator[str]:
    """What of a file could run what it reads, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {text}" for text in _of_call(node, product))
        if product and isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                if UNPICKLERS & set(name.split(".")):
                    yield f"line {node.lineno}: import of {name}"


def _of_call(node: ast.Call, product: bool) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    values = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    for key, bad in KEYWORDS.items():
        if key in values and values[key] is bad:
            yield f"{name} with {key}={bad}"
    if name in NEEDED:
        key, value = NEEDED[name]
        if values.get(key) is not value:
            yield f"{name} without {key}={value}"
    if name == "yaml.load" and "Loader" not in given:
        yield "yaml.load without a loader"
    if product and name in ("eval", "exec"):
        yield name
    if product and name in READERS and READERS[name] not in given:
        yield f"{name} without {READERS[name]}"


def test_all_files_are_looked_at() -> None:
    assert len(PRODUCT) > 150 and len(OURS) > 300


@pytest.mark.parametrize("folder", ["piflow", "tests", "benchmarks", "pipelines"])
def test_no_source_runs_what_it_reads(folder: str) -> None:
    found = {
        str(path.relative_to(REPOSITORY)): problems
        for path in OURS
        if path.is_relative_to(REPOSITORY / folder)
        and (problems := list(faults(ast.parse(path.read_bytes()), product=path in PRODUCT)))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load with weights_only=False"),
        ("torch.load(path, weights_only=safe)", "torch.load without weights_only=True"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("numpy.load(path, allow_pickle=True)", "numpy.load with allow_pickle=True"),
        ("import pickle", "import of pickle"),
        ("from ray import cloudpickle", "import of ray.cloudpickle"),
        ("from pickle import loads", "import of pickle.loads"),
        ("ray.cloudpickle.loads(content)", "ray.cloudpickle"),
        ("yaml.load(text)", "yaml.load without a loader"),
        ("yaml.load(text, Loader=yaml.UnsafeLoader)", "yaml.UnsafeLoader"),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("dcp.load(tree, checkpoint_id=folder)", "dcp.load without storage_reader"),
        ("eval(text)", "eval"),
    ],
)
def test_what_is_planted_is_found(planted: str, fault: str) -> None:
    assert any(fault in found for found in faults(ast.parse(planted), product=True))


@pytest.mark.parametrize(
    "good",
    ["torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "model.eval()",
     "yaml.safe_load(text)", "yaml.load(text, Loader=Strict)", "import pickletools"],
)  # fmt: skip
def test_what_is_safe_passes(good: str) -> None:
    assert list(faults(ast.parse(good), product=True)) == []
