"""What tells a model's weights from others without reading them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from piflow.storage.fingerprint import weights_fingerprint


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large.weight": torch.randn(300, 300, generator=generator),
        "small.bias": torch.randn(3, generator=generator),
        "empty": torch.empty(0),
    }


def fingerprint(folder: Path, *files: dict[str, Tensor]) -> str | None:
    folder.mkdir()
    for number, file in enumerate(files):
        save_file(file, folder / f"model-{number}.safetensors", metadata={"n": str(number)})
    return weights_fingerprint(str(folder))


def test_the_same_weights_in_other_files(tmp_path: Path) -> None:
    whole = tensors()
    first = {"small.bias": whole["small.bias"]}
    rest = {name: tensor for name, tensor in whole.items() if name not in first}
    found = fingerprint(tmp_path / "a", whole)
    assert found is not None and len(found) == 64
    assert fingerprint(tmp_path / "b", rest, first) == found
    (tmp_path / "b/config.json").write_text(json.dumps({"any": 1}))
    assert weights_fingerprint(f"file://{tmp_path / 'b'}") == found


@pytest.mark.parametrize("place", [0, 45_000, 89_999])
def test_values_at_start_middle_and_end_count(place: int, tmp_path: Path) -> None:
    changed = tensors()
    changed["large.weight"].view(-1)[place] += 1
    assert fingerprint(tmp_path / "a", tensors()) != fingerprint(tmp_path / "b", changed)


def test_names_dtypes_and_shapes_count(tmp_path: Path) -> None:
    whole = tensors()
    large = whole["large.weight"]
    others = [
        {**whole, "small.bias": whole["small.bias"].view(torch.int32)},
        {**whole, "large.weight": large.view(100, 900)},
        {"big.weight" if name == "large.weight" else name: t for name, t in whole.items()},
        {name: tensor for name, tensor in whole.items() if name != "empty"},
    ]
    found = [fingerprint(tmp_path / str(n), other) for n, other in enumerate([whole, *others])]
    assert len(set(found)) == len(found)


def test_places_without_weights(tmp_path: Path) -> None:
    assert weights_fingerprint(str(tmp_path)) is None
    assert weights_fingerprint("hf://owner/name/transformer") is None
