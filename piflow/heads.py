"""Policy output heads, their initialisation from the teacher, and the router between roles."""

from __future__ import annotations

import copy
import math

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from piflow.config import GMFlowPolicyConfig

PATCH_POSITIONS = 4  # a token is a 2×2 patch
OUTPUT_LAYERS = ("norm_out", "proj_out")  # what a student replaces of its base
INITIAL_STD = 0.05  # of the mixture components at the start
BIAS_NOISE = 0.05  # std of the noise that makes the K equal components differ


class TeacherHead(nn.Module):
    """The teacher's own output layer, frozen: `proj_out(norm_out(hidden, temb))`."""

    def __init__(self, norm_out: nn.Module, proj_out: nn.Linear) -> None:
        super().__init__()
        self.norm_out = norm_out
        self.proj_out = proj_out

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, d)` -> `(B, T, 4C)`."""
        output: Tensor = self.proj_out(self.norm_out(hidden, temb))
        return output


class GMHead(nn.Module):
    """The Gaussian mixture's output layer (arXiv 2510.14974, section 3), float32.

    Its parameters carry the published adapter format's names.

    Args:
        width: the transformer's hidden size d.
        token_channels: C times the patch's 4 positions.
        num_gaussians: components K.
        logstd_inner_dim: width of the log-std MLP.
    """

    def __init__(
        self, width: int, token_channels: int, num_gaussians: int, logstd_inner_dim: int
    ) -> None:
        super().__init__()
        self.token_channels = token_channels
        self.num_gaussians = num_gaussians
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out_means = nn.Linear(width, num_gaussians * token_channels)
        self.proj_out_logweights = nn.Linear(width, num_gaussians * PATCH_POSITIONS)
        inner, last = nn.Linear(width, logstd_inner_dim), nn.Linear(logstd_inner_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(INITIAL_STD))
        self.proj_out_logstds = nn.Sequential(nn.SiLU(), inner, nn.SiLU(), last)

    @classmethod
    def from_teacher(
        cls,
        norm_out: nn.Module,
        proj_out: nn.Linear,
        policy: GMFlowPolicyConfig,
        *,
        generator: torch.Generator,
        bias_noise: float = BIAS_NOISE,
    ) -> GMHead:
        """A head whose mixture mean is the teacher's velocity, up to the bias noise.

        Args:
            norm_out, proj_out: the teacher's output layer, of any float dtype, on any device.
            policy: K and the log-std MLP's width.
            generator: a CPU generator; the values don't depend on the device.
            bias_noise: std of the noise on the means' bias, drawn once per (component, latent
                channel) and shared by the patch's positions.
        """
        token_channels, width = proj_out.weight.shape
        head = cls(width, token_channels, policy.num_gaussians, policy.logstd_inner_dim)
        head.norm_out.load_state_dict(copy.deepcopy(norm_out).float().cpu().state_dict())
        components, channels = policy.num_gaussians, token_channels // PATCH_POSITIONS
        noise = bias_noise * torch.randn(components, channels, 1, generator=generator)
        with torch.no_grad():
            weight, bias = proj_out.weight.float().cpu(), proj_out.bias.float().cpu()
            head.proj_out_means.weight.copy_(weight.repeat(components, 1))
            head.proj_out_means.bias.copy_(
                (bias.reshape(1, channels, PATCH_POSITIONS) + noise).flatten()
            )
            nn.init.zeros_(head.proj_out_logweights.weight)
            nn.init.zeros_(head.proj_out_logweights.bias)
            inner = head.get_parameter("proj_out_logstds.1.weight")
            nn.init.xavier_uniform_(inner, generator=generator)
            nn.init.zeros_(head.get_parameter("proj_out_logstds.1.bias"))
        return head.to(proj_out.weight.device)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, d)` -> `(B, T, 4KC + 4K + 1)`: means, log-weights, log-std.

        One tensor, so that the transformer's output stays one; `split_gm` takes it apart. The
        log-std sees the time embedding detached: its gradient would otherwise reach, and
        destabilise, the embedding through a single scalar.
        """
        dtype = self.proj_out_means.weight.dtype
        hidden, temb = hidden.to(dtype), temb.to(dtype)
        normed = self.norm_out(hidden, temb)
        logstds = self.proj_out_logstds(temb.detach())[:, None, :].expand(-1, hidden.shape[1], -1)
        return torch.cat(
            [self.proj_out_means(normed), self.proj_out_logweights(normed), logstds], dim=-1
        )


def split_gm(tokens: Tensor, num_gaussians: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(B, T, 4KC + 4K + 1)` -> means `(B, T, 4KC)`, log-weights `(B, T, 4K)`, log-std `(B,)`."""
    weights = num_gaussians * PATCH_POSITIONS
    means, logweights, logstds = tokens.split([tokens.shape[-1] - weights - 1, weights, 1], dim=-1)
    return means, logweights, logstds[:, 0, 0]


class OutputRouter(nn.Module):
    """The model's last layer: one output head a role, and which of them is on.

    It stands where the transformer's `norm_out` was. `role` is set by `piflow.trio.Trio` alone.
    """

    def __init__(self, teacher: TeacherHead, heads: dict[str, GMHead], role: str) -> None:
        super().__init__()
        self.teacher = teacher
        self.heads = nn.ModuleDict(heads)
        self.role = role

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, d)` -> `(B, T, F)`, F as the role's head has it."""
        head = self.teacher if self.role == "teacher" else self.heads[self.role]
        output: Tensor = head(hidden, temb)
        return output
