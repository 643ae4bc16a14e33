"""A merged student is the adapter on its base: velocities, pictures, and what it says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from piflow.backbones import Conditioning, family_class
from piflow.config import Recipe
from piflow.inference.extra_lora import ExtraLora, with_extra_lora
from piflow.inference.settings import load_student, read_adapter, student_of
from piflow.roles.adapter import load_adapter
from piflow.roles.merged import read_student, student_sha256
from piflow.roles.trio import Trio
from piflow.sharding.single import SingleStrategy
from piflow.sharding.weights import read_tensor, stored_tensors, with_scales
from piflow.sharding.written import Entry, serialised
from piflow.training.build import build_trio
from piflow.training.checkpoint import RunState
from piflow.training.export import export_adapter
from piflow.training.export_whole import export_whole
from piflow.training.step import Trainer
from tests.unit.inference.test_settings import of_family, recipe, saved
from tests.unit.roles.test_teacher_lora import linear_layers, write_lora
from tests.unit.training.test_export import untrained
from tests.unit.whole import save_checkpoint

PACKAGES = ("package://",)
KINDS: dict[str, Any] = {"weights": "ema", "dtype": "float32", "lineage": {"piflow.run_id": "r"}}
WIDE = {"attention_head_dim": 16, "axes_dims_rope": [4, 4, 8]}  # layers with 32 columns


def checkpoint_of(ours: Recipe, folder: Path) -> Path:
    """A checkpoint whose trained tensors are all far from what training starts with."""
    trio = build_trio(ours)
    generator = torch.Generator().manual_seed(4)
    for parameters in (trio.trainable_parameters(), trio.ema_parameters()):
        for parameter in parameters.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer = Trainer(
        Mock(),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        SingleStrategy(torch.device("cpu")),
        ours.training,
        seed=0,
    )
    save_checkpoint(folder, trainer, RunState(0, 0, ours.hash(), None, {}))
    return folder


def velocity(trio: Trio, inputs: tuple[Tensor, Tensor, Conditioning]) -> Tensor:
    """The policy's at its start and later, so that all of the head's outputs count."""
    x, sigma, cond = inputs
    with torch.no_grad():
        policy = trio.student(x, sigma, cond)
        return torch.stack([policy.velocity(x, sigma), policy.velocity(x, 0.7 * sigma)])


def both(ours: Recipe, folder: Path, kind: Any = "merged", **options: Any) -> tuple[Path, Path]:
    """A student as an adapter and whole."""
    step = str(checkpoint_of(ours, folder / "step"))
    chosen = {**KINDS, **options}
    export_adapter(ours, step, str(folder / "adapter"), **chosen)
    export_whole(ours, step, str(folder / kind), kind=kind, max_shard_bytes=20_000, **chosen)
    return folder / "adapter", folder / kind


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CASES = [
    *((family, "gm", {"rank": 4}) for family in ("flux", "flux2", "qwen_image", "sd3", "dit")),
    *((family, "grid", {"rank": 4}) for family in ("flux", "flux2", "qwen_image", "sd3", "dit")),
    *((family, "gm", None) for family in ("flux", "dit")),
    ("sd3", "polynomial", None),
    ("dit", "grid", None),
    ("z_image", "gm", {"rank": 4}),
    ("z_image", "grid", {"rank": 4}),
    ("wan", "gm", {"rank": 4}),
    ("wan", "grid", {"rank": 4}),
    ("wan", "gm", None),
]


@pytest.mark.parametrize(("family", "mode", "lora"), CASES)
def test_it_is_the_adapter_on_its_base(
    family: str, mode: str, lora: Any, make_case: Callable[[str], Any], tmp_path: Path
) -> None:
    backbone, inputs = make_case(family)
    base = saved(backbone, tmp_path / "base")
    ours = of_family(family, base, mode=mode, lora=lora)
    adapter, whole = both(ours, tmp_path)
    expected, settings = load_student(str(adapter), str(base), allowed=PACKAGES)
    base.rename(tmp_path / "gone")
    found, own = load_student(str(whole), allowed=PACKAGES)
    assert relative(velocity(found, inputs), velocity(expected, inputs)) < 1e-5
    assert len(list((whole / "transformer").glob("*.safetensors"))) > 1
    assert own.few_step == settings.few_step and own.encoder == settings.encoder
    with pytest.raises(ValueError, match="no teacher in it"):
        found.teacher_velocity(*inputs)
    # FLUX.2's own projection has no bias, a head has; Z-Image has as many channels out as in
    if mode == "gm" or family in ("flux2", "z_image"):
        return
    model = plain(family, whole)
    values = call(family, model, inputs)
    assert torch.allclose(values, expected_values(expected, inputs), atol=1e-4)


def plain(family: str, whole: Path) -> Any:
    """The transformer by diffusers alone; it must use all that is there and miss nothing."""
    model, told = family_class(family).model_class.from_pretrained(
        whole / "transformer", output_loading_info=True
    )
    assert not any(told.values()), told
    return model


def call(family: str, model: Any, inputs: tuple[Tensor, Tensor, Conditioning]) -> Tensor:
    """A DX policy's values (B, N_g C, H, W) as the diffusers class returns them."""
    x, sigma, cond = inputs
    if family == "dit":
        labels = cond.pooled[:, 0].long()
        return model(x, sigma * 1000, class_labels=labels).sample.detach()
    if family == "wan":
        return model(x[:, :, None], sigma * 1000, cond.tokens).sample[:, :, 0].detach()
    if family == "sd3":
        return model(x, cond.tokens, cond.pooled, sigma * 1000).sample.detach()
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda m, a, output: seen.append(output[0]))
    backbone = family_class(family).__new__(family_class(family))
    backbone._config, backbone.dtype, backbone.embedded_guidance = dict(model.config), x.dtype, None
    backbone.module, backbone.latent_channels = model, x.shape[1]
    backbone.output_tokens(x, sigma, cond)
    handle.remove()
    return unpacked(seen[0].detach(), x)


def unpacked(tokens: Tensor, x: Tensor) -> Tensor:
    """(B, T, 4 N C) tokens -> (B, N C, H, W)."""
    from piflow.backbones.base import unpack

    return unpack(tokens, *x.shape[-2:])


def expected_values(trio: Trio, inputs: tuple[Tensor, Tensor, Conditioning]) -> Tensor:
    with torch.no_grad():
        tokens = trio._roles.tokens("student", *inputs)
    return unpacked(tokens.float(), inputs[0])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_bfloat16_is_one_rounding(
    family: str, make_case: Callable[[str], Any], tmp_path: Path
) -> None:
    """Each value is the float32 sum of base and LoRA, rounded once; the head is the adapter's."""
    backbone, inputs = make_case(family)
    base = saved(backbone, tmp_path / "base")
    ours = of_family(family, base, mode="gm", lora={"rank": 4})
    step = str(checkpoint_of(ours, tmp_path / "step"))
    for dtype in ("float32", "bfloat16"):
        options = {**KINDS, "dtype": dtype}
        export_whole(ours, step, str(tmp_path / dtype), kind="merged", **options)
    export_adapter(ours, step, str(tmp_path / "adapter"), **{**KINDS, "dtype": "bfloat16"})
    exact, rounded = (
        load_file(tmp_path / dtype / "transformer/diffusion_pytorch_model.safetensors")
        for dtype in ("float32", "bfloat16")
    )
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    head = load_adapter(tmp_path / "adapter").tensors
    shared = [name for name in head if ".lora_" not in name]
    assert shared and all(torch.equal(head[name], rounded[name]) for name in shared)
    adapter, _ = load_student(str(tmp_path / "adapter"), str(base), allowed=PACKAGES)
    whole, _ = load_student(str(tmp_path / "bfloat16"), allowed=PACKAGES)
    error = relative(velocity(whole, inputs), velocity(adapter, inputs))
    assert 0 < error < 2**-6  # a rounding is at most 2^-9 of a weight


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_the_teachers_lora_is_in_it(
    lora: Any, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    layers = linear_layers(build_trio(recipe(flux_folder, lora=None)).modules[0], outputs=False)
    style = write_lora(tmp_path / "style.safetensors", layers)
    section = {"path": str(flux_folder), "lora": {"path": str(style), "strength": 0.5}}
    ours = recipe(flux_folder, model=section, lora=lora)
    adapter, whole = both(ours, tmp_path)
    assert (adapter / style.name).exists()
    style.unlink()
    expected, _ = load_student(str(adapter), str(flux_folder), allowed=PACKAGES)
    found, settings = load_student(str(whole), allowed=PACKAGES)
    assert settings.model.lora is None and not list(whole.glob("*.safetensors"))
    assert relative(velocity(found, flux_inputs), velocity(expected, flux_inputs)) < 1e-5


def test_a_teacher_may_stand_beside_it(flux_folder: Path, flux_inputs: Any, tmp_path: Path) -> None:
    """As an evaluation needs it: the student is the folder's, the teacher the recipe's base."""
    adapter, whole = both(recipe(flux_folder), tmp_path)
    expected, settings = load_student(str(adapter), str(flux_folder), allowed=PACKAGES)
    found = student_of(read_student(str(whole / "transformer")), settings, with_teacher=True)
    assert torch.equal(
        found.teacher_velocity(*flux_inputs), expected.teacher_velocity(*flux_inputs)
    )
    assert relative(velocity(found, flux_inputs), velocity(expected, flux_inputs)) < 1e-5


def test_more_lora_goes_onto_it(flux_folder: Path, flux_inputs: Any, tmp_path: Path) -> None:
    layers = linear_layers(build_trio(recipe(flux_folder, lora=None)).modules[0], outputs=False)
    style = write_lora(tmp_path / "style.safetensors", layers)
    drawn = []
    folders = both(recipe(flux_folder), tmp_path)
    for folder, base in zip(folders, (str(flux_folder), None), strict=True):
        student, settings = read_adapter(str(folder), base, allowed=PACKAGES)
        more = with_extra_lora(student, settings, [ExtraLora(str(style), 0.3)])
        drawn.append(velocity(student_of(more, settings), flux_inputs))
    assert relative(drawn[1], drawn[0]) < 1e-5


def test_what_it_says_of_itself(flux_folder: Path, tmp_path: Path) -> None:
    """In every file; no path of this machine; the same bytes again; what tells it from others."""
    adapter, whole = both(recipe(flux_folder), tmp_path)
    files = sorted((whole / "transformer").glob("*.safetensors"))
    noted = load_adapter(adapter).metadata
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["piflow_format"] == "merged"
        for key in ("base_model", "piflow_base_sha256", "piflow.run_id", "policy_config"):
            assert metadata[key] == noted[key]
    content = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for place in (str(tmp_path), str(flux_folder.parent)):
        assert not any(place.encode() in text for text in content.values())
    first = student_sha256(str(whole / "transformer"))
    step = str(tmp_path / "step")
    export_whole(
        recipe(flux_folder), step, str(whole), kind="merged", max_shard_bytes=20_000, **KINDS
    )
    assert content == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    export_whole(recipe(flux_folder), step, str(whole), kind="merged", **KINDS)
    assert [file.name for file in (whole / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert not list((whole / "transformer").glob("*.index.json"))
    tensors = load_file(whole / "transformer/diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.ff.net.2.weight"
    tensors[name][0, 0] += 1
    with safe_open(whole / "transformer/diffusion_pytorch_model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, whole / "transformer/diffusion_pytorch_model.safetensors", metadata)
    assert student_sha256(str(whole / "transformer")) != first


def test_what_is_refused(flux_folder: Path, tmp_path: Path) -> None:
    ours = recipe(flux_folder)
    _, whole = both(ours, tmp_path)
    with pytest.raises(ValueError, match=r"is a whole student \(merged\) and no adapter"):
        export_whole(ours, str(tmp_path / "step"), str(whole), kind="merged", **KINDS)
        load_adapter(whole / "transformer")
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("chapter 1")
    with pytest.raises(ValueError, match=r"mine isn't empty \(thesis.txt\)"):
        export_whole(ours, str(tmp_path / "step"), str(other), kind="merged", **KINDS)
    assert (other / "thesis.txt").read_text() == "chapter 1"
    place = whole / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(place)
    with safe_open(place, "pt") as opened:
        metadata = opened.metadata()

    def refused(message: str, changed: dict[str, Tensor], **noted: str) -> None:
        save_file(changed, place, {**metadata, **noted})
        with pytest.raises(ValueError, match=message):
            load_student(str(whole), allowed=PACKAGES)

    gone = {name: t for name, t in tensors.items() if "ff.net.2" not in name}
    refused("tensors are missing", gone)
    refused("aren't the model's", {**tensors, "other.weight": torch.zeros(2)})
    refused("expected one of merged", tensors, piflow_format="int3")
    head = {name: t for name, t in tensors.items() if not name.startswith("proj_out_means")}
    refused("lacks 2 of 8 output-layer tensors", head)
    config = json.loads((whole / "transformer/config.json").read_text())
    (whole / "transformer/config.json").write_text(json.dumps({**config, "num_layers": 10**6}))
    refused("at most 1024", tensors)


def test_fp8_layers_are_scaled(make_case: Any, tmp_path: Path) -> None:
    """weight and weight_scale of the blocks' linear layers; all else as it was."""
    base = wide_flux(tmp_path / "base")
    ours = recipe(base)
    step = str(checkpoint_of(ours, tmp_path / "step"))
    for kind in ("merged", "fp8"):
        export_whole(ours, step, str(tmp_path / kind), kind=kind, **KINDS)  # type: ignore[arg-type]
    exact, small = (
        load_file(tmp_path / kind / "transformer/diffusion_pytorch_model.safetensors")
        for kind in ("merged", "fp8")
    )
    scaled = {name for name in small if small[name].dtype == torch.float8_e4m3fn}
    assert scaled == {
        name
        for name, tensor in exact.items()
        if "transformer_blocks." in name and tensor.ndim == 2 and "norm_" not in name
    }
    assert small.keys() == exact.keys() | {f"{name}_scale" for name in scaled}
    read = with_scales(stored_tensors(str(tmp_path / "fp8/transformer")))
    for name in exact:
        if name not in scaled:
            assert torch.equal(small[name], exact[name])
            continue
        scale = small[f"{name}_scale"]
        assert scale.shape == () and scale.dtype == torch.float32
        assert float(small[name].float().abs().max()) == 448.0
        again = read_tensor(read[name])
        assert torch.equal(again, small[name].float() * scale)
        # 3 bits of mantissa: half a step of 1/8, or of the subnormal numbers' 2^-9
        limit = exact[name].abs() / 16 + scale * 2**-10
        assert bool(((again - exact[name]).abs() <= limit * 1.001).all())
    with safe_open(tmp_path / "fp8/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["_quantization_metadata"])
    assert noted["format_version"] == "1.0" and noted["layers"] == {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in sorted(scaled)
    }


def test_files_of_several_dtypes_are_the_librarys() -> None:
    """Odd sizes before wide numbers: the library's order keeps every tensor aligned."""
    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(5, 7).to(torch.float8_e4m3fn),
        "c": torch.tensor(1.5),
        "d": torch.randn(2, 3).bfloat16(),
        "e": torch.randn(1, 1),
    }
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    content = bytes(serialised(entries, {"only": "one"}, lambda name: tensors[name]))
    assert content == save(tensors, metadata={"only": "one"})


def test_fp8_students_draw_nearly_the_same(tmp_path: Path, flux_inputs: Any) -> None:
    base = wide_flux(tmp_path / "base")
    adapter, whole = both(recipe(base), tmp_path, "fp8", dtype="bfloat16")
    expected, _ = load_student(str(adapter), str(base), allowed=PACKAGES)
    found, _ = load_student(str(whole), allowed=PACKAGES)
    assert 1e-4 < relative(velocity(found, flux_inputs), velocity(expected, flux_inputs)) < 0.1
    place = next(
        file
        for file in sorted((whole / "transformer").glob("*.safetensors"))
        if any(name.endswith(".weight_scale") for name in load_file(file))
    )
    tensors = load_file(place)
    with safe_open(place, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name in tensors if name.endswith(".weight_scale"))

    def refused(message: str, value: Tensor) -> None:
        save_file({**tensors, name: value}, place, metadata)
        with pytest.raises(ValueError, match=message):
            load_student(str(whole), allowed=PACKAGES)

    refused("one positive number", torch.tensor(float("nan")))
    refused("one positive number", torch.tensor(-1.0))
    refused("a scale a row or block aren't read", torch.ones(32))


def wide_flux(folder: Path) -> Path:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        FluxTransformer2DModel(
            in_channels=48, num_layers=1, num_single_layers=1, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=5, **WIDE,
        ).save_pretrained(str(folder))  # fmt: skip
    return folder


def test_no_layer_is_large_enough_for_fp8(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(
        in_channels=48, num_layers=1, num_single_layers=1, num_attention_heads=1,
        attention_head_dim=8, joint_attention_dim=6, pooled_projection_dim=5,
        axes_dims_rope=[2, 2, 4],
    ).save_pretrained(str(tmp_path / "base"))  # fmt: skip
    ours = recipe(tmp_path / "base")
    step = str(checkpoint_of(ours, tmp_path / "step"))
    with pytest.raises(ValueError, match="fp8 is for larger models"):
        export_whole(ours, step, str(tmp_path / "fp8"), kind="fp8", **KINDS)
    assert not (tmp_path / "fp8").exists()


BITS = {"Q8_0": 8, "Q5_1": 5, "Q5_0": 5, "Q4_1": 4, "Q4_0": 4}


def grid(base: Path) -> Recipe:
    return recipe(base, policy={"type": "dx", "mode": "grid", "num_points": 4})


def test_gguf_is_what_diffusers_reads(tmp_path: Path, flux_inputs: Any) -> None:
    """diffusers' own loader gives the values that ours gives, of a head that its class holds."""
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    base = wide_flux(tmp_path / "base")
    adapter, whole = both(grid(base), tmp_path, "gguf")
    found, settings = load_student(str(whole), allowed=PACKAGES)
    expected, _ = load_student(str(adapter), str(base), allowed=PACKAGES)
    assert 1e-5 < relative(velocity(found, flux_inputs), velocity(expected, flux_inputs)) < 0.02
    theirs = FluxTransformer2DModel.from_single_file(
        str(whole / "transformer/diffusion_pytorch_model.gguf"),
        config=str(whole / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    packed = [name for name, p in theirs.named_parameters() if type(p).__name__ == "GGUFParameter"]
    assert len(packed) > 10 and all("transformer_blocks." in name for name in packed)
    ours = expected_values(found, flux_inputs)
    assert relative(call("flux", theirs, flux_inputs), ours) < 2e-3  # it unpacks to half precision
    files = [p.read_bytes() for p in whole.rglob("*") if p.is_file()]
    assert not any(str(tmp_path).encode() in content for content in files)
    assert settings.model.path == str(whole / "transformer")
    assert len(student_sha256(str(whole / "transformer"))) == 64


@pytest.mark.parametrize("kind", BITS)
def test_gguf_types(kind: Any, tmp_path: Path) -> None:
    """Each packed value is as near as its bits allow; all else is float32, unchanged."""
    from piflow.sharding.gguf_file import read_gguf

    base = wide_flux(tmp_path / "base")
    ours = recipe(base)
    step = str(checkpoint_of(ours, tmp_path / "step"))
    export_whole(ours, step, str(tmp_path / "merged"), kind="merged", **KINDS)
    export_whole(ours, step, str(tmp_path / "gguf"), kind="gguf", gguf_type=kind, **KINDS)
    exact = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    texts, stored = read_gguf(str(tmp_path / "gguf/transformer/diffusion_pytorch_model.gguf"))
    assert texts["piflow_format"] == "gguf" and texts["general.architecture"] == "flux"
    assert texts["piflow.run_id"] == "r" and stored.keys() == exact.keys()
    packed = {name for name, tensor in stored.items() if tensor.packed is not None}
    assert len(packed) > 10 and all("transformer_blocks." in name for name in packed)
    for name, tensor in stored.items():
        value = read_tensor(tensor)
        if name not in packed:
            assert torch.equal(value, exact[name])
            continue
        blocks = exact[name].unflatten(-1, (-1, 32))
        spread = blocks.abs().amax(-1) if kind.endswith("0") else blocks.amax(-1) - blocks.amin(-1)
        steps = 2 ** (BITS[kind] - 1) if kind.endswith("0") else 2 ** BITS[kind]
        limit = 1.1 * spread / (steps - 1)  # the largest of the other sign may be a step away
        error = (value - exact[name]).unflatten(-1, (-1, 32)).abs().amax(-1)
        assert bool((error <= limit).all())


def test_gguf_that_is_refused(tmp_path: Path, flux_folder: Path, monkeypatch: Any) -> None:
    ours = recipe(flux_folder)
    step = str(checkpoint_of(ours, tmp_path / "step"))
    out = tmp_path / "gguf"
    with monkeypatch.context() as changed:
        changed.setattr("piflow.training.export_whole.BLOCK", 1000)
        with pytest.raises(ValueError, match="no linear layer of this model has a multiple of"):
            export_whole(ours, step, str(out), kind="gguf", **KINDS)
    assert not out.exists()
    (tmp_path / "wide").mkdir()
    _, whole = both(recipe(wide_flux(tmp_path / "base")), tmp_path / "wide", "gguf")
    file = whole / "transformer/diffusion_pytorch_model.gguf"
    content = file.read_bytes()
    for cut in (b"", content[:3], content[:2000], content[:-5000], b"GGUF" + b"\xff" * 60):
        file.write_bytes(cut)
        with pytest.raises((ValueError, OSError), match="damaged or isn't GGUF|ended early"):
            load_student(str(whole), allowed=PACKAGES)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pip install 'piflow\[gguf\]'"):
        load_student(str(whole), allowed=PACKAGES)


def test_a_base_is_never_held_in_memory(flux_config: dict[str, Any], tmp_path: Path) -> None:
    """A third of the base's bytes is enough, of which half are two shards' and a tensor's."""
    large = {
        "num_layers": 3, "num_single_layers": 14, "attention_head_dim": 128,
        "num_attention_heads": 4, "joint_attention_dim": 512, "pooled_projection_dim": 512,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    untrained(tmp_path / "tiny", flux_config, rank=4)
    untrained(tmp_path / "large", flux_config | large, rank=8)
    base = sum(file.stat().st_size for file in (tmp_path / "large/base").glob("*.safetensors"))
    assert base > 3e8
    script = Path(__file__).parent / "whole_memory.py"
    done = subprocess.run(
        [
            sys.executable, str(script), str(tmp_path / "large"), str(tmp_path / "tiny"),
            str(base // 3),
        ],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3]),
            "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.45 * base < int(done.stdout) < 0.55 * base, "bfloat16 of a float32 base"
