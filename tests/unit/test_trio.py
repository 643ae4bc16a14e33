from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import Conditioning, FluxBackbone
from piflow.config import GMFlowPolicyConfig, GuidanceConfig, LoRAConfig, ModelConfig
from piflow.trio import GuidedTeacher, Trio

LORA = LoRAConfig(rank=4, dropout=0.0)
POLICY = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8)


def build(folder: Path, *, lora: LoRAConfig = LORA, seed: int = 0, dtype: Any = "float32") -> Trio:
    model = ModelConfig(path=str(folder), dtype=dtype)
    return Trio.build(model, lora, POLICY, generator=torch.Generator().manual_seed(seed))


def disturb(trio: Trio, *, seed: int = 0) -> None:
    """Moves every trained weight, so that roles can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def student_velocity(trio: Trio, inputs: Any) -> torch.Tensor:
    x, sigma, _ = inputs
    return trio.student(*inputs).velocity(x, sigma).detach()


def test_student_starts_as_the_teacher(flux_folder: Path, flux_inputs: Any) -> None:
    """Without bias noise the mixture's mean is the teacher's velocity."""
    x, sigma, _ = flux_inputs
    trio = Trio.from_backbone(
        FluxBackbone.load(flux_folder),
        LORA,
        POLICY,
        generator=torch.Generator().manual_seed(0),
        bias_noise=0.0,
    )
    expected = trio.teacher_velocity(*flux_inputs)
    torch.testing.assert_close(student_velocity(trio, flux_inputs), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        trio.ema(*flux_inputs).velocity(x, sigma), expected, atol=2e-6, rtol=0
    )


def test_bias_noise_moves_the_start_a_little(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder)
    shift = student_velocity(trio, flux_inputs) - trio.teacher_velocity(*flux_inputs)
    assert 0 < shift.abs().max() < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_is_bit_equal_to_the_untouched_model(
    dtype: Any, flux_folder: Path, flux_inputs: Any
) -> None:
    trio = build(flux_folder, dtype=dtype)
    disturb(trio)
    trio.student(*flux_inputs)
    trio.ema(*flux_inputs)
    untouched = FluxBackbone.load(flux_folder, dtype=getattr(torch, dtype))
    assert torch.equal(
        trio.teacher_velocity(*flux_inputs), untouched.teacher_velocity(*flux_inputs)
    )


def test_only_the_student_is_trained(flux_folder: Path, flux_inputs: Any) -> None:
    """In whatever order the roles were called."""
    trio = build(flux_folder)
    trio.ema(*flux_inputs)
    trio.teacher_velocity(*flux_inputs)
    x, sigma, _ = flux_inputs
    trio.student(*flux_inputs).velocity(x, 0.5 * sigma).square().mean().backward()
    trained = {id(parameter) for parameter in trio.trainable_parameters().values()}
    for name, parameter in trio.module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_student_and_ema_have_the_same_names(flux_folder: Path) -> None:
    trio = build(flux_folder)
    student, ema = trio.trainable_parameters(), trio.ema_parameters()
    assert list(student) == list(ema)
    assert "single_transformer_blocks.0.proj_out.lora_A.weight" in student
    assert "time_text_embed.timestep_embedder.linear_1.lora_B.weight" in student
    assert "proj_out.lora_A.weight" not in student
    for name in student:
        assert student[name] is not ema[name]
        assert torch.equal(student[name], ema[name])


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


def test_update_ema(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder)
    before = {name: p.clone() for name, p in trio.ema_parameters().items()}
    disturb(trio)
    ema_before = trio.ema(*flux_inputs).velocity(*flux_inputs[:2])
    trio.update_ema(0.75)
    student = trio.trainable_parameters()
    for name, average in trio.ema_parameters().items():
        expected = 0.75 * before[name] + 0.25 * student[name]
        torch.testing.assert_close(average.detach(), expected.detach(), atol=1e-6, rtol=0)
    trio.update_ema(0.0)
    ema_after = trio.ema(*flux_inputs).velocity(*flux_inputs[:2])
    assert torch.equal(ema_after, student_velocity(trio, flux_inputs))
    assert not torch.allclose(ema_after, ema_before)


def test_gradient_checkpointing_changes_nothing(flux_folder: Path, flux_inputs: Any) -> None:
    """The backward pass recomputes the student though a teacher call came in between."""
    gradients = []
    for checkpointing in (False, True):
        trio = build(flux_folder, lora=LoRAConfig(rank=4, dropout=0.5))
        disturb(trio)
        if checkpointing:
            trio.backbone.enable_gradient_checkpointing()
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
    trio.update_ema(0.0)
    assert not torch.equal(student_velocity(trio, flux_inputs), student_velocity(trio, flux_inputs))
    ema = [trio.ema(*flux_inputs).velocity(*flux_inputs[:2]) for _ in range(2)]
    assert torch.equal(ema[0], ema[1])
    trio.train(False)
    assert torch.equal(student_velocity(trio, flux_inputs), ema[0])


def test_only_the_generator_decides(flux_folder: Path) -> None:
    torch.manual_seed(3)
    one = build(flux_folder).trainable_parameters()
    torch.manual_seed(4)
    same = build(flux_folder).trainable_parameters()
    other = build(flux_folder, seed=1).trainable_parameters()
    assert all(torch.equal(same[name], parameter) for name, parameter in one.items())
    lora = "single_transformer_blocks.0.proj_mlp.lora_A.weight"
    assert not torch.equal(other[lora], one[lora])


def test_bfloat16_base_keeps_float32_adapters(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder, dtype="bfloat16")
    trained = {*trio.trainable_parameters().values(), *trio.ema_parameters().values()}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in trio.module.parameters() if p not in trained} == {torch.bfloat16}
    assert student_velocity(trio, flux_inputs).dtype == torch.float32


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


def test_a_backbone_is_taken_over_once(flux_folder: Path) -> None:
    backbone = build(flux_folder).backbone
    with pytest.raises(ValueError, match="load a fresh backbone for each trio"):
        Trio.from_backbone(backbone, LORA, POLICY, generator=torch.Generator())


def test_the_student_is_active_again_after_an_error(flux_folder: Path, flux_inputs: Any) -> None:
    trio = build(flux_folder)
    disturb(trio)
    before = student_velocity(trio, flux_inputs)
    x, sigma, cond = flux_inputs
    with pytest.raises(ValueError, match="one sigma"):
        trio.teacher_velocity(x, sigma[:1], cond)
    assert torch.equal(student_velocity(trio, flux_inputs), before)


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
    with pytest.raises(ValueError, match="needs the empty prompt's conditioning"):
        GuidedTeacher(backbone, cond, None, GuidanceConfig(scale=2.0))
