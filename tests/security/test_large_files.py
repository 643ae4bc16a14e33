"""Files that claim terabytes: whatever piflow reads whole has a limit, and says it."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from piflow import storage
from piflow.backbones.text import read_config
from piflow.config import parse_recipe
from piflow.data.manifest import read_inputs, read_manifest
from piflow.evaluation.comparison import read_student
from piflow.evaluation.drawing import read_picture
from piflow.inference.gallery import Gallery
from piflow.roles.adapter import load_adapter
from piflow.runs import folder as run_folder
from piflow.runs.lease import require_owner
from piflow.storage.model_folder import check_model_folder
from piflow.training.checkpoint import DamagedCheckpointError, load_state, read_state
from piflow.training.checkpoint_layout import read_layout

TERABYTE = 2**40
SOURCES = Path(storage.__file__).parents[1]
OF_OUR_OWN = {  # files of piflow itself, of the kernel, or that the user's command line names
    "cli.py": 1,  # the recipe that was just read
    "commands/push.py": 1,  # its size is limited before
    "evaluation/report.py": 1,  # a template of the package
    "jobs/package.py": 1,  # its sizes are limited before
    "jobs/render.py": 1,
    "planning/hardware.py": 1,
    "planning/report.py": 1,
    "runs/lease.py": 2,  # of /proc
    "runtime/spot.py": 1,  # of /proc
}


def sparse(path: Path) -> Path:
    """A file of a terabyte that takes no disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, TERABYTE)
    return path


def record(folder: Path) -> Any:
    tree = {
        "name": "test",
        "run_dir": str(folder),
        "model": {"path": "teacher"},
        "encoder": {"path": "encoder"},
        "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
    }
    return run_folder.require_same_recipe(parse_recipe(tree))


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("run.json", record),
        ("state.json", load_state),
        ("state.json", lambda folder: read_state(str(folder))),
        ("metadata.json", lambda folder: read_layout(folder, {"metadata.json": TERABYTE})),
        (".metadata", lambda folder: read_layout(folder, {".metadata": TERABYTE})),
        ("driver.json", lambda folder: require_owner(str(folder), "process")),
        ("config.json", lambda folder: read_config(folder, "encoder")),
        ("config.json", lambda folder: check_model_folder(str(folder), "model")),
        ("model.safetensors.index.json", lambda folder: check_model_folder(str(folder), "model")),
        ("manifest.json", lambda folder: read_manifest(str(folder))),
        ("job.json", lambda folder: read_inputs(str(folder / "job.json"))),
        ("index.jsonl", lambda folder: Gallery(str(folder), {})),
        ("picture.png", lambda folder: read_picture(str(folder / "picture.png"))),
        ("figures/step_1.json", lambda folder: read_student(str(folder))),
    ],
)
def test_a_file_that_claims_a_terabyte_is_refused_with_its_limit(
    file: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Nothing of it is read: no machine has the memory."""
    sparse(tmp_path / file)
    with pytest.raises(ValueError, match=f"has {TERABYTE} bytes; at most [0-9]+ are read"):
        read(tmp_path)


def test_an_adapters_configuration_is_limited_too(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
    sparse(tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"has {TERABYTE} bytes; at most"):
        load_adapter(tmp_path)


def test_weights_that_are_honest_about_a_terabyte_are_not_read_whole(tmp_path: Path) -> None:
    header = f'{{"a":{{"dtype":"U8","shape":[{TERABYTE}],"data_offsets":[0,{TERABYTE}]}}}}'.encode()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + TERABYTE)
    config = '{"_class_name": "GMFluxTransformer2DModel", "in_channels": 4, "out_channels": 4, '
    (tmp_path / "config.json").write_text(config + '"num_gaussians": 8, "logstd_inner_dim": 64}')
    with pytest.raises(ValueError, match=r"at most 137438953472 are read"):
        load_adapter(tmp_path)


def test_a_checkpoint_with_such_a_state_is_damaged_and_an_earlier_one_is_used(
    tmp_path: Path,
) -> None:
    sparse(tmp_path / "checkpoints" / "step_00000002" / "state.json")
    assert run_folder.checkpoints(str(tmp_path)) == {}
    with pytest.raises(DamagedCheckpointError, match=f"{TERABYTE} bytes"):
        read_state(run_folder.sealed_checkpoints(str(tmp_path))[2])


def test_whoever_reads_a_file_whole_limits_it() -> None:
    """`storage.read_bytes` has a limit always; foreign files are read in no other way."""
    found: dict[str, int] = {}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = str(path.relative_to(SOURCES))
            if isinstance(node, ast.Call) and _is_unlimited(node):
                found[name] = found.get(name, 0) + 1
    assert found == OF_OUR_OWN


@pytest.mark.parametrize(
    ("text", "unlimited"),
    [
        ("path.read_bytes()", True),
        ("(folder / name).read_text()", True),
        ('storage.read_bytes(f"{folder}/x")', False),
        ("read_bytes(uri, max_bytes=4096)", False),
    ],
)
def test_what_is_planted_is_told_from_what_is_safe(text: str, unlimited: bool) -> None:
    (node,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and not n.keywords
               and isinstance(n.func, ast.Attribute)] or [None]  # fmt: skip
    assert (node is not None and _is_unlimited(node)) == unlimited


def _is_unlimited(node: ast.Call) -> bool:
    return (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_bytes", "read_text")
        and ast.unparse(node.func.value) != "storage"
    )
