from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from piflow.backbones import Backbone, Conditioning, FluxBackbone
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, LoRAConfig, PolicyConfig
from piflow.policies import DXPolicy
from piflow.roles.adapter import SETTINGS_KEY, WEIGHTS_FILE, load_adapter, save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.trio import Trio

POLICIES: dict[str, PolicyConfig] = {
    "gm": GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8),
    "grid": DXPolicyConfig(mode="grid", num_points=4),
    "polynomial": DXPolicyConfig(mode="polynomial", num_points=4),
    "velocity": DXPolicyConfig(mode="velocity_polynomial", num_points=4),
}
CLOCK = PolicyClock(0.3, 3.2)
Inputs = tuple[Tensor, Tensor, Conditioning]
MakeCase = Callable[[str], tuple[Backbone, Inputs]]


def make(backbone: Backbone, policy: str = "gm", *, full: bool = False) -> Trio:
    """A student that training has moved."""
    trio = Trio.from_backbone(
        backbone,
        None if full else LoRAConfig(rank=4, dropout=0.0),
        POLICIES[policy],
        CLOCK,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trio


@pytest.fixture
def trio(flux_folder: Path) -> Trio:
    return make(FluxBackbone.load(flux_folder))


def save(trio: Trio, folder: Path, policy: str = "gm", **options: Any) -> Path:
    tensors = options.pop("tensors", trio.trainable_parameters())
    save_adapter(
        folder, trio.backbone, tensors, POLICIES[policy], CLOCK, base_model="tiny", **options
    )
    return folder


# -------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image", "sd3", "dit"])
def test_round_trip_samples_the_same(
    family: str, policy: str, full: bool, make_case: MakeCase, tmp_path: Path
) -> None:
    backbone, inputs = make_case(family)
    trio = make(backbone, policy, full=full)
    adapter = load_adapter(save(trio, tmp_path / "adapter", policy, dtype="float32"))
    assert adapter.is_full_model == full
    loaded = Trio.from_adapter(make_case(family)[0], adapter)
    x, sigma, _ = inputs
    later = 0.5 * sigma
    expected = trio.student(*inputs).velocity(x, later)
    assert torch.equal(loaded.student(*inputs).velocity(x, later), expected)
    assert torch.equal(loaded.teacher_velocity(*inputs), trio.teacher_velocity(*inputs))
    with pytest.raises(ValueError, match="no 'ema' role"):
        loaded.ema(*inputs)


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_and_clock_come_back(policy: str, make_case: MakeCase, tmp_path: Path) -> None:
    config = load_adapter(save(make(make_case("flux")[0], policy), tmp_path, policy)).config
    assert config.policy() == POLICIES[policy]
    assert config.clock() == (None if policy == "gm" else CLOCK)


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


def test_prefixed_names_of_a_full_model(make_case: MakeCase, tmp_path: Path) -> None:
    """Blocks whose name begins alike keep it."""
    backbone, inputs = make_case("dit")
    trio = make(backbone, full=True)
    tensors = load_file(save(trio, tmp_path, dtype="float32") / WEIGHTS_FILE)
    assert any(name.startswith("transformer_blocks.") for name in tensors)
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, tmp_path / WEIGHTS_FILE)
    loaded = Trio.from_adapter(make_case("dit")[0], load_adapter(tmp_path))
    x, sigma, _ = inputs
    expected = trio.student(*inputs).velocity(x, sigma)
    assert torch.equal(loaded.student(*inputs).velocity(x, sigma), expected)


# ------------------------------------------------------------------------------------------ format


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config.pop("_diffusers_version")
    return config


FLUX_FIELDS = {
    "in_channels": 48,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "guidance_embeds": False,
    "axes_dims_rope": [2, 2, 4],
}


def test_gm_config_is_the_published_one(trio: Trio, tmp_path: Path) -> None:
    assert config_of(save(trio, tmp_path)) == {
        "_class_name": "GMFluxTransformer2DModel",
        "num_gaussians": 3,
        "constant_logstd": None,
        "logstd_inner_dim": 8,
        "gm_num_logstd_layers": 2,
        "logweights_channels": 4,
        "out_channels": 48,
        **FLUX_FIELDS,
    }


def test_dx_config_is_the_published_one(flux_folder: Path, tmp_path: Path) -> None:
    trio = make(FluxBackbone.load(flux_folder), "grid")
    assert config_of(save(trio, tmp_path, "grid")) == {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "out_channels": 4 * 48,
        **FLUX_FIELDS,
    }
    assert json.loads(load_adapter(tmp_path).metadata["policy_config"]) == {
        "type": "DX",
        "segment_size": 0.3,
        "shift": 3.2,
        "mode": "grid",
    }


@pytest.mark.parametrize(
    ("family", "policy", "name", "out_channels"),
    [
        ("qwen_image", "gm", "GMQwenImageTransformer2DModel", 16),
        ("qwen_image", "grid", "QwenImageTransformer2DModel", 4 * 16),
        ("sd3", "gm", "GMSD3Transformer2DModel", 4),
        ("sd3", "grid", "SD3Transformer2DModel", 4 * 4),
        ("dit", "gm", "GMDiTTransformer2DModel", 4),
        ("dit", "grid", "DiTTransformer2DModel", 4 * 4),
    ],
)
def test_config_by_family(
    family: str, policy: str, name: str, out_channels: int, make_case: MakeCase, tmp_path: Path
) -> None:
    config = config_of(save(make(make_case(family)[0], policy), tmp_path, policy))
    assert (config["_class_name"], config["out_channels"]) == (name, out_channels)


@pytest.mark.parametrize(
    ("family", "model_class", "projection"),
    [
        ("flux", FluxTransformer2DModel, "proj_out"),
        ("qwen_image", QwenImageTransformer2DModel, "proj_out"),
        ("dit", DiTTransformer2DModel, "proj_out_2"),
        ("sd3", SD3Transformer2DModel, "proj_out"),
    ],
)
def test_dx_config_builds_the_diffusers_class(
    family: str, model_class: Any, projection: str, make_case: MakeCase, tmp_path: Path
) -> None:
    """Whose output layer then has the shape of the file's."""
    folder = save(make(make_case(family)[0], "grid"), tmp_path, "grid")
    model = model_class.from_config(model_class.load_config(str(folder)))
    layer = model.get_submodule(projection)
    assert layer.weight.shape == load_file(folder / WEIGHTS_FILE)["proj_out.weight"].shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gm_tensors_and_metadata_are_the_published_ones(
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


def test_dx_tensors_are_the_published_ones(make_case: MakeCase, tmp_path: Path) -> None:
    tensors = load_file(save(make(make_case("flux")[0], "grid"), tmp_path, "grid") / WEIGHTS_FILE)
    assert tensors["proj_out.weight"].shape == (4 * 16, 16)
    assert tensors["norm_out.linear.bias"].shape == (32,)
    assert all(".lora_" in name or name.startswith(("proj_out", "norm_out")) for name in tensors)


def test_a_full_model_has_no_lora_and_every_weight(make_case: MakeCase, tmp_path: Path) -> None:
    trio = make(make_case("flux")[0], full=True)
    names = set(load_file(save(trio, tmp_path) / WEIGHTS_FILE))
    assert names == set(trio.trainable_parameters())
    assert "x_embedder.weight" in names and not any(".lora_" in name for name in names)


# ---------------------------------------------------------------------------------------- mistakes


def edit_config(folder: Path, **fields: Any) -> None:
    """Changes fields; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_base_model_in_place_of_an_adapter(flux_folder: Path) -> None:
    with pytest.raises(ValueError, match="policy_config.* is None: .*base model and not an adapt"):
        load_adapter(flux_folder)


def test_config_and_weights_of_different_policies(trio: Trio, tmp_path: Path) -> None:
    edit_config(save(trio, tmp_path), _class_name="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="would be a DX student's, but policy_config .*GMFlow"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_family(trio: Trio, make_case: MakeCase, tmp_path: Path) -> None:
    adapter = load_adapter(save(trio, tmp_path))
    with pytest.raises(ValueError, match="expected _class_name GMDiTTr.*got 'GMFluxTransformer2DM"):
        Trio.from_adapter(make_case("dit")[0], adapter)


def test_config_lacks_a_field_of_the_head(trio: Trio, tmp_path: Path) -> None:
    edit_config(save(trio, tmp_path), num_gaussians=None)
    with pytest.raises(ValueError, match="lacks num_gaussians"):
        load_adapter(tmp_path)


def test_config_lacks_a_field_of_the_base(trio: Trio, flux_folder: Path, tmp_path: Path) -> None:
    edit_config(save(trio, tmp_path), num_layers=None)
    with pytest.raises(ValueError, match="lacks num_layers"):
        Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))


def test_policy_config_lacks_a_field(make_case: MakeCase, tmp_path: Path) -> None:
    path = save(make(make_case("flux")[0], "grid"), tmp_path, "grid") / WEIGHTS_FILE
    described = json.dumps({"type": "DX", "segment_size": 0.5, "mode": "grid"})
    save_file(load_file(path), path, metadata={"policy_config": described})
    with pytest.raises(ValueError, match="lacks shift"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("class_name", ["FluxTransformer2DModel", "DXFluxTransformer2DModel"])
def test_a_dx_file_that_leaves_out_the_published_defaults(
    class_name: str, make_case: MakeCase, tmp_path: Path
) -> None:
    """As exporters in the wild write it: a class name of its own, no mode, no segment size."""
    backbone, inputs = make_case("flux")
    trio = make(backbone, "grid")
    path = save(trio, tmp_path, "grid", dtype="float32") / WEIGHTS_FILE
    edit_config(tmp_path, _class_name=class_name)
    described = json.dumps({"type": "DX", "shift": CLOCK.shift})
    save_file(load_file(path), path, metadata={"policy_config": described})
    adapter = load_adapter(tmp_path)
    assert adapter.config.clock() == PolicyClock(1.0, CLOCK.shift)
    loaded = Trio.from_adapter(make_case("flux")[0], adapter)
    found, ours = loaded.student(*inputs), trio.student(*inputs)
    expected = DXPolicy(ours._values, ours._x_src, inputs[1], 1.0, CLOCK.shift, "grid")
    x, later = inputs[0], 0.5 * inputs[1]
    assert torch.equal(found.velocity(x, later), expected.velocity(x, later))


def test_a_flux2_config_without_guidance_embeds(make_case: MakeCase, tmp_path: Path) -> None:
    """Earlier diffusers versions had no such field."""
    backbone, inputs = make_case("flux2")
    trio = make(backbone)
    edit_config(save(trio, tmp_path, dtype="float32"), guidance_embeds=None)
    assert "guidance_embeds" not in json.loads((tmp_path / "config.json").read_text())
    loaded = Trio.from_adapter(make_case("flux2")[0], load_adapter(tmp_path))
    x, sigma, _ = inputs
    expected = trio.student(*inputs).velocity(x, sigma)
    assert torch.equal(loaded.student(*inputs).velocity(x, sigma), expected)


def test_pefts_own_names(trio: Trio, flux_folder: Path, flux_inputs: Any, tmp_path: Path) -> None:
    """As a PEFT model's state has them, in half precision."""
    path = save(trio, tmp_path, dtype="float16") / WEIGHTS_FILE
    x, sigma, _ = flux_inputs
    expected = Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))
    named = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value
        for name, value in load_file(path).items()
    }
    assert sum(".default." in name for name in named) > 2
    save_file(named, path)
    found = Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))
    assert torch.equal(
        found.student(*flux_inputs).velocity(x, sigma),
        expected.student(*flux_inputs).velocity(x, sigma),
    )
    both = next(name for name in named if ".default." in name)
    save_file({**named, both.replace(".default", ""): named[both].clone()}, path)
    with pytest.raises(ValueError, match="under two names for one"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("noted", "mode"),
    [({}, "velocity_polynomial"), ({"schema_version": 2}, "velocity_polynomial"),
     ({"schema_version": 3}, "polynomial"), (None, "polynomial")],
)  # fmt: skip
def test_polynomials_of_earlier_versions_are_of_the_velocity(
    noted: dict[str, int] | None, mode: str, make_case: MakeCase, tmp_path: Path
) -> None:
    """And those that others wrote are the published ones."""
    metadata = {} if noted is None else {"metadata": {SETTINGS_KEY: json.dumps(noted)}}
    save(make(make_case("flux")[0], "polynomial"), tmp_path, "polynomial", **metadata)
    assert load_adapter(tmp_path).config.policy().mode == mode


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_is_refused_by_name(name: str, trio: Trio, tmp_path: Path) -> None:
    path = save(trio, tmp_path) / WEIGHTS_FILE
    more = {f"single_transformer_blocks.0.proj_mlp.{name}": torch.ones(4)}
    save_file(load_file(path) | more, path)
    with pytest.raises(ValueError, match="holds DoRA .*proj_mlp.lora_magnitude_vector"):
        load_adapter(tmp_path)


def test_a_head_of_another_kind(trio: Trio, tmp_path: Path) -> None:
    edit_config(save(trio, tmp_path), gm_num_logstd_layers=3)
    with pytest.raises(ValueError, match="gm_num_logstd_layers 3 isn't supported, only 2"):
        load_adapter(tmp_path)


def test_outputs_that_are_no_grid(make_case: MakeCase, tmp_path: Path) -> None:
    edit_config(save(make(make_case("flux")[0], "grid"), tmp_path, "grid"), out_channels=50)
    with pytest.raises(ValueError, match="N_g times in_channels = 16 for a DX student, got 50"):
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
    with pytest.raises(ValueError, match=r"lacks 2 of 8 .*proj_out_means.weight"):
        load_adapter(tmp_path)
    del tensors["single_transformer_blocks.0.proj_mlp.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"proj_mlp.lora_A.weight has no partner"):
        load_adapter(tmp_path)


def test_a_full_model_that_lacks_a_weight(make_case: MakeCase, tmp_path: Path) -> None:
    path = save(make(make_case("flux")[0], full=True), tmp_path) / WEIGHTS_FILE
    tensors = load_file(path)
    del tensors["context_embedder.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \(context_embedder.weight\)"):
        Trio.from_adapter(make_case("flux")[0], load_adapter(tmp_path))


def test_lora_beside_tensors_that_would_change_the_base(trio: Trio, tmp_path: Path) -> None:
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
    save_file({**tensors, "proj_out_means.weight": torch.zeros(7, 16)}, path)
    with pytest.raises(ValueError, match=r"proj_out_means.weight: expected \(144, 16\)"):
        Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))
    save_file({**tensors, "norm_out.linear.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"first norm_out.linear.bias: expected \(32,\)"):
        Trio.from_adapter(FluxBackbone.load(flux_folder), load_adapter(tmp_path))


def test_another_policy_than_the_tensors(trio: Trio, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks 2 of 2 output-layer tensors .proj_out.weight"):
        save(trio, tmp_path, "grid")


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
