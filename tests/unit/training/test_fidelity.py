"""The figure of an exported student is what its velocities say, and no model is held for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import load_empty_backbone
from piflow.config import Recipe
from piflow.inference.settings import load_student
from piflow.sharding import weights
from piflow.training import fidelity
from piflow.training.export import export_adapter
from piflow.training.export_whole import export_whole
from tests.unit.inference.test_settings import of_family, recipe, saved
from tests.unit.training.test_export_whole import KINDS, PACKAGES, checkpoint_of, wide_flux

CPU = torch.device("cpu")


def measured(ours: Recipe, inputs: Any, folder: Path, kind: Any, monkeypatch: Any) -> Any:
    """The figure of a new export, from this conditioning instead of the recipe's prompts."""
    monkeypatch.setattr(fidelity, "_prompts", lambda recipe: inputs[2])
    step = str(checkpoint_of(ours, folder / "step"))
    written = export_whole(ours, step, str(folder / kind), kind=kind, **KINDS)
    found = fidelity.measure(ours, written.student, str(folder / kind), CPU)
    options = {**KINDS, "dtype": "bfloat16"}
    export_adapter(ours, step, str(folder / "adapter"), **options)
    return found


@pytest.mark.parametrize("family", ["flux", "sd3", "dit"])
@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_it_is_what_loaded_students_say(
    family: str, lora: Any, make_case: Callable[[str], Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Streamed block by block, or loaded whole: the same velocities."""
    backbone, inputs = make_case(family)
    base = saved(backbone, tmp_path / "base")
    ours = of_family(family, base, mode="gm", lora=lora)
    shape = backbone.latent_channels, 8, 8
    codec = type("Codec", (), {"latent_shape": lambda self, *size: shape})()
    monkeypatch.setattr(fidelity, "build_codec", lambda model: codec)
    seen: list[tuple[Any, ...]] = []
    real = fidelity._velocities

    def recorded(trio: Any) -> Any:
        velocities = real(trio)

        def call(x: Any, sigma: Any, cond: Any) -> Any:
            seen.append((x, sigma, cond, velocities(x, sigma, cond)))
            return seen[-1][-1]

        return call

    monkeypatch.setattr(fidelity, "_velocities", recorded)
    found = measured(ours, inputs, tmp_path, "merged", monkeypatch)
    places = (str(tmp_path / "adapter"), str(base)), (str(tmp_path / "merged"), None)
    for (place, of), (x, sigma, cond, velocity) in zip(places, seen[1:], strict=True):
        trio, _ = load_student(place, of, allowed=PACKAGES)
        with torch.no_grad():
            again = trio.student(x, sigma, cond).velocity(x, sigma)
        assert torch.equal(velocity, again)
    expected, other = seen[1][-1], seen[2][-1]
    assert found.error == pytest.approx(float((other - expected).norm() / expected.norm()))
    assert 0 < found.error < 0.01 and found.velocities == 6
    assert sorted(set(seen[1][1].tolist())) == pytest.approx([0.5, 1.0])


def test_packed_weights_are_worse_than_merged(
    tmp_path: Path, flux_inputs: Any, monkeypatch: Any
) -> None:
    ours = recipe(wide_flux(tmp_path / "base"))
    errors = [
        measured(ours, flux_inputs, tmp_path / kind, kind, monkeypatch).error
        for kind in ("merged", "gguf", "fp8")
    ]
    assert errors[0] < errors[1] < errors[2] < 0.1, "gguf's Q8_0 has a scale for 32 values each"


def test_a_block_has_its_weights_while_it_computes(
    flux_folder: Path, flux_inputs: Any, monkeypatch: Any
) -> None:
    from piflow.config import ModelConfig

    backbone, sources = load_empty_backbone(ModelConfig(path=str(flux_folder)))
    blocks = [m for m in backbone.module.modules() if isinstance(m, backbone.block_classes)]
    most = 0
    real = weights._read_part

    def counted(*arguments: Any) -> None:
        nonlocal most
        real(*arguments)
        there = [any(not p.is_meta for p in block.parameters()) for block in blocks]
        most = max(most, sum(there))

    monkeypatch.setattr(weights, "_read_part", counted)
    with fidelity.streamed(backbone, sources, CPU):
        first = backbone.teacher_velocity(*flux_inputs)
        assert all(p.is_meta for block in blocks for p in block.parameters())
        assert torch.equal(backbone.teacher_velocity(*flux_inputs), first)
    assert len(blocks) == 2 and most <= 1
    from piflow.backbones import load_backbone

    whole = load_backbone(ModelConfig(path=str(flux_folder)))
    assert torch.equal(whole.teacher_velocity(*flux_inputs), first)
