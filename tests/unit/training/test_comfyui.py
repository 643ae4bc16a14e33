"""What ComfyUI's π-Flow nodes ask of an adapter's file is in it; else it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from piflow.config import Recipe
from piflow.training.comfyui import export_comfyui, require_readable
from tests.unit.inference.test_settings import of_family, saved
from tests.unit.training.test_export_whole import KINDS, checkpoint_of

LOGSTDS = [f"proj_out_logstds.{n}.{kind}" for n in (1, 3) for kind in ("weight", "bias")]


def guided(ours: Recipe) -> Recipe:
    tree = ours.model_dump(mode="json")
    return Recipe.model_validate({**tree, "guidance": {**tree["guidance"], "embedded": 3.5}})


def student(family: str, mode: str, make_case: Any, folder: Path) -> Recipe:
    backbone, _ = make_case(family)
    if family == "flux":
        config = {**backbone.config, "guidance_embeds": True}
        backbone.model_class.from_config(config).save_pretrained(str(folder))
        return guided(of_family(family, folder, mode=mode, lora={"rank": 4}))
    return of_family(family, saved(backbone, folder), mode=mode, lora={"rank": 4})


@pytest.mark.parametrize(
    ("family", "mode"),
    [("flux", "gm"), ("flux2", "gm"), ("qwen_image", "gm"), ("flux", "grid"),
     ("qwen_image", "polynomial")],
)  # fmt: skip
def test_the_nodes_find_what_they_ask_for(
    family: str, mode: str, make_case: Callable[[str], Any], tmp_path: Path
) -> None:
    """As their loader goes: LoRA apart, the head by its names, its sizes by its shapes."""
    ours = student(family, mode, make_case, tmp_path / "base")
    step = str(checkpoint_of(ours, tmp_path / "step"))
    file = export_comfyui(ours, step, str(tmp_path / "out"), **KINDS)
    assert Path(file).name == "tiny_2step.safetensors"
    with safe_open(file, "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        metadata = opened.metadata()
    backbone, _ = make_case(family)
    features, width = backbone.config["in_channels"], backbone.width
    layers = dict(backbone.module.named_modules())
    lora = {name for name in shapes if "lora" in name}
    for name in lora:
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        assert layer in layers and factor in ("lora_A", "lora_B")
        assert f"{layer}.lora_{'B' if factor == 'lora_A' else 'A'}.weight" in lora
    others = shapes.keys() - lora
    policy = json.loads(metadata["policy_config"])
    norm = {name for name in others if name.startswith("norm_out.linear.")}
    assert norm == {f"norm_out.{n}" for n, _ in layers["norm_out"].named_parameters()}
    if mode != "gm":
        assert others - norm == {"proj_out.weight", "proj_out.bias"}
        assert shapes["proj_out.weight"] == (4 * features, width)
        assert policy == {"type": "DX", "segment_size": 1 / 1.5, "shift": 2.0, "mode": mode}
        return
    means, logweights = shapes["proj_out_means.weight"], shapes["proj_out_logweights.weight"]
    assert others - norm == {
        *(f"proj_out_{n}.{kind}" for n in ("means", "logweights") for kind in ("weight", "bias")),
        *LOGSTDS,
    }
    gaussians = logweights[0] // 4  # 2x2 patches
    assert gaussians == 3 and means == (gaussians * features, width)
    outputs = [shapes[name][0] for name in LOGSTDS if name.endswith("weight")]
    assert outputs == [8, 1] and policy == {"type": "GMFlow"}


@pytest.mark.parametrize(
    ("family", "mode", "lora", "message"),
    [
        ("sd3", "gm", {"rank": 4}, "they know flux, flux2, qwen_image, and model.family is sd3"),
        ("qwen_image", "gm", None, "lora is null"),
        ("qwen_image", "velocity_polynomial", {"rank": 4}, "not velocity_polynomial"),
        ("flux2", "grid", {"rank": 4}, "no bias in its output layer"),
        ("flux", "gm", {"rank": 4}, "guidance.embedded isn't set"),
    ],
)
def test_what_they_cannot_hold(
    family: str, mode: str, lora: Any, message: str, tmp_path: Path
) -> None:
    """By the recipe alone: nothing that it names exists."""
    ours = of_family(family, tmp_path / "nowhere", mode=mode, lora=lora)
    with pytest.raises(ValueError, match=f"can't hold this student: .*{message}"):
        require_readable(ours)


def test_a_teachers_lora_is_not_in_their_base(tmp_path: Path) -> None:
    ours = of_family("qwen_image", tmp_path / "nowhere", mode="gm", lora={"rank": 4})
    tree = ours.model_dump(mode="json")
    tree["model"]["lora"] = {"path": "style.safetensors"}
    with pytest.raises(ValueError, match="has no model.lora, which this student needs"):
        require_readable(Recipe.model_validate(tree))
