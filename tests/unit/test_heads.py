from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from piflow.config import GMFlowPolicyConfig
from piflow.heads import GMHead, TeacherHead, split_gm

WIDTH, CHANNELS, K, TOKENS = 16, 3, 5, 6
POLICY = GMFlowPolicyConfig(num_gaussians=K, logstd_inner_dim=8)


@pytest.fixture
def teacher() -> TeacherHead:
    torch.manual_seed(0)
    norm = AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False, eps=1e-6)
    return TeacherHead(norm, nn.Linear(WIDTH, 4 * CHANNELS))


def make(teacher: TeacherHead, *, seed: int = 0, bias_noise: float = 0.05) -> GMHead:
    return GMHead.from_teacher(
        teacher.norm_out,
        teacher.proj_out,
        POLICY,
        generator=torch.Generator().manual_seed(seed),
        bias_noise=bias_noise,
    )


def run(head: GMHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return split_gm(head(torch.randn(2, TOKENS, WIDTH), torch.randn(2, WIDTH)), K)


def test_every_component_starts_as_the_teacher(teacher: TeacherHead) -> None:
    means, logweights, logstds = run(make(teacher, bias_noise=0.0))
    torch.manual_seed(1)
    expected = teacher(torch.randn(2, TOKENS, WIDTH), torch.randn(2, WIDTH))
    for component in means.unflatten(-1, (K, 4 * CHANNELS)).unbind(-2):
        torch.testing.assert_close(component, expected, atol=1e-6, rtol=0)
    assert torch.equal(logweights, torch.zeros(2, TOKENS, 4 * K))
    torch.testing.assert_close(logstds, torch.full((2,), math.log(0.05)))


def test_bias_noise_is_per_component_and_channel_and_shared_by_positions(
    teacher: TeacherHead,
) -> None:
    clean, noisy = make(teacher, bias_noise=0.0), make(teacher)
    noise = (noisy.proj_out_means.bias - clean.proj_out_means.bias).reshape(K, CHANNELS, 4)
    torch.testing.assert_close(noise, noise[..., :1].expand(-1, -1, 4))
    assert len(noise[..., 0].flatten().unique()) == K * CHANNELS
    assert torch.equal(noisy.proj_out_means.weight, clean.proj_out_means.weight)


def test_bias_noise_has_its_std(teacher: TeacherHead) -> None:
    policy = GMFlowPolicyConfig(num_gaussians=2000, logstd_inner_dim=8)
    head = GMHead.from_teacher(
        teacher.norm_out, teacher.proj_out, policy, generator=torch.Generator().manual_seed(0)
    )
    noise = head.proj_out_means.bias.reshape(2000, -1) - teacher.proj_out.bias
    assert noise.std().item() == pytest.approx(0.05, rel=0.05)


def test_only_the_generator_decides(teacher: TeacherHead) -> None:
    one, same, other = make(teacher), make(teacher), make(teacher, seed=1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
    assert not torch.equal(other.proj_out_means.bias, one.proj_out_means.bias)


def test_names_are_the_published_ones(teacher: TeacherHead) -> None:
    kinds = ("weight", "bias")
    layers = ("norm_out.linear", "proj_out_means", "proj_out_logweights")
    layers += ("proj_out_logstds.1", "proj_out_logstds.3")
    assert set(make(teacher).state_dict()) == {f"{n}.{kind}" for n in layers for kind in kinds}


def test_logstd_sends_no_gradient_into_the_time_embedding(teacher: TeacherHead) -> None:
    head = make(teacher)
    nn.init.ones_(head.get_parameter("proj_out_logstds.3.weight"))
    temb = torch.randn(2, WIDTH, requires_grad=True)
    means, _, logstds = split_gm(head(torch.randn(2, TOKENS, WIDTH), temb), K)
    (gradient,) = torch.autograd.grad(logstds.sum(), temb, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(means.sum(), temb)
    assert gradient.any()


def test_bfloat16_teacher_gets_a_float32_head(teacher: TeacherHead) -> None:
    head = make(teacher.bfloat16())
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    assert head(hidden, hidden[:, 0]).dtype == torch.float32
    assert teacher.proj_out.weight.dtype == torch.bfloat16, "the teacher is left as it was"
