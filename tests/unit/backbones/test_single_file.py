"""Teachers in one file of another layout, against diffusers' own conversion of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import save_file
from torch import Tensor

from piflow.backbones import FluxBackbone, ZImageBackbone, single_file
from piflow.backbones.single_file import convert, in_diffusers_layout, single_file_tensors
from piflow.sharding.weights import read_tensor, tensors_of_file
from tests.unit.models import case

WIDTH = 3072  # the only one that diffusers' converter of FLUX.1 takes


def original(backbone: Any) -> dict[str, Tensor]:
    """A Z-Image's tensors in its authors' layout."""
    model = backbone.model_class.from_config(backbone.config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tensors = {
            name: torch.randn(value.shape, dtype=torch.bfloat16)
            for name, value in model.state_dict().items()
        }
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            for ours, theirs in (
                ("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1.", "x_embedder."),
                ("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"),
            ):  # fmt: skip
                name = name.replace(ours, theirs)
            found[name] = value
    return found


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A tiny Z-Image, its diffusers folder with another's weights, and a file of weights."""
    backbone = case("z_image")[0]
    folder = tmp_path_factory.mktemp("z_image")
    backbone.model_class.from_config(backbone.config).save_pretrained(folder / "other")
    save_file(original(backbone), folder / "one.safetensors")
    return backbone, folder / "other", folder / "one.safetensors"


def values_by_diffusers(tensors: dict[str, Tensor], name: str, config: Any) -> dict[str, Tensor]:
    convert = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    made: dict[str, Tensor] = convert(checkpoint=dict(tensors), config=dict(config))
    return made


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_the_folder_has_the_values_that_diffusers_makes(
    z_image: tuple[Any, Path, Path], prefix: str, tmp_path: Path
) -> None:
    backbone, other, _ = z_image
    tensors = original(backbone)
    whole = {f"{prefix}{name}": value for name, value in tensors.items()}
    if prefix == "model.diffusion_model.":
        whole["vae.decoder.weight"] = torch.zeros(3)
    save_file(whole, tmp_path / "mine.safetensors")
    made = convert(
        str(tmp_path / "mine.safetensors"), str(tmp_path / "transformer"), "z_image",
        config=str(other), dtype="float32", max_shard_bytes=20_000,
    )  # fmt: skip
    assert len(made.files) > 1 and made.scaled == 0
    expected = values_by_diffusers(tensors, "ZImageTransformer2DModel", backbone.config)
    loaded = ZImageBackbone.model_class.from_pretrained(tmp_path / "transformer")
    assert made.tensors == len(expected) == len(loaded.state_dict())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name].float()), name
    ZImageBackbone.load(tmp_path / "transformer")


def test_eight_bits_are_multiplied_by_their_scale(
    z_image: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    backbone, other, _ = z_image
    tensors = original(backbone)
    layers = [name for name in tensors if name.endswith((".qkv.weight", ".w1.weight"))]
    whole = dict(tensors)
    for number, name in enumerate(layers):
        whole[name] = tensors[name].to(torch.float8_e4m3fn)
        scale = torch.tensor(0.25 + number)
        new = number % 2  # as ComfyUI calls them now
        whole[name.replace("weight", "weight_scale" if new else "scale_weight")] = scale
        whole[name.replace("weight", "input_scale" if new else "scale_input")] = 2 * scale
        tensors[name] = whole[name].float() * scale
        if new:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            whole[name.replace("weight", "comfy_quant")] = torch.tensor(list(note)).byte()
    whole["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(whole, tmp_path / "mine.safetensors")
    target = tmp_path / "transformer"
    made = convert(
        str(tmp_path / "mine.safetensors"), str(target), "z_image", config=str(other),
        dtype="float32",
    )  # fmt: skip
    assert made.scaled == sum(3 if "qkv" in name else 1 for name in layers)
    expected = values_by_diffusers(tensors, "ZImageTransformer2DModel", backbone.config)
    for name, value in tensors_of_file(str(target / next(iter(made.files)))).items():
        assert torch.equal(read_tensor(value), expected[name].float()), name


def flux_tensors() -> dict[str, Tensor]:
    """A FLUX.1 of one block a stream in the original layout, two columns of each matrix."""
    rows = {
        "img_in": WIDTH, "txt_in": WIDTH, "final_layer.linear": 64,
        "final_layer.adaLN_modulation.1": 2 * WIDTH,
        **{f"{part}_in.{layer}_layer": WIDTH
           for part in ("time", "vector", "guidance") for layer in ("in", "out")},
        "single_blocks.0.linear1": 7 * WIDTH, "single_blocks.0.linear2": WIDTH,
        "single_blocks.0.modulation.lin": 3 * WIDTH,
    }  # fmt: skip
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        rows |= {
            f"{block}_mod.lin": 6 * WIDTH, f"{block}_attn.qkv": 3 * WIDTH,
            f"{block}_attn.proj": WIDTH, f"{block}_mlp.0": 4 * WIDTH, f"{block}_mlp.2": WIDTH,
        }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, count in rows.items():
        found[f"{layer}.weight"] = torch.randn(count, 2, generator=generator)
        found[f"{layer}.bias"] = torch.randn(count, generator=generator)
    for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for part in ("query", "key"):
            found[f"{block}.norm.{part}_norm.scale"] = torch.randn(128, generator=generator)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_flux_in_its_authors_layout(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also 8 bits without a scale; the output layer's scale and shift change places."""
    tensors = {name: value.to(dtype) for name, value in flux_tensors().items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    stored = tensors_of_file(str(tmp_path / "flux.safetensors"))
    found = in_diffusers_layout(stored, FluxBackbone, {}, "flux")
    plain = {name: value.float() for name, value in tensors.items()}
    expected = values_by_diffusers(plain, "FluxTransformer2DModel", {})
    assert found.keys() == expected.keys() and len(found) == 66
    assert found["norm_out.linear.weight"].packed is not None
    for name, value in expected.items():
        assert torch.equal(read_tensor(found[name]).float(), value), name
    stored["transformer_blocks.0.attn.to_q.weight"] = stored["img_in.weight"]
    with pytest.raises(ValueError, match=r"mixes layouts, .*: transformer_blocks.0.attn.to_q.wei"):
        in_diffusers_layout(stored, FluxBackbone, {}, "flux")


def test_a_file_in_diffusers_own_layout(z_image: tuple[Any, Path, Path], tmp_path: Path) -> None:
    backbone, other, _ = z_image
    weights = other / "diffusion_pytorch_model.safetensors"
    found = single_file_tensors(str(weights), ZImageBackbone, backbone.config)
    assert found == tensors_of_file(str(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.lora_A.weight": torch.zeros(2, 2)}, "holds LoRA .layers.0.lora_A.weight."),
        ({"model.diffusion_model.a": torch.zeros(1)}, "mixes layouts: model.diffusion_model.a be"),
        ({"double_blocks.0.x": torch.zeros(1)}, r"1 aren't the model's \(double_blocks.0.x\)"),
        ({"x_embedder.weight": torch.zeros(2, 2)}, "have another shape .all_x_embedder.2-1.weight"),
        ({"x_embedder.weight": None}, "1 tensors are missing .all_x_embedder.2-1.weight"),
        ({"x_embedder.weight": torch.zeros(2, 2, dtype=torch.int8)}, "quantised weights .x_embed"),
        ({"x_embedder.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).byte()},
         "x_embedder.comfy_quant says 'nvfp4': of quantised weights those in fp8"),
        ({"x_embedder.comfy_quant": torch.zeros(5000, dtype=torch.uint8)}, "no note of a layer"),
        ({"x_embedder.weight_scale": torch.ones(1)}, "is the scale of no fp8 weight"),
        ({"layers.0.attention.qkv.weight": torch.zeros(7, 16)}, "another shape"),
    ],
)  # fmt: skip
def test_files_that_are_refused(
    z_image: tuple[Any, Path, Path], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    backbone, other, _ = z_image
    tensors = {**original(backbone), **change}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(
            str(tmp_path / "mine.safetensors"), str(tmp_path / "new"), "z_image", config=str(other)
        )
    assert not (tmp_path / "new").exists()


def test_what_to_do_is_said(z_image: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, other, file = z_image
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ValueError, match=r"isn't empty \(.*a\): give a new folder"):
        convert(str(file), str(tmp_path / "full"), "z_image", config=str(other))
    with pytest.raises(ValueError, match="Compared with Z-Image: for a model of another size give"):
        convert(str(file), str(tmp_path / "new"), "z_image")
    with pytest.raises(
        ValueError, match="expected a FluxTransformer2DModel, config.json says 'ZIm"
    ):
        convert(str(file), str(tmp_path / "new"), "flux", config=str(other))
    with pytest.raises(ValueError, match="converts no other layout to a DiTTransformer2DModel"):
        convert(str(file), str(tmp_path / "new"), "dit")
    with pytest.raises(ValueError, match="names no best known model: give --config"):
        convert(str(file), str(tmp_path / "new"), "bria_family")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="isn't safetensors"):
        convert(str(tmp_path / "text.safetensors"), str(tmp_path / "new"), "z_image")


def test_a_stopped_conversion_is_no_model_and_is_begun_anew(
    z_image: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other, file = z_image
    folder, read = tmp_path / "new", single_file.read_tensor
    wanted = {"config": str(other), "dtype": "float32", "max_shard_bytes": 20_000}

    def stopped(stored: Any) -> Tensor:
        if len(list(folder.glob("*.safetensors"))) > 1:
            raise KeyboardInterrupt
        return read(stored)

    monkeypatch.setattr(single_file, "read_tensor", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(str(file), str(folder), "z_image", **wanted)
    monkeypatch.undo()
    assert len(list(folder.glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="has no config.json"):
        ZImageBackbone.load(folder)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"isn't empty \(mine.txt\)"):
        convert(str(file), str(folder), "z_image", **wanted)
    (folder / "mine.txt").unlink()
    made = convert(str(file), str(folder), "z_image", config=str(other), dtype="float32")
    assert {path.name for path in folder.iterdir()} == {*made.files, "config.json"}
    expected = convert(
        str(file), str(tmp_path / "at_once"), "z_image", config=str(other), dtype="float32"
    )
    assert made == expected
    with pytest.raises(ValueError, match="isn't empty .config.json."):
        convert(str(file), str(folder), "z_image", config=str(other))
