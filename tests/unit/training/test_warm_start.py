"""A student that begins as an exported one, and adapters that it can't begin as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow.config import Recipe, RecipeError
from piflow.inference.settings import load_student, places_of
from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE
from piflow.training.build import build_empty_trio, build_trio
from piflow.training.export import export_adapter
from piflow.training.warm_start import read_start
from tests.unit.inference.test_settings import recipe, trained

LORA = {"rank": 4, "dropout": 0.0}
GRID = {"type": "dx", "num_points": 3}
POLICIES: dict[str, Any] = {"gm": {"num_gaussians": 3, "logstd_inner_dim": 8}, "grid": GRID}


def exported(ours: Recipe, inputs: Any, folder: Path) -> str:
    checkpoint, _ = trained(ours, inputs, folder / "checkpoint")
    out = str(folder / "adapter")
    export_adapter(ours, str(checkpoint), out, weights="ema", dtype="float32", lineage={})
    return out


def warm(flux_folder: Path, place: str, **sections: Any) -> Recipe:
    return recipe(flux_folder, **{"lora": LORA, "training": {"init_from": place}, **sections})


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("policy", POLICIES)
def test_student_and_ema_begin_as_the_adapter(
    policy: str, lora: Any, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    sections = {"lora": lora, "policy": POLICIES[policy]}
    ours = recipe(flux_folder, **sections)
    place = exported(ours, flux_inputs, tmp_path)
    again = warm(flux_folder, place, **sections)
    trios = [build_trio(again, start=read_start(again))]
    if lora is not None:
        trios.append(build_empty_trio(again, start=read_start(again))[0])
    expected, _ = load_student(place, allowed=places_of(ours))
    for trio in trios:
        for found in (trio.trainable_parameters(), trio.ema_parameters()):
            for name, parameter in expected.trainable_parameters().items():
                assert torch.equal(found[name], parameter), name
        assert all(p.requires_grad for p in trio.trainable_parameters().values())
    teachers = [trio.teacher_velocity(*flux_inputs) for trio in (trios[0], build_trio(ours))]
    assert torch.equal(*teachers)


def test_it_decides_the_run(flux_folder: Path) -> None:
    assert warm(flux_folder, "s3://b/student").hash() != recipe(flux_folder, lora=LORA).hash()


@pytest.fixture
def adapter(flux_folder: Path, flux_inputs: Any, tmp_path: Path) -> str:
    return exported(recipe(flux_folder, lora=LORA), flux_inputs, tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": 2}}, "has LoRA of rank 4, lora.rank is 2: set lora.rank"),
        ({"lora": None}, "holds LoRA, and the recipe trains all weights: set lora to a section"),
        ({"policy": GRID}, "has another head: policy.type is gmflow there and dx in the recipe"),
        (
            {"policy": {"num_gaussians": 2, "logstd_inner_dim": 8}},
            "another head: policy.num_gaussians is 3 there and 2 in the recipe",
        ),
    ],
    ids=["rank", "full", "kind-of-head", "size-of-head"],
)
def test_another_student(sections: Any, message: str, adapter: str, flux_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_start(warm(flux_folder, adapter, **sections))


def test_a_dx_student_of_another_schedule(
    flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    place = exported(recipe(flux_folder, lora=LORA, policy=GRID), flux_inputs, tmp_path)
    objective = {"type": "pi_id", "nfe": 4, "shift": 2.0, "total_substeps": 16}
    other = warm(flux_folder, place, policy=GRID, objective=objective)
    with pytest.raises(ValueError, match="another head: segment size is 0.6666.* there and 0.28"):
        read_start(other)


def test_another_base(
    adapter: str, flux_folder: Path, flux_config: dict[str, Any], tmp_path: Path
) -> None:
    """By its weights, its architecture, and its family."""
    from diffusers import FluxTransformer2DModel

    replaced = tmp_path / "replaced"
    FluxTransformer2DModel(**flux_config).save_pretrained(replaced)
    with pytest.raises(ValueError, match="made from base weights .*: give an adapter of this base"):
        read_start(warm(replaced, adapter))
    _forget_the_base(Path(adapter))
    larger = tmp_path / "larger"
    FluxTransformer2DModel(**{**flux_config, "num_layers": 2}).save_pretrained(larger)
    other = warm(larger, adapter)
    with pytest.raises(ValueError, match="init_from = .* another architecture: num_layers 1"):
        build_trio(other, start=read_start(other))
    config = Path(adapter) / CONFIG_FILE
    config.write_text(config.read_text().replace("GMFlux", "GMQwenImage"))
    same = warm(flux_folder, adapter)
    with pytest.raises(ValueError, match="expected _class_name GMFluxTransformer2DModel"):
        build_trio(same, start=read_start(same))


def _forget_the_base(adapter: Path) -> None:
    """As published adapters are, which note no hash."""
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"policy_config": '{"type": "GMFlow"}'})


def test_no_adapter_there(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an adapter folder"):
        read_start(warm(flux_folder, str(tmp_path)))


def test_a_recipe_that_distils_nothing(flux_folder: Path) -> None:
    embed = {"prompts": "p.txt", "store": "s", "height": 16, "width": 16}
    objective = {"type": "flow_matching"}
    with pytest.raises(RecipeError, match="training.init_from is about a distillation's student"):
        warm(flux_folder, "s3://b/student", objective=objective, embed=embed)
