from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from piflow.backbones import Backbone, Conditioning, FluxBackbone
from piflow.config import (
    DXPolicyConfig,
    GMFlowPolicyConfig,
    GuidanceConfig,
    LoRAConfig,
    PolicyConfig,
    parse_recipe,
)
from piflow.ema import ema_update, karras_beta
from piflow.roles.guided import GuidedTeacher
from piflow.roles.heads import GMHead, PolicyClock
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep, FlowSchedule, segments
from piflow.training.build import build_trio

LORA = LoRAConfig(rank=4, dropout=0.0)
POLICIES: dict[str, PolicyConfig] = {
    "gm": GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8),
    "grid": DXPolicyConfig(mode="grid", num_points=4),
    "velocity": DXPolicyConfig(mode="velocity_polynomial", num_points=4),
}
SCHEDULE = FlowSchedule(3.2)
SEGMENTS = segments(4, 0.5)
CLOCK = PolicyClock(SEGMENTS[0].size, 3.2)
TRAINED: dict[str, LoRAConfig | None] = {"lora": LORA, "full": None}
FAMILIES = ["flux", "flux2", "qwen_image", "sd3", "dit"]
Inputs = tuple[Tensor, Tensor, Conditioning]
MakeCase = Callable[[str], tuple[Backbone, Inputs]]

trained = pytest.mark.parametrize("trained", TRAINED)


def make(
    backbone: Backbone,
    *,
    trained: str = "lora",
    policy: str = "gm",
    seed: int = 0,
    bias_noise: float = 0.05,
) -> Trio:
    return Trio.from_backbone(
        backbone,
        TRAINED[trained],
        POLICIES[policy],
        CLOCK,
        generator=torch.Generator().manual_seed(seed),
        bias_noise=bias_noise,
    )


def build(
    folder: Path, *, lora: LoRAConfig | None = LORA, seed: int = 0, dtype: Any = "float32"
) -> Trio:
    """As a recipe does."""
    return build_trio(
        parse_recipe(
            {
                "name": "tiny",
                "run_dir": "unused",
                "seed": seed,
                "model": {"path": str(folder), "dtype": dtype},
                "encoder": {"path": "unused"},
                "embed": {"prompts": "p", "store": "s", "height": 8, "width": 8},
                "policy": POLICIES["gm"].model_dump(),
                "lora": None if lora is None else lora.model_dump(),
            }
        )
    )


def disturb(trio: Trio, *, seed: int = 0) -> None:
    """Moves every trained weight, so that roles can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def student_velocity(trio: Trio, inputs: Any) -> Tensor:
    x, sigma, _ = inputs
    return trio.student(*inputs).velocity(x, sigma).detach()


def training_steps(trio: Trio, inputs: Any, betas: list[float]) -> list[dict[str, Tensor]]:
    """AdamW steps with their EMA updates; the student's weights after each."""
    x, sigma, _ = inputs
    optimizer = torch.optim.AdamW(trio.trainable_parameters().values(), lr=0.02)
    history = []
    for beta in betas:
        optimizer.zero_grad()
        target = trio.teacher_velocity(*inputs)
        (trio.student(*inputs).velocity(x, 0.5 * sigma) - 2 * target).square().mean().backward()
        optimizer.step()
        ema_update(
            list(trio.ema_parameters().values()), list(trio.trainable_parameters().values()), beta
        )
        weights = trio.trainable_parameters()
        history.append({name: weight.detach().clone() for name, weight in weights.items()})
    return history


# ------------------------------------------------------------------------------------- first step


def few_steps(trio: Trio, inputs: Any) -> tuple[Tensor, Tensor]:
    """Endpoints of the student at 4 NFE and of the teacher's Euler steps at the same times."""
    x, _, cond = inputs
    student = sample_few_step(
        lambda at, sigma: trio.student(at, sigma, cond), x, FewStep(4, 0.5, 3.2, total_substeps=32)
    )
    for segment in SEGMENTS:
        source, end = SCHEDULE.sigma(segment.tau_src), SCHEDULE.sigma(segment.tau_dst)
        x = x + (end - source) * trio.teacher_velocity(x, torch.full((len(x),), source), cond)
    return student, x


@trained
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_student_starts_as_the_teachers_few_step_sampler(
    family: str, policy: str, trained: str, make_case: MakeCase
) -> None:
    """Exactly, where a mixture's components are equal and have no variance."""
    backbone, inputs = make_case(family)
    trio = make(backbone, trained=trained, policy=policy, bias_noise=0.0)
    if isinstance(trio.head, GMHead):
        torch.nn.init.constant_(trio.head.get_parameter("proj_out_logstds.3.bias"), -20.0)
    student, teacher = few_steps(trio, inputs)
    torch.testing.assert_close(student, teacher, atol=2e-5, rtol=0)
    assert (teacher - inputs[0]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_noise_and_std_a_mixture_starts_near_the_teacher(
    family: str, make_case: MakeCase
) -> None:
    """A component's std of 0.05 and bias noise of 0.05 move the endpoint by less than 0.1."""
    backbone, inputs = make_case(family)
    student, teacher = few_steps(make(backbone), inputs)
    assert 0 < (student - teacher).abs().max() < 0.1


@trained
@pytest.mark.parametrize("policy", POLICIES)
def test_ema_starts_as_the_student(policy: str, trained: str, make_case: MakeCase) -> None:
    backbone, inputs = make_case("flux")
    trio = make(backbone, trained=trained, policy=policy)
    x, sigma, _ = inputs
    ema = trio.ema(*inputs).velocity(x, 0.5 * sigma)
    assert torch.equal(ema, trio.student(*inputs).velocity(x, 0.5 * sigma))


# ------------------------------------------------------------------------------ what training moves


@trained
@pytest.mark.parametrize("policy", ["gm", "grid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_base_and_teacher_alone(
    family: str, policy: str, trained: str, make_case: MakeCase
) -> None:
    backbone, inputs = make_case(family)
    untouched = copy.deepcopy(backbone)
    trio = make(backbone, trained=trained, policy=policy)
    moved = {id(p) for p in [*trio.trainable_parameters().values()]}
    moved |= {id(p) for p in [*trio.ema_parameters().values()]}
    base = {
        name: (parameter, parameter.detach().clone())
        for module in trio.modules
        for name, parameter in module.named_parameters()
        if id(parameter) not in moved
    }
    before = student_velocity(trio, inputs)
    training_steps(trio, inputs, [0.5] * 3)
    assert not torch.allclose(student_velocity(trio, inputs), before)
    assert base and all(torch.equal(now, then) for now, then in base.values())
    velocity = trio.teacher_velocity(*inputs)
    assert torch.equal(velocity, untouched.teacher_velocity(*inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@trained
def test_teacher_is_bit_equal_to_the_untouched_model(
    trained: str, dtype: Any, flux_folder: Path, flux_inputs: Any
) -> None:
    trio = build(flux_folder, lora=TRAINED[trained], dtype=dtype)
    disturb(trio)
    trio.student(*flux_inputs)
    trio.ema(*flux_inputs)
    untouched = FluxBackbone.load(flux_folder, dtype=getattr(torch, dtype))
    assert torch.equal(
        trio.teacher_velocity(*flux_inputs), untouched.teacher_velocity(*flux_inputs)
    )


@trained
@pytest.mark.parametrize("policy", POLICIES)
def test_ema_is_the_closed_form(policy: str, trained: str, make_case: MakeCase) -> None:
    """sum_t (1 - beta_t) prod_{s > t} beta_s weights_t, with the Karras schedule."""
    backbone, inputs = make_case("flux")
    trio = make(backbone, trained=trained, policy=policy)
    betas = [karras_beta(step) for step in range(1, 6)]
    history = training_steps(trio, inputs, betas)
    expected = {name: torch.zeros_like(tensor) for name, tensor in history[0].items()}
    for t, weights in enumerate(history):
        share = (1 - betas[t]) * float(torch.tensor(betas[t + 1 :]).prod())
        for name, tensor in weights.items():
            expected[name] += share * tensor
    for name, average in trio.ema_parameters().items():
        torch.testing.assert_close(average.detach(), expected[name], atol=1e-5, rtol=0)
        if not name.endswith("logweights.bias"):
            assert not torch.equal(average.detach(), history[-1][name]), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_one_base_and_two_students(family: str, policy: str, make_case: MakeCase) -> None:
    """With LoRA: parameters = base + 2·(LoRA + head); with full training 3 models, 2 new heads."""
    backbone, _ = make_case(family)
    base = sum(p.numel() for p in backbone.module.parameters())
    output = sum(p.numel() for p in backbone.output_layer().parameters())
    shared = make(copy.deepcopy(backbone), policy=policy)
    separate = make(backbone, trained="full", policy=policy)
    student = sum(p.numel() for p in shared.trainable_parameters().values())
    head = sum(p.numel() for p in separate.head.parameters())

    def total(trio: Trio) -> int:
        return sum(p.numel() for module in trio.modules for p in module.parameters())

    assert head < student < head + base
    assert total(shared) == base + 2 * student
    assert total(separate) == base + 2 * (base - output + head)


@trained
@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_student_is_trained(policy: str, trained: str, make_case: MakeCase) -> None:
    """In whatever order the roles were called; and all of the student is."""
    backbone, inputs = make_case("flux")
    trio = make(backbone, trained=trained, policy=policy)
    disturb(trio)
    trio.ema(*inputs)
    trio.teacher_velocity(*inputs)
    x, sigma, _ = inputs
    trio.student(*inputs).velocity(x, 0.5 * sigma).square().mean().backward()
    student = {id(parameter) for parameter in trio.trainable_parameters().values()}
    for module in trio.modules:
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == (id(parameter) in student), name
            assert (parameter.grad is not None) == (id(parameter) in student), name


# ------------------------------------------------------------------------------------------- names


@trained
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_student_and_ema_have_the_same_names(
    family: str, policy: str, trained: str, make_case: MakeCase
) -> None:
    trio = make(make_case(family)[0], trained=trained, policy=policy)
    student, ema = trio.trainable_parameters(), trio.ema_parameters()
    assert list(student) == list(ema)
    for name in student:
        assert student[name] is not ema[name]
        assert torch.equal(student[name], ema[name])


def test_names_are_the_published_ones(make_case: MakeCase) -> None:
    student = make(make_case("flux")[0]).trainable_parameters()
    assert "single_transformer_blocks.0.proj_out.lora_A.weight" in student
    assert "time_text_embed.timestep_embedder.linear_1.lora_B.weight" in student
    assert "proj_out.lora_A.weight" not in student
    assert "norm_out.linear.weight" in student and "proj_out_means.bias" in student


def test_names_of_full_training_are_the_models_and_the_heads(
    flux_config: dict[str, Any],
) -> None:
    model = FluxTransformer2DModel(**flux_config)
    trio = make(FluxBackbone(copy.deepcopy(model)), trained="full", policy="grid")
    assert set(trio.trainable_parameters()) == set(model.state_dict())
    gm = make(FluxBackbone(model), trained="full").trainable_parameters()
    assert {"x_embedder.weight", "norm_out.linear.weight", "proj_out_means.weight"} <= set(gm)
    assert "proj_out.weight" not in gm


def test_default_targets_are_the_papers(flux_folder: Path) -> None:
    names = {n.rpartition(".lora_")[0] for n in build(flux_folder).trainable_parameters()} - {""}
    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    assert names == {
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        f"{block}.ff.net.0.proj",
        f"{block}.ff.net.2",
        f"{block}.ff_context.net.0.proj",
        f"{block}.ff_context.net.2",
        f"{single}.proj_mlp",
        f"{single}.proj_out",
    }


def test_own_targets(flux_folder: Path) -> None:
    trio = build(flux_folder, lora=LoRAConfig(rank=2, targets=["attn.to_q", "to_out.0"]))
    lora = [name for name in trio.trainable_parameters() if "lora_A" in name]
    assert lora == [
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "single_transformer_blocks.0.attn.to_q.lora_A.weight",
    ]


@pytest.mark.parametrize("target", ["attn.to_quu", "norm_out.linear", "oj_mlp"])
def test_target_without_a_match(target: str, flux_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"'{target}' matches no linear layer"):
        build(flux_folder, lora=LoRAConfig(rank=2, targets=[target]))


def test_target_without_a_match_lists_near_ones(flux_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"close to it: .*attn\.to_q\b"):
        build(flux_folder, lora=LoRAConfig(rank=2, targets=["attn.to_quu"]))


def test_no_target_at_all(flux_folder: Path) -> None:
    with pytest.raises(ValueError, match="lora.targets names no layer .* set lora to null"):
        build(flux_folder, lora=LoRAConfig(rank=2, targets=[]))


# ------------------------------------------------------------------------------------------- modes


@trained
def test_gradient_checkpointing_changes_nothing(
    trained: str, flux_folder: Path, flux_inputs: Any
) -> None:
    """The backward pass recomputes the student though a teacher call came in between."""
    lora = None if trained == "full" else LoRAConfig(rank=4, dropout=0.5)
    gradients = []
    for checkpointing in (False, True):
        trio = build(flux_folder, lora=lora)
        disturb(trio)
        if checkpointing:
            trio.enable_gradient_checkpointing()
        torch.manual_seed(7)
        policy = trio.student(*flux_inputs)
        trio.teacher_velocity(*flux_inputs)
        trio.ema(*flux_inputs)
        policy.velocity(flux_inputs[0], 0.5 * flux_inputs[1]).square().mean().backward()
        gradients.append({n: p.grad for n, p in trio.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_lora_dropout_acts_on_the_student_in_training_alone(
    flux_folder: Path, flux_inputs: Any
) -> None:
    trio = build(flux_folder, lora=LoRAConfig(rank=4, dropout=0.5))
    disturb(trio)
    ema_update(
        list(trio.ema_parameters().values()), list(trio.trainable_parameters().values()), 0.0
    )
    assert not torch.equal(student_velocity(trio, flux_inputs), student_velocity(trio, flux_inputs))
    ema = [trio.ema(*flux_inputs).velocity(*flux_inputs[:2]) for _ in range(2)]
    assert torch.equal(ema[0], ema[1])
    trio.train(False)
    assert torch.equal(student_velocity(trio, flux_inputs), ema[0])


def test_only_the_students_module_is_ever_in_training_mode(make_case: MakeCase) -> None:
    trio = make(make_case("dit")[0], trained="full")
    teacher, student, ema = trio.modules
    assert student.training and not teacher.training and not ema.training
    trio.train(False)
    assert not student.training


@trained
def test_only_the_generator_decides(trained: str, flux_folder: Path) -> None:
    lora = TRAINED[trained]
    torch.manual_seed(3)
    one = build(flux_folder, lora=lora).trainable_parameters()
    torch.manual_seed(4)
    same = build(flux_folder, lora=lora).trainable_parameters()
    other = build(flux_folder, lora=lora, seed=1).trainable_parameters()
    assert all(torch.equal(same[name], parameter) for name, parameter in one.items())
    name = "proj_out_means.bias"
    assert not torch.equal(other[name], one[name])


def test_bfloat16_base_keeps_float32_adapters(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder, dtype="bfloat16")
    weights = {*trio.trainable_parameters().values(), *trio.ema_parameters().values()}
    (module,) = trio.modules
    assert {p.dtype for p in weights} == {torch.float32}
    assert {p.dtype for p in module.parameters() if p not in weights} == {torch.bfloat16}
    assert student_velocity(trio, flux_inputs).dtype == torch.float32


def test_full_training_of_a_bfloat16_teacher_is_in_float32(
    flux_folder: Path, flux_inputs: Any
) -> None:
    trio = build(flux_folder, lora=None, dtype="bfloat16")
    teacher, student, ema = trio.modules
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in [*student.parameters(), *ema.parameters()]} == {torch.float32}
    tokens = trio.backbone.output_tokens(*flux_inputs)
    assert tokens.dtype == torch.float32


def test_a_shared_backbone_is_taken_over_once(make_case: MakeCase) -> None:
    backbone = make(make_case("flux")[0]).backbone
    with pytest.raises(ValueError, match="load a fresh backbone for each trio"):
        make(backbone)


def test_a_recipe_without_a_student(flux_folder: Path) -> None:
    recipe = parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused"},
            "embed": {"prompts": "p", "store": "s", "height": 8, "width": 8},
            "objective": {"type": "flow_matching"},
        }
    )
    with pytest.raises(ValueError, match="expected objective.type pi_id, got flow_matching"):
        build_trio(recipe)


def test_the_student_is_active_again_after_an_error(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder)
    disturb(trio)
    before = student_velocity(trio, flux_inputs)
    x, sigma, cond = flux_inputs
    with pytest.raises(ValueError, match="one sigma"):
        trio.teacher_velocity(x, sigma[:1], cond)
    assert torch.equal(student_velocity(trio, flux_inputs), before)


# ---------------------------------------------------------------------------------------- guidance


def test_guided_teacher_is_the_formula(flux_folder: Path, flux_inputs: Any) -> None:
    """u = u_pos + (g-1)(u_pos - u_neg) inside the interval, u_pos outside."""
    x, sigma, cond = flux_inputs
    trio = build(flux_folder)
    negative = Conditioning(torch.zeros(1, 4, 6), torch.tensor([1]), torch.zeros(1, 5))
    config = GuidanceConfig(scale=3.0, interval=(0.0, 0.7))
    guided = GuidedTeacher(trio, cond, negative, config)(x, sigma)
    u_pos = trio.teacher_velocity(x, sigma, cond)
    u_neg = trio.teacher_velocity(x, sigma, negative.expand(3))
    expected = u_pos + 2 * (u_pos - u_neg)
    torch.testing.assert_close(guided[1:], expected[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(guided[:1], u_pos[:1], atol=1e-5, rtol=0)


def test_unguided_teacher_needs_no_negative(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    teacher = GuidedTeacher(backbone, cond, None, GuidanceConfig(scale=1.0))
    assert torch.equal(teacher(x, sigma), backbone.teacher_velocity(x, sigma, cond))
    with pytest.raises(ValueError, match="needs the negative prompt's conditioning"):
        GuidedTeacher(backbone, cond, None, GuidanceConfig(scale=2.0))
