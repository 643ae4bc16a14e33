"""`piflow sample` and adapters that note nothing, from folders and a hub laid out as published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from piflow.backbones import FluxBackbone, QwenImageBackbone
from piflow.commands import sample
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig
from piflow.inference import PiFluxPipeline, PiQwenImagePipeline
from piflow.inference.extra_lora import ExtraLora, with_extra_lora
from piflow.inference.places import adapter_place
from piflow.inference.published import base_of, steps_in_name
from piflow.inference.settings import load_student, read_adapter
from piflow.policies import DXPolicy
from piflow.roles.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    load_adapter,
)
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep, FlowSchedule
from tests.hub import serve_hub

GM = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8)
GRID = DXPolicyConfig(num_points=4)
STYLED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2")  # other layers, shared


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory,
    make_adapter: Callable[..., Path],
    flux_base: Path,
    qwen_base: Path,
) -> Path:
    """Folders as in the published repositories: no notes, the number of steps in the name alone."""
    folder = tmp_path_factory.mktemp("published")
    made = {
        "gmflux_k8_piid_4step": make_adapter(FluxBackbone, flux_base, GM, noted=False),
        "gmqwen_k8_piid_8step": make_adapter(QwenImageBackbone, qwen_base, GM, noted=False),
        "dxflux_n10_piid_3step": make_adapter(FluxBackbone, flux_base, GRID, noted=False),
    }
    for name, adapter in made.items():
        shutil.copytree(adapter, folder / name)
    shutil.copytree(folder / "gmflux_k8_piid_4step", folder / "gmflux_k8_piid_8step")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same as `lab/pi-flux` on a hub; the real client with an empty cache."""
    from huggingface_hub import HfFileSystem, constants

    with serve_hub({"models/lab/pi-flux": repository}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served
        HfFileSystem.clear_instance_cache()


def draw(adapter: str, base: Path, out: Path, **choices: Any) -> Tensor:
    """`piflow sample`'s picture of one prompt and seed, (H, W, 3) in 0 … 255."""
    chosen = sample.Choices(base=str(base), height=32, width=32, dtype="float32", **choices)
    file, _ = sample.main(
        adapter, ["a red heart"], out=str(out), seeds=[5], choices=chosen, show_progress=False
    )
    with Image.open(file) as image:
        return torch.from_numpy(np.asarray(image).astype(int)[2::4, 2::4])  # enlarged four times


@pytest.mark.parametrize(
    ("name", "pipeline", "base_name", "nfe"),
    [
        ("gmflux_k8_piid_4step", PiFluxPipeline, "flux_base", 4),
        ("gmqwen_k8_piid_8step", PiQwenImagePipeline, "qwen_base", 8),
        ("dxflux_n10_piid_3step", PiFluxPipeline, "flux_base", 3),
    ],
)
def test_a_published_folder_is_sampled_as_its_name_says(
    name: str,
    pipeline: Any,
    base_name: str,
    nfe: int,
    repository: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The picture of the few-step pipeline, from the same noise."""
    base, folder = request.getfixturevalue(base_name), str(repository / name)
    found = draw(folder, base, tmp_path)
    pipe = pipeline.from_pretrained(base, adapter=folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.trained_nfe == nfe
    (image,) = pipe(
        "a red heart",
        height=32,
        width=32,
        max_sequence_length=512,
        generator=torch.Generator().manual_seed(5),
    ).images
    expected = torch.from_numpy(np.asarray(image).astype(int))
    assert (found - expected).abs().max() <= 1, "one of 255 levels"
    (line,) = (tmp_path / "index.jsonl").read_text().splitlines()
    assert json.loads(line)["nfe"] == nfe


def test_an_adapter_on_the_hub(
    hub: Any, repository: Path, flux_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By URI and by repository and subfolder; its 8 steps without being told."""
    local = draw(str(repository / "gmflux_k8_piid_8step"), flux_base, tmp_path / "a")
    by_uri = draw("hf://lab/pi-flux/gmflux_k8_piid_8step", flux_base, tmp_path / "b")
    by_name = draw("lab/pi-flux", flux_base, tmp_path / "b", subfolder="gmflux_k8_piid_8step")
    assert torch.equal(by_uri, local) and torch.equal(by_name, local)
    said = capsys.readouterr().out
    assert "8 network evaluations by its policy or its folder's name" in said
    assert "0 pictures drawn, 1 were there" in said, "both names are one place"
    four = draw("lab/pi-flux", flux_base, tmp_path / "b", subfolder="gmflux_k8_piid_4step")
    assert not torch.equal(four, local)
    weights = (repository / "gmflux_k8_piid_8step" / WEIGHTS_FILE).stat().st_size
    whole = [name for name, count in hub.sent if name.endswith(WEIGHTS_FILE) and count >= weights]
    assert len(whole) == 1, "weights are downloaded once; both folders hold the same"
    with pytest.raises(ValueError, match="no config.json of its own, only in dxflux.*--subfolder"):
        read_adapter("lab/pi-flux")
    with pytest.raises(OSError, match="no such repository, or HF_TOKEN gives no access"):
        read_adapter("lab/nothing")


def test_settings_of_a_published_adapter(repository: Path) -> None:
    """Base, encoder and numbers are the family's own; options come before them."""
    _, qwen = read_adapter(str(repository / "gmqwen_k8_piid_8step"))
    assert qwen.model.path == "hf://Qwen/Qwen-Image/transformer" and qwen.model.codec == "vae"
    assert qwen.encoder.path == "hf://Qwen/Qwen-Image"  # type: ignore[attr-defined]
    assert (qwen.few_step, qwen.height) == (FewStep(8, 0.5, 3.2, 128), 1024)
    assert (qwen.model.dtype, qwen.embedded_guidance) == ("bfloat16", None)
    student, dx = read_adapter(str(repository / "dxflux_n10_piid_3step"))
    assert (dx.few_step, dx.embedded_guidance) == (FewStep(3, 0.5, 2.0, 128), 3.5)
    choices = sample.Choices(final_step_size_scale=1.0, total_substeps=32, guidance=2.0, nfe=4)
    settled = sample._settled(
        student, dx.model_copy(update={"model": dx.model.model_copy(update={"codec": "pixels"})}),
        choices,
    )  # fmt: skip
    assert settled.few_step == FewStep(4, 1.0, 2.0, 32) and settled.embedded_guidance == 2.0


FLUX2 = {
    "in_channels": 128, "attention_head_dim": 128, "mlp_ratio": 3.0, "rope_theta": 2000,
    "axes_dims_rope": [32, 32, 32, 32],
}  # fmt: skip
SIZES = ("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim")


@pytest.mark.parametrize(
    ("family", "name", "sizes", "guided"),
    [
        ("flux2", "FLUX.2-dev", (8, 48, 48, 15360), True),
        ("flux2_klein", "FLUX.2-klein-base-4B", (5, 20, 24, 7680), False),
        ("flux2_klein", "FLUX.2-klein-base-9B", (8, 24, 32, 12288), False),
    ],
)
def test_families_of_one_class_are_told_apart_by_sizes(
    family: str, name: str, sizes: tuple[int, ...], guided: bool
) -> None:
    fields = {**FLUX2, **dict(zip(SIZES, sizes, strict=True)), "out_channels": 1280}
    config = AdapterConfig("Flux2Transformer2DModel", {**fields, "patch_size": 1}, {"type": "DX"})
    for told in ({"guidance_embeds": guided}, {}):  # which configs of earlier versions lack
        found, model = base_of(replace(config, fields={**config.fields, **told}), "student")
        assert found == family and model is not None and model.name == name
    wrong = replace(config, fields={**config.fields, "guidance_embeds": not guided})
    with pytest.raises(ValueError, match=r"may be of flux2 or flux2_klein: its sizes .* of none"):
        base_of(wrong, "student")


def test_mistakes_in_names_and_settings(
    repository: Path, qwen_base: Path, flux_base: Path, tmp_path: Path
) -> None:
    assert steps_in_name("gmflux_k8_piid_4step") == 4 and steps_in_name("x-16-steps") == 16
    assert steps_in_name("step_000250") is None and steps_in_name("k8_piid") is None
    with pytest.raises(ValueError, match="one number of steps in the name, 1 to 64, got 4, 8"):
        steps_in_name("4step_as_8step")
    shutil.copytree(repository / "dxflux_n10_piid_3step", tmp_path / "dxflux_2step")
    with pytest.raises(ValueError, match=r"says 2 steps, .* segments of 0.4 are those of 3"):
        read_adapter(str(tmp_path / "dxflux_2step"))
    with pytest.raises(ValueError, match="without '..'|leads out|expected"):
        adapter_place("lab/pi-flux", "../other")
    for choices, message in (
        ({"shift": 3.0}, "trained for shift 2 and segments of 0.4, the schedule has shift 3"),
        ({"nfe": 2}, "trained for 3 .* or more, since its policy .DX. ends"),
        ({"nfe": 65}, "nfe is 65, at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(str(repository / "dxflux_n10_piid_3step"), flux_base, tmp_path, **choices)
    with pytest.raises(ValueError, match="takes no embedded guidance, got 3"):
        draw(str(repository / "gmqwen_k8_piid_8step"), qwen_base, tmp_path, guidance=3.0)
    with pytest.raises(ValueError, match="expected a FluxTransformer2DModel, config.json says"):
        load_student(str(repository / "gmflux_k8_piid_4step"), str(qwen_base))
    config = json.loads((tmp_path / "dxflux_2step" / CONFIG_FILE).read_text())
    config["_class_name"] = "OtherTransformer2DModel"
    shutil.copytree(tmp_path / "dxflux_2step", tmp_path / "other")
    (tmp_path / "other" / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="OtherTransformer2DModel is a student's of no family"):
        read_adapter(str(tmp_path / "other"))


def test_other_numbers_of_steps_come_with_a_caution(
    repository: Path, flux_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(str(repository / "gmflux_k8_piid_4step"), flux_base, tmp_path, nfe=2)
    draw(str(repository / "dxflux_n10_piid_3step"), flux_base, tmp_path, nfe=5)
    said = capsys.readouterr().out
    assert "trained for 4 network evaluations and runs at 2, in longer steps" in said
    assert "trained for 3 network evaluations and runs at 5, whose steps start where" in said
    pipe = PiFluxPipeline.from_pretrained(
        flux_base, adapter=str(repository / "gmflux_k8_piid_4step")
    )
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="trained for 4 .* runs at 2, in longer steps"):
        pipe("a", height=32, width=32, num_inference_steps=2, output_type="latent")
    with pytest.warns(UserWarning, match="runs at 5, whose steps start where it never did"):
        pipe("a", height=32, width=32, num_inference_steps=5, output_type="latent")


@pytest.mark.parametrize("nfe", [2, 3, 6])
def test_a_dx_policy_holds_in_shorter_segments(nfe: int) -> None:
    """Data are N(0, 0.09): x0 along the exact flow is known, and so is where the flow ends.

    The student is trained for two evaluations; at more, its policies are the exact flow's as well.
    """
    variance, schedule, points, trained = 0.09, FlowSchedule(2.0), 60, FewStep(2, 0.5, 2.0, 1)

    def spread(sigma: Tensor) -> Tensor:
        return ((1 - sigma) ** 2 * variance + sigma**2).sqrt()

    def student(x: Tensor, sigma: Tensor) -> DXPolicy:
        source = schedule.tau(sigma[0].double())
        stop = (source - trained.segment_size).clamp(min=0)
        levels = schedule.sigma(torch.linspace(float(stop), float(source), points).double())
        there = x * (spread(levels) / spread(sigma[0].double()))[:, None, None, None]
        x0 = (1 - levels)[:, None, None, None] * variance * there
        x0 = x0 / (spread(levels) ** 2)[:, None, None, None]
        values = ((x - x0) / sigma[0])[None]
        return DXPolicy(values, x, sigma, trained.segment_size, 2.0)

    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    end = sample_few_step(student, noise, replace(trained, nfe=nfe, total_substeps=4096))
    assert (end - 0.3 * noise).abs().max() < 2e-3, f"{(end - 0.3 * noise).abs().max()}"


# ------------------------------------------------------------------------------------- more LoRA


def style(layers: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 3: layer -> (inputs, outputs)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(3, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator)
    return tensors


def merged(trio: Trio, added: dict[str, Tensor], strength: float) -> None:
    """The same by hand: into the base's weights."""
    modules = dict(trio.backbone.module.named_modules())
    for name in STYLED:
        layer = modules[name]
        weight = getattr(layer, "base_layer", layer).weight
        product = added[f"{name}.lora_B.weight"] @ added[f"{name}.lora_A.weight"]
        with torch.no_grad():
            weight += strength * product


@pytest.mark.parametrize("full", [False, True], ids=["lora", "all weights"])
def test_more_lora_is_as_if_merged_into_the_base(
    full: bool, make_adapter: Callable[..., Path], flux_base: Path, tmp_path: Path
) -> None:
    """One on layers that the student adapts as well and on others, one in kohya's layout."""
    folder = make_adapter(FluxBackbone, flux_base, GM, full)
    adapter, settings = read_adapter(str(folder), str(flux_base / "transformer"))
    first = style({STYLED[0]: (16, 16), STYLED[1]: (64, 16)}, seed=1)
    save_file({f"transformer.{k}": v for k, v in first.items()}, tmp_path / "style.safetensors")
    second = style({STYLED[0]: (16, 16), STYLED[1]: (64, 16)}, seed=2)
    kohya = {}
    for layer, there in zip(STYLED, ("img_attn_qkv", "img_mlp_2"), strict=True):
        down, up = second[f"{layer}.lora_A.weight"], second[f"{layer}.lora_B.weight"]
        name = f"lora_unet_double_blocks_0_{there}"
        kohya[f"{name}.lora_down.weight"] = down
        zeros = torch.zeros(32, 3)  # of key and value, which kohya has in one matrix with the query
        kohya[f"{name}.lora_up.weight"] = torch.cat([up, zeros]) if layer == STYLED[0] else up
        kohya[f"{name}.alpha"] = torch.tensor(1.5)  # of rank 3: half
    save_file(kohya, tmp_path / "kohya.safetensors")
    extra = [
        ExtraLora.parse(f"{tmp_path}/style.safetensors@0.5"),
        ExtraLora.parse(f"{tmp_path}/kohya.safetensors@-0.2"),
    ]
    guided = settings.embedded_guidance
    more = with_extra_lora(adapter, settings, extra)

    def student(chosen: Adapter) -> Trio:
        return Trio.from_adapter(
            FluxBackbone.load(flux_base / "transformer", embedded_guidance=guided), chosen
        )

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 6, generator=generator)
    from piflow.backbones import Conditioning

    cond = Conditioning(
        torch.randn(2, 5, 12, generator=generator),
        torch.tensor([5, 5]),
        torch.randn(2, 16, generator=generator),
    )
    sigma = torch.tensor([1.0, 0.5])
    plain, expected = student(adapter), student(adapter)
    merged(expected, first, 0.5)
    merged(expected, second, -0.1)
    with torch.no_grad():
        results = [
            trio.student(x, sigma, cond).velocity(x, 0.8 * sigma)
            for trio in (student(more), expected, plain)
        ]
    assert (results[0] - results[1]).abs().max() < 2e-5
    assert (results[0] - results[2]).abs().max() > 1e-2


def test_lora_on_the_command_line(repository: Path, flux_base: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from piflow.cli import app

    save_file(style({STYLED[0]: (16, 16)}, 1), tmp_path / "pytorch_lora_weights.safetensors")

    def run(*more: str) -> str:
        arguments = ["sample", str(repository), "--subfolder", "gmflux_k8_piid_4step", "--base"]
        arguments += [str(flux_base), "--out", str(tmp_path / "out"), "--count", "1", "-q"]
        arguments += ["--prompt", "a", "--height", "16", "--width", "16", "--dtype", "float32"]
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 0, done.output
        return done.output

    run()
    assert "1 pictures drawn" in run("--lora", f"{tmp_path}@0.7")
    assert "0 pictures drawn" in run("--lora", f"{tmp_path}@0.7")
    assert "1 pictures drawn" in run("--lora", f"{tmp_path}@-2")
    files = sorted((tmp_path / "out").glob("*.png"))
    assert len({file.read_bytes() for file in files}) == 3


def test_lora_that_is_not_the_bases(repository: Path, flux_base: Path, tmp_path: Path) -> None:
    folder = repository / "gmflux_k8_piid_4step"
    adapter, settings = read_adapter(str(folder), str(flux_base / "transformer"))

    def refused(message: str, tensors: dict[str, Tensor], name: str = "x.safetensors") -> None:
        save_file(tensors, tmp_path / name)
        extra = [ExtraLora(str(tmp_path / name))]
        with pytest.raises(ValueError, match=message):
            with_extra_lora(adapter, settings, extra)

    refused("blocks.7.x, which is no linear layer of the base", style({"blocks.7.x": (4, 4)}, 0))
    refused("for a layer 8 -> 16, the base's is 16 -> 16", style({STYLED[0]: (8, 16)}, 0))
    refused(
        "the teacher's output layer, which the student", style({"norm_out.linear": (16, 32)}, 0)
    )
    refused("a student's output layer: it is an adapter", load_file(folder / WEIGHTS_FILE))
    refused("holds DoRA", {f"{STYLED[0]}.lora_magnitude_vector": torch.zeros(4)})
    refused(
        "text_encoder.* isn't LoRA of a transformer",
        style({STYLED[0]: (16, 16), "text_encoder.q": (4, 4)}, 0),
    )
    refused("isn't LoRA of a transformer's linear layer", {"other": torch.zeros(2)})
    one = style({STYLED[0]: (16, 16)}, 0)
    one.popitem()
    refused("has no partner", one)
    with pytest.raises(ValueError, match="expected one safetensors file in .*found"):
        _ = ExtraLora(str(folder.parent)).file
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cut short or isn.t safetensors"):
        with_extra_lora(adapter, settings, [ExtraLora(str(tmp_path / "y.safetensors"))])
    assert ExtraLora.parse("hf://a/b@main/x.safetensors@.5") == ExtraLora(
        "hf://a/b@main/x.safetensors", 0.5
    )
    assert ExtraLora.parse("a@main") == ExtraLora("a@main")
    assert load_adapter(folder).tensors.keys() == adapter.tensors.keys()
