from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from piflow.backbones.base import OutputLayer, unpack
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, PolicyConfig
from piflow.roles.heads import (
    DXHead,
    GMHead,
    OutputRouter,
    PolicyClock,
    PolicyHead,
    build_head,
    split_gm,
)
from piflow.schedule import FewStep, FlowSchedule, segments

WIDTH, CHANNELS, K, TOKENS = 16, 3, 5, 6
HEIGHT, COLUMNS = 4, 6  # of the latents: 6 tokens
GM = GMFlowPolicyConfig(num_gaussians=K, logstd_inner_dim=8)
CLOCK = PolicyClock(segment_size=0.4, shift=3.2)


@pytest.fixture
def teacher() -> OutputLayer:
    torch.manual_seed(0)
    norm = AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False, eps=1e-6)
    return OutputLayer(norm, nn.Linear(WIDTH, 4 * CHANNELS))


def make(teacher: OutputLayer, *, seed: int = 0, bias_noise: float = 0.05) -> GMHead:
    return GMHead(teacher, GM, generator=torch.Generator().manual_seed(seed), bias_noise=bias_noise)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, TOKENS, WIDTH, generator=generator)
    return hidden, torch.randn(2, WIDTH, generator=generator)


def run(head: GMHead) -> tuple[Tensor, Tensor, Tensor]:
    return split_gm(head(*inputs()), K)


# ---------------------------------------------------------------------------------------------- GM


def test_every_component_starts_as_the_teacher(teacher: OutputLayer) -> None:
    means, logweights, logstds = run(make(teacher, bias_noise=0.0))
    expected = teacher(*inputs())
    for component in means.unflatten(-1, (K, 4 * CHANNELS)).unbind(-2):
        torch.testing.assert_close(component, expected, atol=1e-6, rtol=0)
    assert torch.equal(logweights, torch.zeros(2, TOKENS, 4 * K))
    torch.testing.assert_close(logstds, torch.full((2,), math.log(0.05)))


@pytest.mark.parametrize("policy", [GM, DXPolicyConfig(num_points=2)], ids=["gm", "dx"])
def test_a_time_embedding_narrower_than_the_model(policy: PolicyConfig) -> None:
    """The log-std's MLP takes it as it is; the head still starts as the teacher."""
    norm = AdaLayerNormContinuous(WIDTH, 8, elementwise_affine=False, eps=1e-6)
    teacher = OutputLayer(norm, nn.Linear(WIDTH, 4 * CHANNELS))
    generator = torch.Generator().manual_seed(0)
    head = build_head(teacher, policy, CLOCK, generator=generator, bias_noise=0.0)
    hidden, temb = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 8)
    tokens = head(hidden, temb)[..., : 4 * CHANNELS]
    torch.testing.assert_close(tokens, teacher(hidden, temb), atol=1e-6, rtol=0)


def test_bias_noise_is_per_component_and_channel_and_shared_by_positions(
    teacher: OutputLayer,
) -> None:
    clean, noisy = make(teacher, bias_noise=0.0), make(teacher)
    noise = (noisy.proj_out_means.bias - clean.proj_out_means.bias).reshape(K, CHANNELS, 4)
    torch.testing.assert_close(noise, noise[..., :1].expand(-1, -1, 4))
    assert len(noise[..., 0].flatten().unique()) == K * CHANNELS
    assert torch.equal(noisy.proj_out_means.weight, clean.proj_out_means.weight)


def test_bias_noise_has_its_std(teacher: OutputLayer) -> None:
    policy = GMFlowPolicyConfig(num_gaussians=1000, logstd_inner_dim=8)
    head = GMHead(teacher, policy, generator=torch.Generator().manual_seed(0))
    noise = head.proj_out_means.bias.reshape(1000, -1) - teacher.projection.bias
    assert noise.std().item() == pytest.approx(0.05, rel=0.05)


def test_only_the_generator_decides(teacher: OutputLayer) -> None:
    one, same, other = make(teacher), make(teacher), make(teacher, seed=1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
    assert not torch.equal(other.proj_out_means.bias, one.proj_out_means.bias)


def test_gm_names_are_the_published_ones(teacher: OutputLayer) -> None:
    kinds = ("weight", "bias")
    layers = ("norm_out.linear", "proj_out_means", "proj_out_logweights")
    layers += ("proj_out_logstds.1", "proj_out_logstds.3")
    assert set(make(teacher).state_dict()) == {f"{n}.{kind}" for n in layers for kind in kinds}


def test_logstd_sends_no_gradient_into_the_time_embedding(teacher: OutputLayer) -> None:
    head = make(teacher)
    nn.init.ones_(head.get_parameter("proj_out_logstds.3.weight"))
    temb = torch.randn(2, WIDTH, requires_grad=True)
    means, _, logstds = split_gm(head(torch.randn(2, TOKENS, WIDTH), temb), K)
    (gradient,) = torch.autograd.grad(logstds.sum(), temb, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(means.sum(), temb)
    assert gradient.any()


def test_a_mixture_is_read_component_major_then_channel_then_position(
    teacher: OutputLayer,
) -> None:
    """A token is (K, latent channel, 2, 2), its log-weights (K, 1, 2, 2)."""
    means = torch.arange(4 * K * CHANNELS).float()
    logweights = torch.full((K, 4), -100.0)
    logweights[3, :2], logweights[1, 2:] = 0.0, 0.0  # the patch's upper row, its lower row
    token = torch.cat([means, logweights.flatten(), torch.tensor([-20.0])])
    x, sigma = torch.zeros(1, CHANNELS, HEIGHT, COLUMNS), torch.ones(1)
    policy = make(teacher).policy(token.expand(1, TOKENS, -1), unpack, x, sigma)
    components = means.reshape(K, CHANNELS, 2, 2)
    expected = torch.stack([components[3, :, 0], components[1, :, 1]], dim=1)
    velocity = policy.velocity(x, sigma)[0]
    torch.testing.assert_close(velocity, expected.repeat(1, HEIGHT // 2, COLUMNS // 2))


# ---------------------------------------------------------------------------------------------- DX


@pytest.mark.parametrize("mode", ["grid", "velocity_polynomial"])
def test_a_dx_policy_starts_as_the_teachers_x0(mode: str, teacher: OutputLayer) -> None:
    """At every time of the segment, not only at its start."""
    policy_config = DXPolicyConfig(mode=mode, num_points=K)
    head = DXHead(teacher, policy_config, CLOCK)
    x = torch.randn(2, CHANNELS, HEIGHT, COLUMNS, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([1.0, 0.8])
    policy = head.policy(head(*inputs()), unpack, x, sigma)
    velocity = unpack(teacher(*inputs()), HEIGHT, COLUMNS)
    expected = x - sigma[:, None, None, None] * velocity
    for share in (1.0, 0.7, 0.3):
        torch.testing.assert_close(policy.denoised(share * sigma), expected, atol=1e-5, rtol=0)


def test_a_published_polynomial_starts_as_the_teacher_at_its_start(teacher: OutputLayer) -> None:
    """Elsewhere zeros beyond the first value stand for x0 = x_src."""
    head = DXHead(teacher, DXPolicyConfig(mode="polynomial", num_points=K), CLOCK)
    x = torch.randn(2, CHANNELS, HEIGHT, COLUMNS, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([1.0, 0.8])
    policy = head.policy(head(*inputs()), unpack, x, sigma)
    velocity = unpack(teacher(*inputs()), HEIGHT, COLUMNS)
    torch.testing.assert_close(policy.velocity(x, sigma), velocity, atol=1e-5, rtol=0)
    schedule = FlowSchedule(CLOCK.shift)
    later = 0.5 * sigma
    step = (schedule.tau(sigma) - schedule.tau(later))[:, None, None, None]
    expected = x - sigma[:, None, None, None] * velocity + x * sum(step**i for i in range(1, K))
    torch.testing.assert_close(policy.denoised(later), expected, atol=1e-5, rtol=0)


def test_dx_values_are_read_point_major(teacher: OutputLayer) -> None:
    """A token is (N_g, 4C); the grid's first value is the segment's end, its last the start."""
    head = DXHead(teacher, DXPolicyConfig(num_points=2), CLOCK)
    tokens = torch.cat(
        [torch.zeros(1, TOKENS, 4 * CHANNELS), torch.ones(1, TOKENS, 4 * CHANNELS)], 2
    )
    x, sigma = torch.zeros(1, CHANNELS, HEIGHT, COLUMNS), torch.ones(1)
    policy = head.policy(tokens, unpack, x, sigma)
    end = FlowSchedule(CLOCK.shift).sigma(torch.tensor([1 - CLOCK.segment_size]))
    torch.testing.assert_close(policy.denoised(sigma), x - 1)
    torch.testing.assert_close(policy.denoised(end), x)


def test_dx_names_are_the_published_ones(teacher: OutputLayer) -> None:
    state = DXHead(teacher, DXPolicyConfig(num_points=10), CLOCK).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "norm_out.linear.weight": (2 * WIDTH, WIDTH),
        "norm_out.linear.bias": (2 * WIDTH,),
        "proj_out.weight": (10 * 4 * CHANNELS, WIDTH),
        "proj_out.bias": (10 * 4 * CHANNELS,),
    }


@pytest.mark.parametrize(("nfe", "scale"), [(1, 1.0), (1, 0.5), (2, 0.5), (4, 0.5), (8, 0.25)])
def test_a_clock_is_the_first_segments_length(nfe: int, scale: float) -> None:
    clock = PolicyClock.of(FewStep(nfe, scale, shift=2.0, total_substeps=128))
    assert clock.segment_size == pytest.approx(segments(nfe, scale)[0].size)
    assert clock.shift == 2.0


# -------------------------------------------------------------------------------------------- both


def heads(teacher: OutputLayer) -> list[PolicyHead]:
    return [make(teacher), DXHead(teacher, DXPolicyConfig(num_points=2), CLOCK)]


@pytest.mark.parametrize("index", [0, 1])
def test_bfloat16_teacher_gets_a_float32_head(index: int, teacher: OutputLayer) -> None:
    head = heads(teacher.bfloat16().requires_grad_(False))[index]
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in head.parameters())
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    assert head(hidden, hidden[:, 0]).dtype == torch.float32
    assert teacher.projection.weight.dtype == torch.bfloat16, "the teacher is left as it was"


@pytest.mark.parametrize("index", [0, 1])
def test_a_head_shares_nothing_with_the_teacher(index: int, teacher: OutputLayer) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in heads(teacher)[index].parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())


def test_build_head_by_policy(teacher: OutputLayer) -> None:
    generator = torch.Generator().manual_seed(0)
    assert isinstance(build_head(teacher, GM, None, generator=generator), GMHead)
    assert isinstance(build_head(teacher, DXPolicyConfig(), CLOCK, generator=generator), DXHead)
    with pytest.raises(ValueError, match="a DX policy needs the segment_size and shift"):
        build_head(teacher, DXPolicyConfig(), None, generator=generator)


def test_router_answers_as_the_role_that_is_on(teacher: OutputLayer) -> None:
    gm, dx = heads(teacher)
    router = OutputRouter(teacher, {"student": gm, "ema": dx}, "student")
    for role, expected in {"student": gm, "ema": dx, "teacher": teacher}.items():
        router.role = role
        assert torch.equal(router(*inputs()), expected(*inputs()))
