"""The few-step pipelines: same latents as the sampler, saved and loaded, errors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from piflow.backbones import (
    Conditioning,
    DiTBackbone,
    Flux2Backbone,
    FluxBackbone,
    QwenImageBackbone,
    SD3Backbone,
    ZImageBackbone,
)
from piflow.backbones.base import unpack
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, PolicyConfig
from piflow.inference import (
    PiDiTPipeline,
    PiFlux2KleinPipeline,
    PiFlux2Pipeline,
    PiFluxPipeline,
    PiQwenImagePipeline,
    PiSD3Pipeline,
    PiZImagePipeline,
)
from piflow.inference.settings import (
    SETTINGS_KEY,
    settings_of,
    teacher_lora_of,
    with_lora_placed,
)
from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep, FlowSchedule, segments
from piflow.scheduler import FlowMapScheduler
from tests.unit.roles.test_teacher_lora import linear_layers, write_lora

NFE, SHIFT, SUBSTEPS, GUIDANCE = 3, 2.0, 24, 2.5  # as conftest's adapters note
PROMPTS = ["a red heart", "two blue stars on a hill"]
GM = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8)
GRID = DXPolicyConfig(num_points=4)
POLYNOMIAL = DXPolicyConfig(mode="polynomial", num_points=3)


@dataclass(frozen=True)
class Family:
    """One family: its classes, a call of two pictures, and what that call conditions on."""

    name: str
    pipeline: Any
    parent: Any
    backbone: Any
    call: dict[str, Any]
    size: tuple[int, int]
    condition: Callable[[Any], Conditioning]

    def latents(self, pipe: Any, **options: Any) -> Tensor:
        """The call's latents (2, 4, h, w), before the autoencoder."""
        options = {"generator": torch.Generator().manual_seed(5), **self.call, **options}
        if isinstance(options.get("prompt"), list):  # which Z-Image's own call writes into
            options["prompt"] = list(options["prompt"])
        if self.name == "klein":  # whose latents come as the autoencoder takes them
            pipe.vae.register_to_config(batch_norm_eps=0.0)
            pipe.vae.bn.running_mean.zero_()
            pipe.vae.bn.running_var.fill_(1.0)
        if self.name in ("sd3", "z_image", "klein"):
            return pipe(output_type="latent", **options).images
        if self.name != "dit":
            return unpack(pipe(output_type="latent", **options).images, *self.size)
        seen: list[Tensor] = []
        decode = pipe.vae.decode

        def record(latents: Tensor) -> Any:
            seen.append(latents * pipe.vae.config.scaling_factor)
            return decode(latents)

        pipe.vae.decode = record
        pipe(output_type="pt", **options)
        pipe.vae.decode = decode
        return seen[0]


def flux_condition(pipe: Any) -> Conditioning:
    tokens, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=32)
    return Conditioning(tokens, torch.full((2,), 32), pooled)


def flux2_condition(pipe: Any) -> Conditioning:
    tokens, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=32)
    return Conditioning(tokens, torch.full((2,), 32))


def qwen_condition(pipe: Any) -> Conditioning:
    tokens, mask = pipe.encode_prompt(PROMPTS)
    return Conditioning(tokens, mask.sum(1))


def sd3_condition(pipe: Any) -> Conditioning:
    tokens, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=32
    )
    return Conditioning(tokens, torch.full((2,), tokens.shape[1]), pooled)


def z_image_condition(pipe: Any) -> Conditioning:
    states, _ = pipe.encode_prompt(
        list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=32
    )
    counts = torch.tensor([len(prompt) for prompt in states])
    return Conditioning(pad_sequence(states, batch_first=True), counts)


def dit_condition(pipe: Any) -> Conditioning:
    return Conditioning(torch.zeros(2, 1, 1), torch.ones(2), torch.tensor([[3.0], [7.0]]))


ENCODED = {  # arguments of the families' `encode_prompt`, as the conditions above pass them
    "flux": {"prompt": PROMPTS, "prompt_2": PROMPTS, "max_sequence_length": 32},
    "flux2": {"prompt": PROMPTS, "max_sequence_length": 32},
    "klein": {"prompt": PROMPTS, "max_sequence_length": 32},
    "z_image": {
        "prompt": list(PROMPTS), "do_classifier_free_guidance": False, "max_sequence_length": 32,
    },
    "qwen": {"prompt": PROMPTS},
    "sd3": {
        "prompt": PROMPTS, "prompt_2": None, "prompt_3": None,
        "do_classifier_free_guidance": False, "max_sequence_length": 32,
    },
}  # fmt: skip
PICTURE = {"prompt": PROMPTS, "height": 16, "width": 24}
FLUX = Family(
    "flux", PiFluxPipeline, FluxPipeline, FluxBackbone,
    {**PICTURE, "max_sequence_length": 32}, (8, 12), flux_condition,
)  # fmt: skip
FLUX2 = Family(
    "flux2", PiFlux2Pipeline, Flux2Pipeline, Flux2Backbone,
    {**PICTURE, "max_sequence_length": 32}, (8, 12), flux2_condition,
)  # fmt: skip
QWEN = Family(
    "qwen", PiQwenImagePipeline, QwenImagePipeline, QwenImageBackbone,
    PICTURE, (8, 12), qwen_condition,
)  # fmt: skip
SD3 = Family(
    "sd3", PiSD3Pipeline, StableDiffusion3Pipeline, SD3Backbone,
    {**PICTURE, "max_sequence_length": 32}, (8, 12), sd3_condition,
)  # fmt: skip
KLEIN = Family(
    "klein", PiFlux2KleinPipeline, Flux2KleinPipeline, Flux2Backbone,
    {**PICTURE, "max_sequence_length": 32}, (8, 12), flux2_condition,
)  # fmt: skip
Z_IMAGE = Family(
    "z_image", PiZImagePipeline, ZImagePipeline, ZImageBackbone,
    {**PICTURE, "max_sequence_length": 32}, (8, 12), z_image_condition,
)  # fmt: skip
DIT = Family(
    "dit", PiDiTPipeline, DiTPipeline, DiTBackbone,
    {"class_labels": [3, 7]}, (8, 8), dit_condition,
)  # fmt: skip
FAMILIES = pytest.mark.parametrize(
    "family", [FLUX, FLUX2, QWEN, SD3, DIT], ids=lambda family: family.name
)
ALL = pytest.mark.parametrize(
    "family", [FLUX, FLUX2, QWEN, SD3, DIT, KLEIN, Z_IMAGE], ids=lambda family: family.name
)
Load = Callable[..., Any]


@pytest.fixture
def base_of(request: pytest.FixtureRequest) -> Callable[[Family], Path]:
    return lambda family: request.getfixturevalue(f"{family.name}_base")


@pytest.fixture
def load(base_of: Callable[[Family], Path], make_adapter: Callable[..., Path]) -> Load:
    """(family, policy, ...) -> the few-step pipeline of a new adapter, which it has as `.made`."""

    def build(family: Family, policy: PolicyConfig = GM, **adapter: Any) -> Any:
        base = base_of(family)
        folder = make_adapter(family.backbone, base, policy, **adapter)
        pipe = quiet(family.pipeline.from_pretrained(base, adapter=folder))
        pipe.made = folder
        return pipe

    return build


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(
    pipe: Any,
    family: Family,
    base: Path,
    nfe: int,
    h: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `sample_few_step` makes of the same adapter, noise and conditioning.

    Args:
        dtype: of the base, of LoRA's computing and of the noise that is drawn; the head is float32.
    """
    guided = GUIDANCE if family in (FLUX, FLUX2) else None
    place = base / "transformer"
    backbone = family.backbone.load(place, dtype=dtype, embedded_guidance=guided)
    adapter = load_adapter(pipe.made)
    lora = None
    if SETTINGS_KEY in adapter.metadata:
        settings = with_lora_placed(settings_of(adapter, "made"), str(pipe.made))
        lora = teacher_lora_of(adapter, settings)
    trio = Trio.from_adapter(backbone, adapter, lora)
    cond, generator = family.condition(pipe), torch.Generator().manual_seed(5)
    height, width = family.size
    if family is Z_IMAGE:
        dtype = torch.float32  # of its loop, always
    if family in (FLUX2, KLEIN):  # draws patches
        patches = torch.randn(2, 16, height // 2, width // 2, generator=generator, dtype=dtype)
        noise = torch.nn.functional.pixel_shuffle(patches, 2)
    else:
        noise = torch.randn(2, 4, height, width, generator=generator, dtype=dtype)
    return sample_few_step(
        lambda x, sigma: trio.student(x, sigma, cond),
        noise,
        FewStep(nfe, 0.5, SHIFT, SUBSTEPS),
        h=h,
        generator=generator,
    )


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    assert scale > 0.5
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


STUDENTS = {
    "gm": (GM, False),
    "grid": (GRID, False),
    "polynomial": (POLYNOMIAL, False),
    "gm-full": (GM, True),
    "grid-full": (GRID, True),
}


@FAMILIES
@pytest.mark.parametrize("h", [0.0, 0.7])
@pytest.mark.parametrize(("policy", "full"), STUDENTS.values(), ids=STUDENTS)
def test_equals_the_sampler(
    family: Family, policy: PolicyConfig, full: bool, h: float, load: Load, base_of: Any
) -> None:
    pipe = load(family, policy, full=full)
    pipe.scheduler = FlowMapScheduler.from_config(pipe.scheduler.config, h=h)
    found = family.latents(pipe)
    assert_same(found, sampled(pipe, family, base_of(family), NFE, h))


@pytest.mark.parametrize("family", [KLEIN, Z_IMAGE], ids=lambda family: family.name)
@pytest.mark.parametrize(("student", "h"), [("gm", 0.7), ("grid-full", 0.0)])
def test_families_that_share_most_of_their_code_equal_the_sampler(
    family: Family, student: str, h: float, load: Load, base_of: Any
) -> None:
    test_equals_the_sampler(family, *STUDENTS[student], h, load, base_of)


@FAMILIES
def test_gm_students_run_at_more_steps(family: Family, load: Load, base_of: Any) -> None:
    pipe = load(family)
    found = family.latents(pipe, num_inference_steps=NFE + 2)
    assert_same(found, sampled(pipe, family, base_of(family), NFE + 2))
    assert not torch.allclose(found, family.latents(pipe), atol=1e-2)


@ALL
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_saved_pipeline_draws_the_same(
    family: Family, full: bool, load: Load, base_of: Any, tmp_path: Path
) -> None:
    pipe = load(family, full=full)
    pipe.scheduler = FlowMapScheduler.from_config(pipe.scheduler.config, h=0.5, temperature=0.4)
    expected = family.latents(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(family.pipeline.from_pretrained(tmp_path))
    assert torch.equal(family.latents(loaded), expected)
    assert (loaded.scheduler.config.h, loaded.scheduler.config.temperature) == (0.5, 0.4)
    kept = tmp_path / "adapter" / WEIGHTS_FILE
    assert kept.read_bytes() == (pipe.made / WEIGHTS_FILE).read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (base_of(family) / weights).read_bytes()


@ALL
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_teachers_pipeline_stays_as_it_is(
    family: Family, full: bool, load: Load, base_of: Any, make_adapter: Any
) -> None:
    """Several pipelines share one transformer: the teacher's, and two students'."""
    teacher = quiet(family.parent.from_pretrained(base_of(family)))
    steps = {"num_inference_steps": 2}
    steps |= {"guidance_scale": 1.0} if family in (SD3, DIT, KLEIN) else {}
    steps |= {"guidance_scale": 0.0} if family is Z_IMAGE else {}
    before = family.latents(teacher, **steps)
    alone = load(family, full=full)
    first = quiet(family.pipeline.from_pipe(teacher, adapter=str(alone.made)))
    other = make_adapter(family.backbone, base_of(family), GRID)
    second = quiet(family.pipeline.from_pipe(teacher, adapter=str(other)))
    assert first.transformer is teacher.transformer and second.vae is teacher.vae
    assert "peft_config" not in vars(teacher.transformer)
    expected = family.latents(alone)
    for _ in range(2):
        assert torch.equal(family.latents(first), expected)
        assert not torch.allclose(family.latents(second), expected, atol=1e-2)
        assert torch.equal(family.latents(teacher, **steps), before)


@ALL
def test_pictures_come_out_of_the_families_call(family: Family, load: Load) -> None:
    pipe = load(family)
    images = pipe(**family.call).images
    height, width = (2 * side for side in family.size)
    assert [image.size for image in images] == [(width, height)] * 2
    assert len(pipe(**family.call, return_dict=False)[0]) == 2


@ALL
def test_the_signature_is_the_familys(family: Family) -> None:
    theirs = inspect.signature(family.parent.__call__).parameters
    ours = inspect.signature(family.pipeline.__call__).parameters
    assert list(ours) == list(theirs)
    assert all(ours[name].kind == theirs[name].kind for name in ours)
    changed = {name: p.default for name, p in ours.items() if p.default != theirs[name].default}
    expected = {"num_inference_steps": None}
    if family in (FLUX, FLUX2):
        expected["guidance_scale"] = None
    elif family in (SD3, DIT, KLEIN):
        expected["guidance_scale"] = 1.0
    elif family is Z_IMAGE:
        expected["guidance_scale"] = 0.0
    assert changed == expected
    assert family.parent.__name__ in family.pipeline.__call__.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        family.pipeline.__call__(object(), **family.call, steps=4)


@pytest.mark.parametrize("family", [FLUX, QWEN], ids=lambda family: family.name)
def test_several_pictures_a_prompt_and_a_generator_each(family: Family, load: Load) -> None:
    pipe = load(family)
    pipe.scheduler = FlowMapScheduler.from_config(pipe.scheduler.config, h=1.0)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(prompt: Any, count: int, *seeds: int) -> Tensor:
        return family.latents(
            pipe, prompt=prompt, num_images_per_prompt=count, generator=generators(*seeds)
        )

    several = draw(PROMPTS[1], 3, 1, 2, 3)
    assert len(several) == 3
    assert_same(draw(PROMPTS, 1, 4, 2)[1:], several[1:2])
    assert_same(draw(PROMPTS[1], 1, 3), several[2:])
    assert not torch.allclose(several[1:2], several[2:], atol=1e-2)


@pytest.mark.parametrize("family", [FLUX, QWEN], ids=lambda family: family.name)
def test_a_callback_sees_and_changes_each_step(family: Family, load: Load) -> None:
    pipe, seen = load(family), []

    def watch(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep)))
        return values

    def erase(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(values["latents"])}

    plain = family.latents(pipe)
    assert torch.equal(family.latents(pipe, callback_on_step_end=watch), plain)
    levels = [1000 * FlowSchedule(SHIFT).sigma(part.tau_src) for part in segments(NFE, 0.5)]
    assert seen == [(step, pytest.approx(level)) for step, level in enumerate(levels)]
    assert not family.latents(pipe, callback_on_step_end=erase).any()


def test_the_default_guidance_is_the_trained_one(load: Load) -> None:
    pipe = load(FLUX)
    expected = FLUX.latents(pipe)
    assert torch.equal(FLUX.latents(pipe, guidance_scale=GUIDANCE), expected)
    assert not torch.allclose(FLUX.latents(pipe, guidance_scale=4.0), expected, atol=1e-3)


def test_prompt_embeddings_and_latents_may_be_given(load: Load) -> None:
    pipe = load(FLUX)
    tokens, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=32)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    packed = pipe._pack_latents(noise, 2, 4, 8, 12)
    given = {"prompt": None, "prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
    assert_same(FLUX.latents(pipe, **given, latents=packed), FLUX.latents(pipe))


@FAMILIES
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_half_precision(family: Family, full: bool, load: Load, base_of: Any) -> None:
    """The base, LoRA and a full student's body in bfloat16; the head as it was exported."""
    exact = load(family, full=full)
    made = {"adapter": exact.made, "torch_dtype": torch.bfloat16}
    pipe = quiet(family.pipeline.from_pretrained(base_of(family), **made))
    found = family.latents(pipe)
    assert found.dtype == torch.bfloat16
    stored = load_adapter(exact.made).tensors
    for name, parameter in pipe._student.head.named_parameters():
        assert torch.equal(parameter, stored[name])
    dtypes = {parameter.dtype for parameter in pipe._student._own_tensors()}
    assert dtypes == {torch.bfloat16, torch.float32} if full or family is DIT else {torch.bfloat16}
    later = quiet(family.pipeline.from_pretrained(base_of(family), adapter=exact.made))
    error = (family.latents(later.to(torch.bfloat16)) - found).float().norm()
    assert error < 0.02 * found.float().norm()  # Qwen's encoder rounds its positions in `to`


@ALL
@pytest.mark.parametrize("policy", [GM, GRID], ids=["gm", "grid"])
def test_half_precision_rounds_nothing_but_the_network(
    family: Family, policy: PolicyConfig, load: Load, base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 pipeline equals our sampler on the same bfloat16 network, bit for bit.

    That one carries float32 latents and hands the network float32 noise levels, as training does.
    """
    made = {"adapter": load(family, policy).made, "torch_dtype": torch.bfloat16}
    pipe = quiet(family.pipeline.from_pretrained(base_of(family), **made))
    pipe.made = made["adapter"]
    if family is not DIT:  # bfloat16 encoders don't give the same bits twice
        encoded = pipe.encode_prompt(**ENCODED[family.name])
        pipe.encode_prompt = lambda *arguments, **options: encoded
    seen: list[Tensor] = []
    output_tokens = family.backbone.output_tokens

    def watched(backbone: Any, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        seen.append(sigma)
        tokens: Tensor = output_tokens(backbone, x, sigma, cond)
        return tokens

    found = family.latents(pipe)
    monkeypatch.setattr(family.backbone, "output_tokens", watched)
    expected = sampled(pipe, family, base_of(family), NFE, dtype=torch.bfloat16)
    assert {sigma.dtype for sigma in seen} == {torch.float32} and len(seen) == NFE
    if family is DIT:  # its latents are seen only behind a division by the autoencoder's scale
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 2**-8, f"{error}"
    else:
        assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize(("policy", "nfe"), [(GM, 4), (GRID, NFE)], ids=["gm", "dx"])
def test_adapters_that_note_nothing(policy: PolicyConfig, nfe: int, load: Load) -> None:
    """As the published ones: 4 steps, or what a DX policy's segments say; shift 3.2."""
    pipe = load(FLUX, policy, noted=False)
    assert pipe.trained_nfe == nfe
    config = pipe.scheduler.config
    assert (config.shift, config.total_substeps) == (3.2 if policy is GM else SHIFT, 128)
    seen = []
    FLUX.latents(pipe, callback_on_step_end=lambda p, step, t, values: seen.append(step) or values)
    assert len(seen) == nfe
    assert torch.equal(FLUX.latents(pipe), FLUX.latents(pipe, guidance_scale=3.5))


def test_a_base_may_be_a_uri(load: Load, flux_base: Path) -> None:
    expected = load(FLUX)
    pipe = PiFluxPipeline.from_pretrained(f"file://{flux_base}", adapter=f"file://{expected.made}")
    assert torch.equal(FLUX.latents(quiet(pipe)), FLUX.latents(expected))


def test_a_failed_call_leaves_the_teacher(load: Load) -> None:
    pipe = load(FLUX)
    names, expected = list(pipe.transformer.state_dict()), FLUX.latents(pipe)

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        FLUX.latents(pipe, callback_on_step_end=fail)
    assert list(pipe.transformer.state_dict()) == names
    assert torch.equal(FLUX.latents(pipe), expected)


@FAMILIES
def test_steps_that_a_student_does_not_take(family: Family, load: Load) -> None:
    gm, dx = load(family), load(family, GRID)
    with pytest.raises(ValueError, match="runs at 3 or more, since its policy .DX.* got 2"):
        dx(**family.call, num_inference_steps=2)
    changes: dict[str, dict[str, Any]] = {
        "shift 2 and segments of 0.4, the schedule has shift 3": {"shift": 3.0},
        "shift 2, the scheduler's is dynamic": {"use_dynamic_shifting": True},
        "shift 2 and segments of 0.4, .* and segments of 0.476": {"final_step_size_scale": 0.1},
    }
    for message, change in changes.items():
        dx.scheduler = FlowMapScheduler.from_config(gm.scheduler.config, **change)
        with pytest.raises(ValueError, match=f"DX student was trained for {message}"):
            dx(**family.call)
    gm.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="expected a FlowMapScheduler, got FlowMatchEuler"):
        gm(**family.call)


def test_guidance_that_a_student_does_not_take(load: Load) -> None:
    flux, qwen, dit = load(FLUX), load(QWEN), load(DIT)
    with pytest.raises(ValueError, match="= 4 with negative_prompt: the student has learnt"):
        flux(**FLUX.call, true_cfg_scale=4.0, negative_prompt="blurry")
    with pytest.raises(ValueError, match="leave true_cfg_scale and negative_prompt out, or set"):
        qwen(**QWEN.call, negative_prompt=" ")
    with pytest.raises(ValueError, match="guidance_scale = 2.5: .* or set guidance_scale to 1"):
        dit(**DIT.call, guidance_scale=2.5)
    with pytest.raises(ValueError, match="sigmas: .* leave sigmas out"):
        flux(**FLUX.call, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="was not trained to edit; leave image out"):
        load(FLUX2)(**FLUX2.call, image=[])
    sd3 = load(SD3)
    with pytest.raises(ValueError, match="guidance_scale = 7: the student has learnt"):
        sd3(**SD3.call, guidance_scale=7.0)
    with pytest.raises(ValueError, match="joint_attention_kwargs: .* takes prompts alone"):
        sd3(**SD3.call, joint_attention_kwargs={})
    assert torch.equal(QWEN.latents(qwen, true_cfg_scale=7.0), QWEN.latents(qwen))
    with pytest.raises(ValueError, match="guidance_scale = 4: the student has learnt"):
        load(KLEIN)(**KLEIN.call, guidance_scale=4.0)
    z_image = load(Z_IMAGE)
    with pytest.raises(ValueError, match=r"guidance_scale = 0\.5: the student has learnt"):
        z_image(**Z_IMAGE.call, guidance_scale=0.5)
    with pytest.raises(ValueError, match="joint_attention_kwargs: .* takes prompts alone"):
        z_image(**Z_IMAGE.call, joint_attention_kwargs={})
    assert Z_IMAGE.call["prompt"] == ["a red heart", "two blue stars on a hill"]


def test_adapters_that_do_not_fit(
    load: Load, flux_base: Path, qwen_base: Path, make_adapter: Any
) -> None:
    with pytest.raises(ValueError, match="PiFluxPipeline needs the student: pass adapter="):
        PiFluxPipeline.from_pretrained(flux_base)
    with pytest.raises(ValueError, match="is not an adapter folder"):
        PiFluxPipeline.from_pretrained(flux_base, adapter=str(flux_base))
    teacher = FluxPipeline.from_pretrained(flux_base)
    names = list(teacher.transformer.state_dict())
    foreign = make_adapter(QwenImageBackbone, qwen_base, GM)
    with pytest.raises(ValueError, match="for a student on a FluxTransformer2DModel"):
        PiFluxPipeline.from_pipe(teacher, adapter=str(foreign))
    assert list(teacher.transformer.state_dict()) == names


def test_a_transformer_with_lora_of_its_own(load: Load, flux_base: Path) -> None:
    from peft import LoraConfig

    teacher = FluxPipeline.from_pretrained(flux_base)
    style = LoraConfig(r=2, target_modules=["to_q"])
    teacher.transformer.add_adapter(style)
    with pytest.raises(ValueError, match="carries LoRA on .*to_q.* unload_lora_weights"):
        PiFluxPipeline.from_pipe(teacher, adapter=str(load(FLUX).made))


def test_lora_that_comes_after_the_student(load: Load) -> None:
    """A style on other layers than the student's works; one on the same layers is refused."""
    from peft import LoraConfig

    pipe = load(FLUX)
    plain = FLUX.latents(pipe)
    options = {"r": 2, "init_lora_weights": False}
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], **options), "style")
    styled = FLUX.latents(pipe)
    assert not torch.allclose(styled, plain, atol=1e-3)
    pipe.transformer.delete_adapters("style")
    assert torch.equal(FLUX.latents(pipe), plain)
    pipe = load(FLUX)
    pipe.transformer.add_adapter(LoraConfig(target_modules=["proj_mlp"], **options), "style")
    with pytest.raises(ValueError, match="carries LoRA on single_transformer_blocks.0.proj_mlp"):
        FLUX.latents(pipe)


def test_a_teachers_lora_comes_with_the_student(
    load: Load, flux_base: Path, tmp_path: Path
) -> None:
    """The output layer's as well, which is the teacher's alone; between calls the base is as is."""
    plain, folder = load(FLUX), tmp_path / "adapter"
    tensors, (config, weights) = load_adapter(plain.made), (CONFIG_FILE, WEIGHTS_FILE)
    settings = json.loads(tensors.metadata[SETTINGS_KEY])
    settings["model"]["lora"] = {"path": "style.safetensors", "strength": 0.5}
    metadata = {**tensors.metadata, SETTINGS_KEY: json.dumps(settings)}
    folder.mkdir()
    save_file(tensors.tensors, folder / weights, metadata=metadata)
    (folder / config).write_bytes((plain.made / config).read_bytes())
    layers = linear_layers(plain.transformer, outputs=True)
    write_lora(folder / "style.safetensors", layers)
    pipe = quiet(PiFluxPipeline.from_pretrained(flux_base, adapter=folder))
    pipe.made = folder
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    found = FLUX.latents(pipe)
    assert_same(found, sampled(pipe, FLUX, flux_base, NFE))
    assert not torch.allclose(found, FLUX.latents(plain), atol=1e-2)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(PiFluxPipeline.from_pretrained(tmp_path / "saved"))
    assert torch.equal(FLUX.latents(loaded), found)


def test_a_bare_components_call(load: Load, flux_base: Path) -> None:
    """diffusers' other way to make a pipeline: cls(**components)."""
    made = load(FLUX)
    teacher: DiffusionPipeline = FluxPipeline.from_pretrained(flux_base)
    pipe = PiFluxPipeline(**teacher.components, adapter=str(made.made))
    assert torch.equal(FLUX.latents(quiet(pipe)), FLUX.latents(made))
