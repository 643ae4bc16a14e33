"""A Gaussian mixture over x0 per latent pixel, and the flow that it implies.

Source: arXiv 2510.14974, section 3, and arXiv 2504.05304. With rho = (1 - sigma) / sigma, the
posterior mean of x0 under weights, means m_k and one variance v is

    zeta = rho^2 - rho_src^2      nu = rho x / sigma - rho_src x_src / sigma_src      d = v zeta + 1
    logit_k = logweight_k + (<m_k, nu> - zeta |m_k|^2 / 2) / d
    x0_hat = (v nu + sum_k softmax(logit)_k m_k) / d

which is attention over K keys, keys = values = m_k. It is computed around the means' plain
average c, with m_k = c + e_k. A state is y = x - c, the source's own is drift = x_src - c =
sigma_src (mean velocity), and since rho / sigma = rho^2 + rho, everything collects to

    q = (rho y / sigma - rho_src drift / sigma_src + (rho - rho_src) c) / d
    w = softmax(logweight + <e_k, q> - zeta |e_k|^2 / (2 d))
    x0_hat - c = v q + sum_k w_k e_k / d

At low sigma, y and e_k are small (of order sigma) where x and m_k aren't, so that float32 loses
little to differences of large numbers; at (x_src, sigma_src) q is exactly zero. An Euler step
x + delta u with s = -delta / sigma is

    y <- (1 - s) y + s v q + (s / d) sum_k w_k e_k
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from piflow.policies.euler import Gram, displace, displace_in_span, step_table

_SPAN_SUBSTEPS = 6
"""Rollouts of fewer substeps don't earn back what the Gram matrix costs (benchmarks/policy.py)."""


class Mixture(Protocol):
    """A mixture a pixel, space flattened to P pixels, with its flow from (x_src, sigma_src)."""

    @property
    def logweights(self) -> Tensor:
        """(B, K, P), up to a constant over K; -inf takes a component out."""
        ...

    @property
    def variance(self) -> Tensor:
        """(B,), isotropic, of x0."""
        ...

    def displacement(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """How far x (B, C, P) moves in Euler steps x + delta u at sigma; tables (n, B).

        Differentiable in the mixture and in x, not in the times.
        """
        ...

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """x + `displacement`."""
        ...

    def reweighted(self, logweights: Tensor, variance: Tensor) -> Self:
        """The same means with other log-weights and another variance."""
        ...

    def detach(self) -> Self:
        """The same numbers without gradient."""
        ...


@dataclass(frozen=True)
class CenteredMixture:
    """A `Mixture` in plain PyTorch, kept as center + offset, m_k = c + e_k.

    center c, drift x_src - c and x_src (B, C, P); offsets e_k (B, K, C, P) and their squared norms
    over channels (B, K, P), which carry no gradient of their own; logweights (B, K, P); variance
    and sigma_src (B,). All of one dtype.
    """

    center: Tensor
    drift: Tensor
    offsets: Tensor
    squared_offsets: Tensor
    logweights: Tensor
    variance: Tensor
    x_src: Tensor
    sigma_src: Tensor

    @classmethod
    def from_velocities(
        cls,
        velocities: Tensor,
        logweights: Tensor,
        variance: Tensor,
        x_src: Tensor,
        sigma_src: Tensor,
    ) -> CenteredMixture:
        """From means in velocity space (B, K, C, P): m_k = x_src - sigma_src velocity_k."""
        average = velocities.mean(1)
        drift = sigma_src[:, None, None] * average
        offsets = sigma_src[:, None, None, None] * (average.unsqueeze(1) - velocities)
        squares = offsets.detach().square().sum(2)
        return cls(x_src - drift, drift, offsets, squares, logweights, variance, x_src, sigma_src)

    def displacement(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """Differentiable in the mixture and in x.

        Long rollouts without gradient and with K < 2 C run on the Gram matrix, which is kept for
        the mixture's next rollout.
        """
        table = step_table(self.sigma_src, self.variance.detach(), sigmas, deltas)
        # Not x - c: where x is x_src, y must be the drift to the last bit.
        start = (x - self.x_src) + self.drift
        components, channels = self.offsets.shape[1:3]
        differentiable = torch.is_grad_enabled() and self._requires_grad(start)
        if not differentiable and components < 2 * channels and len(sigmas) >= _SPAN_SUBSTEPS:
            return displace_in_span(
                self._gram, self.offsets, self.squared_offsets, self.center, self.drift,
                self.logweights, start, table,
            )  # fmt: skip
        return displace(
            self.offsets, self.squared_offsets, self.center, self.drift, self.logweights,
            self.variance, start, table, differentiable,
        )  # fmt: skip

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        return x + self.displacement(x, sigmas, deltas)

    def reweighted(self, logweights: Tensor, variance: Tensor) -> CenteredMixture:
        return replace(self, logweights=logweights, variance=variance)

    def detach(self) -> CenteredMixture:
        return CenteredMixture(
            self.center.detach(),
            self.drift.detach(),
            self.offsets.detach(),
            self.squared_offsets,
            self.logweights.detach(),
            self.variance.detach(),
            self.x_src.detach(),
            self.sigma_src.detach(),
        )

    def _requires_grad(self, start: Tensor) -> bool:
        tensors = (start, self.center, self.offsets, self.logweights, self.variance)
        return any(tensor.requires_grad for tensor in tensors)

    @cached_property
    def _gram(self) -> Gram:
        return Gram.of(self.offsets, self.drift, self.center)
