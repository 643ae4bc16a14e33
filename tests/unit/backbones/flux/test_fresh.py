"""Fresh weights for pre-training, and the teacher's export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import FluxBackbone
from piflow.backbones.flux.fresh import average_of, fresh_backbone
from piflow.config import ModelConfig, TrainingConfig, parse_recipe
from piflow.runs import folder as run_folder
from piflow.sharding.single import SingleStrategy
from piflow.training.checkpoint import RunState
from piflow.training.export import export_teacher
from piflow.training.step import Trainer
from tests.unit.whole import save_checkpoint


def test_first_prediction_is_zero_and_the_loaded_weights_are_not_used(
    flux_folder: Path, flux_inputs: Any
) -> None:
    backbone = fresh_backbone(ModelConfig(path=str(flux_folder)), seed=0)
    assert torch.equal(backbone(*flux_inputs), torch.zeros_like(flux_inputs[0]))
    assert FluxBackbone.load(flux_folder)(*flux_inputs).abs().max() > 0


def test_weights_follow_from_the_seed_alone(flux_folder: Path) -> None:
    model = ModelConfig(path=str(flux_folder))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = fresh_backbone(model, seed=1).module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(6)
    same, other = (fresh_backbone(model, seed=seed).module.state_dict() for seed in (1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["x_embedder.weight"], other["x_embedder.weight"])


def test_initialisation_of_each_kind(flux_folder: Path) -> None:
    weights = fresh_backbone(ModelConfig(path=str(flux_folder)), seed=0).module.state_dict()
    zero = {name for name, tensor in weights.items() if not tensor.any()}
    assert {"proj_out.weight", "norm_out.linear.weight", "x_embedder.bias"} <= zero
    assert "transformer_blocks.0.norm1.linear.weight" in zero
    assert "single_transformer_blocks.0.norm.linear.weight" in zero
    for name in ("x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"):
        fan_out, fan_in = weights[name].shape
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.8 * bound < weights[name].abs().max() <= bound
    assert torch.equal(weights["transformer_blocks.0.attn.norm_q.weight"], torch.ones(8))


def test_average_is_a_frozen_copy(flux_folder: Path) -> None:
    backbone = fresh_backbone(ModelConfig(path=str(flux_folder)), seed=0)
    average = average_of(backbone)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in backbone.module.parameters())
    with torch.no_grad():
        backbone.module.get_parameter("x_embedder.bias").fill_(3)
    assert not average.module.get_parameter("x_embedder.bias").any()


def test_export_is_the_newest_average_in_float16(
    flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {
            "name": "tiny",
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused"},
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 16},
            "objective": {"type": "flow_matching"},
        }
    )
    trained, average = FluxBackbone.load(flux_folder), FluxBackbone.load(flux_folder)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter += 0.01
    trainer = Trainer(
        lambda batch, step, generator, backward: torch.zeros(()),
        dict(trained.module.named_parameters()),
        dict(average.module.named_parameters()),
        SingleStrategy(torch.device("cpu")),
        TrainingConfig(),
        seed=0,
    )
    folder = Path(recipe.run_dir) / "checkpoints" / run_folder.checkpoint_name(1)
    save_checkpoint(folder, trainer, RunState(1, 1, recipe.hash(), None, {}))
    exported = export_teacher(recipe)
    assert exported == tmp_path / "run" / "teacher"
    loaded = FluxBackbone.load(exported)
    for name, tensor in average.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor.half().float()), name
    assert loaded(*flux_inputs).isfinite().all()


def test_export_needs_a_local_folder_and_a_checkpoint(flux_folder: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "s3://bucket/run",
        "model": {"path": str(flux_folder)},
        "encoder": {"path": "unused"},
        "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 16},
        "objective": {"type": "flow_matching"},
    }
    with pytest.raises(ValueError, match="expected a local run_dir.*s3://bucket/run"):
        export_teacher(parse_recipe(tree))
    with pytest.raises(ValueError, match="no finished checkpoint in .*nothing"):
        export_teacher(parse_recipe({**tree, "run_dir": str(tmp_path / "nothing")}))
