from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from piflow.adapter import WEIGHTS_FILE, load_adapter, save_adapter
from piflow.backbones import FluxBackbone
from piflow.config import GMFlowPolicyConfig, LoRAConfig, ModelConfig
from piflow.trio import Trio

POLICY = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8)


@pytest.fixture
def trio(flux_folder: Path) -> Trio:
    trio = Trio.build(
        ModelConfig(path=str(flux_folder)),
        LoRAConfig(rank=4, dropout=0.0),
        POLICY,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trio


def save(trio: Trio, folder: Path, **options: Any) -> Path:
    tensors = options.pop("tensors", trio.trainable_parameters())
    save_adapter(folder, trio.backbone, tensors, POLICY, base_model="tiny", **options)
    return folder


def test_round_trip_samples_the_same(
    trio: Trio, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    adapter = load_adapter(save(trio, tmp_path / "adapter", dtype="float32"))
    loaded = Trio.from_adapter(FluxBackbone.load(flux_folder), adapter)
    x, sigma, _ = flux_inputs
    later = 0.5 * sigma
    expected = trio.student(*flux_inputs).velocity(x, later)
    assert torch.equal(loaded.student(*flux_inputs).velocity(x, later), expected)
    assert torch.equal(loaded.teacher_velocity(*flux_inputs), trio.teacher_velocity(*flux_inputs))
    with pytest.raises(ValueError, match="no 'ema' role"):
        loaded.ema(*flux_inputs)


def test_config_is_the_published_one(trio: Trio, tmp_path: Path) -> None:
    config = json.loads((save(trio, tmp_path) / "config.json").read_text())
    assert config.pop("_diffusers_version")
    assert config == {
        "_class_name": "GMFluxTransformer2DModel",
        "num_gaussians": 3,
        "constant_logstd": None,
        "logstd_inner_dim": 8,
        "gm_num_logstd_layers": 2,
        "logweights_channels": 4,
        "in_channels": 48,
        "out_channels": None,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "pooled_projection_dim": 5,
        "guidance_embeds": False,
        "axes_dims_rope": [2, 2, 4],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_and_metadata_are_the_published_ones(
    dtype: Any, trio: Trio, tmp_path: Path
) -> None:
    save(trio, tmp_path, dtype=dtype, metadata={"run_id": "abc"})
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    single = "single_transformer_blocks.0.proj_out"
    assert tensors["proj_out_means.weight"].shape == (3 * 48, 16)
    assert tensors["proj_out_logweights.bias"].shape == (3 * 4,)
    assert tensors["proj_out_logstds.1.weight"].shape == (8, 16)
    assert tensors["proj_out_logstds.3.weight"].shape == (1, 8)
    assert tensors["norm_out.linear.weight"].shape == (32, 16)
    assert tensors[f"{single}.lora_A.weight"].shape == (4, 16 + 64)
    assert tensors[f"{single}.lora_B.weight"].shape == (16, 4)
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads(metadata["policy_config"]) == {"type": "GMFlow"}
    assert metadata["base_model"] == "tiny"
    assert metadata["run_id"] == "abc"
    assert load_adapter(tmp_path).metadata == metadata


def test_prefixed_names_and_ranks_of_their_own(
    trio: Trio, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    """As other exporters write them: a `transformer.` prefix, a rank a layer."""
    save(trio, tmp_path, dtype="float32")
    layer = "single_transformer_blocks.0.proj_mlp"
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    tensors[f"{layer}.lora_A.weight"] = torch.cat([down, torch.randn(2, 16)])
    tensors[f"{layer}.lora_B.weight"] = torch.cat([up, torch.zeros(64, 2)], dim=1)
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, tmp_path / WEIGHTS_FILE)
    loaded = Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))
    x, sigma, _ = flux_inputs
    torch.testing.assert_close(
        loaded.student(*flux_inputs).velocity(x, sigma),
        trio.student(*flux_inputs).velocity(x, sigma),
        atol=1e-5,
        rtol=0,
    )


def test_wrong_class(trio: Trio, tmp_path: Path) -> None:
    save(trio, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="expected _class_name GMFlux.*'FluxTransformer2DModel'"):
        load_adapter(tmp_path)


def test_config_lacks_a_field(trio: Trio, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["num_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks num_layers"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE])
def test_missing_file(name: str, trio: Trio, tmp_path: Path) -> None:
    (save(trio, tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"it has no {name}"):
        load_adapter(tmp_path)


def test_damaged_weights(trio: Trio, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(tmp_path)


def test_missing_tensors_are_named(trio: Trio, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / WEIGHTS_FILE
    tensors = load_file(path)
    kept = {k: v for k, v in tensors.items() if not k.startswith("proj_out_means")}
    save_file(kept, path)
    with pytest.raises(ValueError, match=r"lacks 2 of 10 .*proj_out_means.weight"):
        load_adapter(tmp_path)
    del tensors["single_transformer_blocks.0.proj_mlp.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"proj_mlp.lora_A.weight has no partner"):
        load_adapter(tmp_path)


def test_tensors_that_would_change_the_base(trio: Trio, tmp_path: Path) -> None:
    tensors = {**trio.trainable_parameters(), "x_embedder.weight": torch.zeros(16, 48)}
    with pytest.raises(ValueError, match=r"neither LoRA nor output layer \(x_embedder.weight"):
        save(trio, tmp_path, tensors=tensors)


def test_another_architecture(trio: Trio, flux_config: dict[str, Any], tmp_path: Path) -> None:
    adapter = load_adapter(save(trio, tmp_path))
    deeper = FluxBackbone(FluxTransformer2DModel(**{**flux_config, "num_layers": 2}))
    with pytest.raises(ValueError, match=r"num_layers 1 \(base: 2\)"):
        Trio.from_adapter(deeper, adapter)


def test_shapes_that_do_not_fit(trio: Trio, flux_folder: Path, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / WEIGHTS_FILE
    tensors = load_file(path)
    name = "single_transformer_blocks.0.proj_mlp.lora_A.weight"
    save_file({**tensors, name: torch.zeros(4, 17)}, path)
    with pytest.raises(ValueError, match=r"expected size 16 in dimension 1.*\(4, 17\)"):
        Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))
    save_file({**tensors, "proj_out_means.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"proj_out_means.bias: expected \(144,\)"):
        load_adapter(tmp_path)


def test_layer_that_the_base_lacks(trio: Trio, flux_folder: Path, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / WEIGHTS_FILE
    tensors = load_file(path)
    for kind, shape in (("lora_A", (4, 16)), ("lora_B", (16, 4))):
        tensors[f"transformer_blocks.9.ff.net.2.{kind}.weight"] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="transformer_blocks.9.ff.net.2.lora_"):
        Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))


def test_values_that_the_dtype_cannot_hold(trio: Trio, tmp_path: Path) -> None:
    with torch.no_grad():
        trio.trainable_parameters()["proj_out_means.bias"][0] = 1e6
    with pytest.raises(ValueError, match="proj_out_means.bias has values that float16 can't hold"):
        save(trio, tmp_path, dtype="float16")


def test_metadata_of_the_format_is_its_own(trio: Trio, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata policy_config belongs to the format"):
        save(trio, tmp_path, metadata={"policy_config": "{}"})
