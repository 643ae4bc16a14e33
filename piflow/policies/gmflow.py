"""The GMFlow policy: the exact posterior mean under a predicted Gaussian mixture.

Source: arXiv 2510.14974, section 3, and arXiv 2504.05304; the formulas are in `mixture`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from piflow.policies.base import SIGMA_MIN, per_sample, to_device, working_dtype
from piflow.policies.mixture import CenteredMixture, Mixture

FUSED_LIMIT = 64
"""The fused kernel holds a pixel's K x C means in registers, up to this many of each."""


class GMFlowPolicy:
    """A student's output as a mixture over x0, and the velocity field that it implies.

    Args:
        means: (B, K, C, H, W) or (B, K, C, T, H, W), velocity space.
        logstds: (B, 1, 1, 1, 1), or with one more 1 for 5-D latents; velocity space.
        logweights: (B, K, 1, H, W), or with T; log-softmax over K (a constant over K cancels).
        x_src: (B, C, H, W) or (B, C, T, H, W), the latents that the student saw.
        sigma_src: (B,), their noise level in (0, 1].

    Everything is computed in float32, or in float64 if any input is float64.

    Raises:
        ValueError: shapes don't fit together.
    """

    def __init__(
        self,
        means: Tensor,
        logstds: Tensor,
        logweights: Tensor,
        x_src: Tensor,
        sigma_src: Tensor,
    ) -> None:
        _check_shapes(means, logstds, logweights, x_src)
        dtype = working_dtype(means, logstds, logweights, x_src)
        latents = x_src.to(dtype)
        sigma = per_sample(sigma_src, latents, "sigma_src").detach()  # times carry no gradient
        variance = (2 * logstds.to(dtype)).exp().reshape(-1) * sigma.square()
        weights = logweights.to(dtype).squeeze(2).flatten(2)
        self.latent_shape = x_src.shape
        self.mixture: Mixture = make_mixture(
            means.flatten(3), weights, variance, latents.flatten(2), sigma
        )

    @classmethod
    def from_mixture(cls, mixture: Mixture, latent_shape: torch.Size) -> GMFlowPolicy:
        """A policy over a mixture in x0 space; `latent_shape` is that of x_src."""
        policy = cls.__new__(cls)
        policy.latent_shape = latent_shape
        policy.mixture = mixture
        return policy

    @property
    def num_gaussians(self) -> int:
        """K."""
        return self.mixture.logweights.shape[1]

    def posterior_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] under the mixture; x as x_src, sigma (B,)."""
        # x - sigma u = x0_hat: one Euler step over the whole of sigma
        noise_level = per_sample(sigma, self.flatten(x), "sigma").clamp(min=SIGMA_MIN)
        return self.integrate(x, noise_level[None], -noise_level[None])

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(x - E[x0 | x]) / sigma at x (as x_src) and sigma (B,)."""
        flat = self.flatten(x)
        noise_level = per_sample(sigma, flat, "sigma")[None]
        # an Euler step of delta = 1 moves by u; x - x0_hat over a small sigma would lose its digits
        displacement = self.mixture.displacement(flat, noise_level, torch.ones_like(noise_level))
        return displacement.reshape(self.latent_shape)

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """Euler steps x <- x + delta u from x (as x_src); sigmas and deltas (n, B)."""
        return self.mixture.integrate(self.flatten(x), sigmas, deltas).reshape(self.latent_shape)

    def flatten(self, x: Tensor) -> Tensor:
        """Latents (B, C, ...) -> (B, C, P) in the policy's dtype, checked."""
        if x.shape != self.latent_shape:
            raise ValueError(
                f"GMFlowPolicy: expected latents {tuple(self.latent_shape)} as x_src, "
                f"got {tuple(x.shape)}"
            )
        return x.to(self.mixture.logweights.dtype).flatten(2)

    def detach(self) -> GMFlowPolicy:
        """The same field without gradient."""
        return GMFlowPolicy.from_mixture(self.mixture.detach(), self.latent_shape)

    def dropout(self, p: float, generator: torch.Generator | None = None) -> GMFlowPolicy:
        """Drop each component with probability `p` per sample, never all of them.

        If every component of a sample falls, the one with the largest draw stays.

        Args:
            p: in [0, 1).
            generator: source of the (B, K) uniform draws; drawn on its device.

        Raises:
            ValueError: `p` outside [0, 1).
        """
        if not 0 <= p < 1:
            raise ValueError(f"dropout: expected p in [0, 1), got {p}; 0 turns it off")
        if p == 0:
            return self
        logweights = self.mixture.logweights
        device = generator.device if generator is not None else logweights.device
        draws = torch.rand(logweights.shape[:2], generator=generator, device=device)
        dropped = (draws < p) & (draws < draws.amax(1, keepdim=True))
        mask = to_device(dropped, logweights.device)[:, :, None]
        mixture = self.mixture.reweighted(
            logweights.masked_fill(mask, -torch.inf), self.mixture.variance
        )
        return GMFlowPolicy.from_mixture(mixture, self.latent_shape)

    def temperature(self, temperature: float) -> GMFlowPolicy:
        """Sharpen the mixture: logweights / T renormalised, variance * T.

        Args:
            temperature: T >= 0. T = 1 changes nothing; T = 0 is the limit: only the heaviest
                component (ties share equally), without spread.

        Raises:
            ValueError: negative or not finite.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a finite T >= 0, got {temperature}; 1 turns it off"
            )
        if temperature == 1:
            return self
        logweights = self.mixture.logweights
        # relative to the heaviest, else a small T would divide all of them into -infinity
        gap = logweights - logweights.amax(1, keepdim=True)
        sharpened = gap / temperature if temperature > 0 else torch.where(gap < 0, -torch.inf, 0.0)
        mixture = self.mixture.reweighted(
            torch.log_softmax(sharpened.to(logweights.dtype), dim=1),
            self.mixture.variance * temperature,
        )
        return GMFlowPolicy.from_mixture(mixture, self.latent_shape)


def make_mixture(
    velocities: Tensor, logweights: Tensor, variance: Tensor, x_src: Tensor, sigma_src: Tensor
) -> Mixture:
    """The mixture of means in velocity space (B, K, C, P), by the fastest form that can run it.

    The fused kernel reads the means as they come, so it takes them before anything is computed
    from them.
    """
    if runs_fused(velocities, x_src.dtype):
        from piflow.policies.gmflow_triton import FusedMixture

        return FusedMixture(velocities, logweights, variance, x_src, sigma_src)
    means = velocities.to(x_src.dtype)
    return CenteredMixture.from_velocities(means, logweights, variance, x_src, sigma_src)


def runs_fused(velocities: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel runs means (B, K, C, P) when computing in `dtype`; else PyTorch."""
    small = max(velocities.shape[1:3]) <= FUSED_LIMIT
    return velocities.is_cuda and dtype == torch.float32 and small and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def auto_temperature(nfe: int) -> float:
    """The default sampling temperature clip(0.1 (nfe - 1), 0, 1), for all steps but the last."""
    return min(max(0.1 * (nfe - 1), 0.0), 1.0)


def _check_shapes(means: Tensor, logstds: Tensor, logweights: Tensor, x_src: Tensor) -> None:
    if x_src.ndim not in (4, 5):
        raise ValueError(
            "GMFlowPolicy: expected x_src (B, C, H, W) or (B, C, T, H, W), got "
            f"{tuple(x_src.shape)}; add the missing dimensions"
        )
    batch, channels, *space = x_src.shape
    components = means.shape[1] if means.ndim > 1 else 0
    expected = {
        "means": (means, (batch, components, channels, *space)),
        "logweights": (logweights, (batch, components, 1, *space)),
        "logstds": (logstds, (batch, *[1] * (x_src.ndim))),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"GMFlowPolicy: expected {name} {shape} for x_src {tuple(x_src.shape)} and "
                f"{components} components, got {tuple(tensor.shape)}"
            )
