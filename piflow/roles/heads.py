"""Policy output heads, their initialisation from the teacher, and the router between roles.

A head is what a student has in place of its teacher's output layer. It turns hidden states into one
tensor of tokens, so that the transformer's output stays one, and knows how to read a policy from
those tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from piflow.backbones.base import PATCH, OutputLayer
from piflow.config.objective import DXPolicyConfig, GMFlowPolicyConfig, PolicyConfig
from piflow.policies import DXPolicy, GMFlowPolicy
from piflow.schedule import FewStep

INITIAL_STD = 0.05  # of the mixture components at the start
BIAS_NOISE = 0.05  # std of the noise that makes the K equal components differ

Unpack = Callable[[Tensor, int, int], Tensor]
"""(tokens (B, T, p²F), height, width) -> (B, F, H, W), such as a backbone's `unpack`."""


@dataclass(frozen=True)
class PolicyClock:
    """The times that a DX policy is a function of, fixed in training and kept at inference.

    Attributes:
        segment_size: length of a segment in raw time, in (0, 1].
        shift: time shift of the noise schedule.
    """

    segment_size: float
    shift: float

    @classmethod
    def of(cls, few_step: FewStep) -> PolicyClock:
        """That of a student of this schedule."""
        return cls(few_step.segment_size, few_step.shift)

    def require_spans(self, few_step: FewStep) -> None:
        """Refuses a schedule in whose segments the policy isn't defined.

        A policy says what x0 is from its start down to one segment of the trained length; shorter
        segments lie within that.

        Raises:
            ValueError: another shift, or longer segments.
        """
        size = few_step.segment_size
        if abs(few_step.shift - self.shift) > 1e-6 or size > self.segment_size + 1e-6:
            raise ValueError(
                f"this DX student was trained for shift {self.shift:g} and segments of "
                f"{self.segment_size:g}, the schedule has shift {few_step.shift:g} and segments of "
                f"{size:g}: set shift as trained, and no fewer steps or larger "
                "final_step_size_scale than trained"
            )


class GMHead(nn.Module):
    """The Gaussian mixture's output layer (arXiv 2510.14974, section 3), float32.

    Its mixture's mean starts as the teacher's velocity, up to the bias noise: K copies of the
    teacher's projection, equal weights, std 0.05. Parameters carry the published adapter format's
    names.

    Args:
        output: the teacher's output layer, of any float dtype, on any device; it is copied.
        policy: K and the log-std MLP's width.
        generator: a CPU generator; the values don't depend on the device.
        bias_noise: std of the noise on the means' bias, drawn once per (component, latent channel)
            and shared by the patch's positions.
    """

    def __init__(
        self,
        output: OutputLayer,
        policy: GMFlowPolicyConfig,
        *,
        generator: torch.Generator,
        bias_noise: float = BIAS_NOISE,
    ) -> None:
        super().__init__()
        features, width = output.projection.weight.shape
        positions = output.patch_size**2
        components, channels = policy.num_gaussians, features // positions
        self.num_gaussians = components
        self.patch_size = output.patch_size
        self.norm_out = _trainable_copy(output.norm)
        self.proj_out_means = nn.Linear(width, components * features)
        self.proj_out_logweights = nn.Linear(width, components * positions)
        inner = nn.Linear(time_width(output), policy.logstd_inner_dim)
        last = nn.Linear(policy.logstd_inner_dim, 1)
        self.proj_out_logstds = nn.Sequential(nn.SiLU(), inner, nn.SiLU(), last)

        noise = bias_noise * torch.randn(components, channels, 1, generator=generator)
        weight, bias = _float_parameters(output.projection)
        with torch.no_grad():
            self.proj_out_means.weight.copy_(weight.repeat(components, 1))
            self.proj_out_means.bias.copy_((bias.reshape(1, channels, positions) + noise).flatten())
        nn.init.zeros_(self.proj_out_logweights.weight)
        nn.init.zeros_(self.proj_out_logweights.bias)
        nn.init.xavier_uniform_(inner.weight, generator=generator)
        nn.init.zeros_(inner.bias)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(INITIAL_STD))
        self.to(output.projection.weight.device)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, t)` -> `(B, T, p²KC + p²K + 1)`: means, log-weights, log-std.

        The log-std sees the time embedding detached: its gradient would otherwise reach, and
        destabilise, the embedding through a single scalar.
        """
        dtype = self.proj_out_means.weight.dtype
        hidden, temb = hidden.to(dtype), temb.to(dtype)
        normed = self.norm_out(hidden, temb)
        logstds = self.proj_out_logstds(temb.detach())[:, None, :].expand(-1, hidden.shape[1], -1)
        return torch.cat(
            [self.proj_out_means(normed), self.proj_out_logweights(normed), logstds], dim=-1
        )

    def policy(self, tokens: Tensor, unpack: Unpack, x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        """The mixture that `forward`'s tokens stand for, from `x` `(B, C, H, W)`, sigma `(B,)`."""
        height, width = x.shape[-2:]
        means, logweights, logstds = split_gm(tokens.float(), self.num_gaussians, self.patch_size)
        return GMFlowPolicy(
            means=unpack(means, height, width).unflatten(1, (self.num_gaussians, -1)),
            logstds=logstds[:, None, None, None, None],
            logweights=unpack(logweights, height, width)[:, :, None].log_softmax(dim=1),
            x_src=x,
            sigma_src=sigma,
        )


def time_width(output: OutputLayer) -> int:
    """The time embedding's width t, which the output layer's adaptive norm takes.

    In FLUX, SD3 and others it is the transformer's own d; families with a narrower one exist.
    """
    linear = (layer for layer in output.norm.modules() if isinstance(layer, nn.Linear))
    layer = next(linear, output.projection)
    return layer.in_features


def split_gm(
    tokens: Tensor, num_gaussians: int, patch_size: int = PATCH
) -> tuple[Tensor, Tensor, Tensor]:
    """`(B, T, p²KC + p²K + 1)` -> means `(B, T, p²KC)`, log-weights `(B, T, p²K)`, log-std `(B,)`.

    Args:
        patch_size: p.
    """
    weights = num_gaussians * patch_size**2
    means, logweights, logstds = tokens.split([tokens.shape[-1] - weights - 1, weights, 1], dim=-1)
    return means, logweights, logstds[:, 0, 0]


class DXHead(nn.Module):
    """The DX policy's output layer (arXiv 2510.14974, section 3), float32.

    *grid*: the teacher's projection N_g times; polynomials: the projection, then zeros. So at the
    start the policy has the teacher's x0 all along the segment; but for *polynomial* only at its
    start, since zeros beyond the first stand for x0 = x_src, as published. Parameters carry the
    published adapter format's names.

    Args:
        output: the teacher's output layer, of any float dtype, on any device; it is copied.
        policy: mode and N_g.
        clock: the segment's length and the time shift.
    """

    def __init__(self, output: OutputLayer, policy: DXPolicyConfig, clock: PolicyClock) -> None:
        super().__init__()
        features, width = output.projection.weight.shape
        points = policy.num_points
        self.num_points = points
        self.patch_size = output.patch_size
        self.mode = policy.mode
        self.clock = clock
        self.norm_out = _trainable_copy(output.norm)
        self.proj_out = nn.Linear(width, points * features)

        weight, bias = _float_parameters(output.projection)
        copies = points if policy.mode == "grid" else 1
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        with torch.no_grad():
            self.proj_out.weight[: copies * features] = weight.repeat(copies, 1)
            self.proj_out.bias[: copies * features] = bias.repeat(copies)
        self.to(output.projection.weight.device)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, t)` -> `(B, T, p² N_g C)`: the values, velocity space."""
        dtype = self.proj_out.weight.dtype
        values: Tensor = self.proj_out(self.norm_out(hidden.to(dtype), temb.to(dtype)))
        return values

    def policy(self, tokens: Tensor, unpack: Unpack, x: Tensor, sigma: Tensor) -> DXPolicy:
        """The policy that `forward`'s tokens stand for, from `x` `(B, C, H, W)`, sigma `(B,)`."""
        height, width = x.shape[-2:]
        values = unpack(tokens.float(), height, width).unflatten(1, (self.num_points, -1))
        return DXPolicy(values, x, sigma, self.clock.segment_size, self.clock.shift, self.mode)


PolicyHead = GMHead | DXHead


def build_head(
    output: OutputLayer,
    policy: PolicyConfig,
    clock: PolicyClock | None,
    *,
    generator: torch.Generator,
    bias_noise: float = BIAS_NOISE,
) -> PolicyHead:
    """The policy's head, initialised from the teacher's output layer, on its device, float32.

    Args:
        clock: DX only.
        generator: a CPU generator, GM only; the values don't depend on the device.
        bias_noise: GM only.

    Raises:
        ValueError: a DX policy without a clock.
    """
    if isinstance(policy, GMFlowPolicyConfig):
        return GMHead(output, policy, generator=generator, bias_noise=bias_noise)
    if clock is None:
        raise ValueError(
            "a DX policy needs the segment_size and shift that it is trained with, got no clock: "
            "pass PolicyClock.of(few_step)"
        )
    return DXHead(output, policy, clock)


class OutputRouter(nn.Module):
    """The model's last layer: one output head a role, and which of them is on.

    `role` is set by `piflow.roles.trio` alone.
    """

    def __init__(self, teacher: OutputLayer, heads: dict[str, PolicyHead], role: str) -> None:
        super().__init__()
        self.teacher = teacher
        self.heads = nn.ModuleDict(heads)
        self.role = role

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, d)` -> `(B, T, F)`, F as the role's head has it."""
        head = self.teacher if self.role == "teacher" else self.heads[self.role]
        output: Tensor = head(hidden, temb)
        return output


def _trainable_copy(norm: nn.Module) -> nn.Module:
    """An independent float32 copy."""
    return copy.deepcopy(norm).float().requires_grad_(True)


def _float_parameters(projection: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias as float32 values on the CPU; a bias that isn't there is zero."""
    weight = projection.weight.detach().float().cpu()
    bias: Tensor | None = projection.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float().cpu()
