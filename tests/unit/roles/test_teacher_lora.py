"""A teacher with a LoRA of its own is what diffusers makes of base and file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from piflow.backbones import Backbone
from piflow.config import DXPolicyConfig, LoRAConfig, ModelConfig
from piflow.config.model import TeacherLoRAConfig
from piflow.roles.heads import PolicyClock
from piflow.roles.teacher_lora import read_teacher_lora
from piflow.roles.trio import Trio
from tests.unit.models import case

PIPELINES: dict[str, Any] = {
    "flux": FluxPipeline,
    "flux2": Flux2Pipeline,
    "qwen_image": QwenImagePipeline,
    "sd3": StableDiffusion3Pipeline,
    "wan": WanPipeline,
    "z_image": ZImagePipeline,
}
PARTS: dict[str, tuple[str, ...]] = {  # beside the transformer, none of which is needed here
    "flux": ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "flux2": ("scheduler", "vae", "text_encoder", "tokenizer"),
    "qwen_image": ("scheduler", "vae", "text_encoder", "tokenizer"),
    "wan": ("scheduler", "vae", "text_encoder", "tokenizer"),
    "z_image": ("scheduler", "vae", "text_encoder", "tokenizer"),
    "sd3": (
        *("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("text_encoder_3", "tokenizer_3"),
    ),
}
REBUILT = ("sd3", "wan", "z_image")  # whose modules are not diffusers' own
RANK, STRENGTH = 3, 0.7
GRID = DXPolicyConfig(num_points=2)
CLOCK = PolicyClock(0.5, 3.2)


def linear_layers(module: nn.Module, *, outputs: bool) -> dict[str, nn.Linear]:
    """All linear layers, or all but the output layer's."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and (outputs or name.split(".")[0] not in ("norm_out", "proj_out"))
    }


def write_lora(
    file: Path, layers: dict[str, nn.Linear], *, metadata: dict[str, str] | None = None
) -> Path:
    """Random LoRA on the layers, in diffusers' layout."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, layer in layers.items():
        down, up = (RANK, layer.in_features), (layer.out_features, RANK)
        for factor, shape in (("A", down), ("B", up)):
            values = 0.3 * torch.randn(shape, generator=generator)
            tensors[f"transformer.{name}.lora_{factor}.weight"] = values
    save_file(tensors, file, metadata=metadata)
    return file


def write_kohya(file: Path, module: nn.Module) -> Path:
    """The same as kohya's scripts write it, of a FLUX.1 with one block of each kind or more."""
    generator = torch.Generator().manual_seed(8)
    layers = dict(module.named_modules())
    width = layers["transformer_blocks.0.attn.to_q"].in_features
    sizes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_0_txt_attn_proj": (width, width),
        "double_blocks_0_img_mlp_0": (4 * width, width),
        "single_blocks_0_linear2": (width, 5 * width),
    }
    tensors = {}
    for name, (out, taken) in sizes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(
            RANK, taken, generator=generator
        )
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, file, metadata={"ss_network_alpha": "64"})  # which diffusers ignores too
    return file


def by_diffusers(family: str, file: Path, strength: float) -> Tensor:
    """The velocity of a base with the file loaded by the family's own pipeline."""
    backbone, inputs = case(family)
    own = module = backbone.module
    if family in REBUILT:  # the backbone has a diffusers model's parts, and calls them
        module = backbone.model_class.from_config(backbone.config)
        exchange(own, module)
    parts = dict.fromkeys(PARTS[family])
    pipeline = PIPELINES[family](**parts, transformer=module)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="style")
    pipeline.set_adapters("style", strength)
    if family in REBUILT:
        exchange(module, own)
    return backbone.teacher_velocity(*inputs)


def exchange(source: nn.Module, target: nn.Module) -> None:
    """Gives a model's parts to another, but for the output layer."""
    there = dict(target.named_children())
    for name, part in source.named_children():
        if name in there and name not in ("norm_out", "proj_out"):
            setattr(target, name, part)


def make(family: str, file: Path, *, trained: str = "lora", strength: float = STRENGTH) -> Any:
    """A trio whose teacher has the file's LoRA, and inputs."""
    backbone, inputs = case(family)
    lora = LoRAConfig(rank=2, dropout=0.0) if trained == "lora" else None
    return trio_of(backbone, lora, family, file, strength), inputs


def trio_of(
    backbone: Backbone, lora: LoRAConfig | None, family: str, file: Path, strength: float = 1.0
) -> Trio:
    section = TeacherLoRAConfig(path=str(file), strength=strength)
    found = read_teacher_lora(ModelConfig(family=family, path="unused", lora=section))
    generator = torch.Generator().manual_seed(0)
    return Trio.from_backbone(backbone, lora, GRID, CLOCK, generator=generator, teacher_lora=found)


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", PIPELINES)
def test_the_teacher_is_diffusers_own(family: str, trained: str, tmp_path: Path) -> None:
    """Every linear layer adapted, but that SD3 keeps its output layer in another order here."""
    layers = linear_layers(case(family)[0].module, outputs=family not in REBUILT)
    alphas = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 2 * RANK,
        "transformer.target_modules": list(layers),
    }
    file = write_lora(
        tmp_path / "style.safetensors",
        layers,
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(alphas)},
    )
    trio, inputs = make(family, file, trained=trained)
    expected = by_diffusers(family, file, STRENGTH)
    base = case(family)[0].teacher_velocity(*inputs)
    found = trio.teacher_velocity(*inputs)
    print(f"{family} {trained}: worst difference {(found - expected).abs().max():.1e}")
    assert (expected - base).abs().max() > 0.1
    rounding = 5e-5 if family == "z_image" else 2e-5  # its time has 1024 features inside
    torch.testing.assert_close(found, expected, atol=rounding, rtol=0)


def test_kohyas_layout_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "kohya.safetensors", case("flux")[0].module)
    trio, inputs = make("flux", file)
    expected = by_diffusers("flux", file, STRENGTH)
    assert (expected - case("flux")[0].teacher_velocity(*inputs)).abs().max() > 0.05
    torch.testing.assert_close(trio.teacher_velocity(*inputs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_the_student_has_it_and_the_teacher_keeps_it(tmp_path: Path, trained: str) -> None:
    """A new student is its teacher; training it moves neither teacher nor base."""
    layers = linear_layers(case("flux")[0].module, outputs=True)
    file = write_lora(tmp_path / "style.safetensors", layers)
    trio, inputs = make("flux", file, trained=trained)
    x, sigma, _ = inputs
    teacher = trio.teacher_velocity(*inputs)
    for role in (trio.student, trio.ema):
        velocity = role(*inputs).velocity(x, sigma).detach()
        torch.testing.assert_close(velocity, teacher, atol=1e-5, rtol=0)
    names = set(trio.trainable_parameters())
    assert not any("teacher" in name for name in names)
    if trained == "lora":
        assert all(".lora_" in name or name.startswith(("norm_out", "proj_out")) for name in names)
        frozen = [
            p for n, p in trio.modules[0].named_parameters() if ".lora_" in n and ".teacher." in n
        ]
        assert frozen and not any(parameter.requires_grad for parameter in frozen)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.1
    assert torch.equal(trio.teacher_velocity(*inputs), teacher)
    changed = trio.student(*inputs).velocity(x, sigma).detach()
    assert not torch.allclose(changed, teacher, atol=1e-2)


def test_the_weights_are_there_once(tmp_path: Path) -> None:
    """The base's tensors are those that were loaded, in place and value; LoRA has their dtype."""
    backbone, _ = case("flux")
    backbone.module.bfloat16()
    backbone.dtype = torch.bfloat16
    layers = linear_layers(backbone.module, outputs=False)
    file = write_lora(tmp_path / "style.safetensors", layers)
    before = {id(p): copy.deepcopy(p) for p in backbone.module.parameters()}
    trio = trio_of(backbone, LoRAConfig(rank=2), "flux", file)
    now = {id(p): p for p in trio.modules[0].parameters()}
    assert before.keys() <= now.keys()
    assert all(torch.equal(now[number], values) for number, values in before.items())
    added = [p for n, p in trio.modules[0].named_parameters() if ".lora_" in n and ".teacher." in n]
    assert {p.dtype for p in added} == {torch.bfloat16} and len(added) == 2 * len(layers)


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
ONE = "transformer.transformer_blocks.0.attn.to_q"
WRONG: dict[str, tuple[Damage, str]] = {
    "matches-nothing": (
        lambda tensors: {f"transformer.other.{n.split('.', 1)[1]}": t for n, t in tensors.items()},
        r"6 of its 6 layers are no linear layers of this FluxTransformer2DModel",
    ),
    "one-layer-too-many": (
        lambda tensors: {
            **tensors,
            "transformer.blocks.7.lora_A.weight": torch.ones(2, 16),
            "transformer.blocks.7.lora_B.weight": torch.ones(16, 2),
        },
        r"1 of its 7 layers are no linear layers .* \(first blocks.7\)",
    ),
    "another-size": (
        lambda tensors: {**tensors, f"{ONE}.lora_A.weight": torch.ones(RANK, 5)},
        r"transformer_blocks.0.attn.to_q is \(16, 16\) .* the LoRA's product \(16, 5\)",
    ),
    "half-a-pair": (
        lambda tensors: {n: t for n, t in tensors.items() if n != f"{ONE}.lora_B.weight"},
        "has no partner",
    ),
    "dora": (
        lambda tensors: {**tensors, f"{ONE}.lora_magnitude_vector": torch.ones(16)},
        "holds DoRA",
    ),
    "text-encoder": (
        lambda tensors: {
            **tensors,
            "text_encoder.text_model.q_proj.lora_A.weight": torch.ones(2, 4),
            "text_encoder.text_model.q_proj.lora_B.weight": torch.ones(4, 2),
        },
        "must be given merged, as model.path",
    ),
    "bias": (
        lambda tensors: {**tensors, f"{ONE}.lora_B.bias": torch.ones(16)},
        "isn't LoRA of a transformer's linear layer",
    ),
    "nothing": (lambda tensors: {}, "holds no tensor of LoRA"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_refused(wrong: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    backbone, _ = case("flux")
    layers = dict(list(linear_layers(backbone.module, outputs=False).items())[-6:])
    attention = ONE.removeprefix("transformer.")
    layers = {**dict(list(layers.items())[1:]), attention: backbone.module.get_submodule(attention)}
    file = write_lora(tmp_path / "style.safetensors", layers)
    damage, message = WRONG[wrong]
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        trio_of(backbone, LoRAConfig(rank=2), "flux", file)


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is no safetensors file"):
        trio_of(case("flux")[0], LoRAConfig(rank=2), "flux", file)


def test_an_output_layer_in_another_order(tmp_path: Path) -> None:
    layers = linear_layers(case("sd3")[0].module, outputs=True)
    file = write_lora(tmp_path / "style.safetensors", layers)
    with pytest.raises(ValueError, match="output layer isn't supported"):
        trio_of(case("sd3")[0], LoRAConfig(rank=2), "sd3", file)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": "style.pt"}, r"one .safetensors file \(pickled"),
        ({"path": "style.safetensors", "strength": 0.0}, "leave model.lora out"),
        ({"path": "style.safetensors", "strength": 1000.0}, "less than or equal to 100"),
    ],
)
def test_sections_that_say_nothing(section: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TeacherLoRAConfig.model_validate(section)
