"""The GMFlow policy: the exact posterior mean under a predicted Gaussian mixture.

Source: arXiv 2510.14974, section 3, and arXiv 2504.05304. Per latent pixel the posterior mean is
attention over K keys, keys = values = the component means, so it is written with inner products
over channels; nothing of size K x C x pixels is made besides the means themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from piflow.policies.base import (
    SIGMA_MIN,
    expand_as_latents,
    per_sample,
    recomputed,
    working_dtype,
)
from piflow.policies.contraction import contract_channels, mix_components

_DENOMINATOR_MIN = 1e-6
_SPAN_SUBSTEPS = 8
"""Rollouts of fewer substeps don't earn back what the Gram matrix costs (benchmarks/policy.py)."""


class PosteriorScalars(NamedTuple):
    """Per-sample numbers of the posterior at one sigma, each (B, 1, 1); nu = a x - b x_src."""

    a: Tensor
    b: Tensor
    zeta: Tensor
    denominator: Tensor


class StepScalars(NamedTuple):
    """Per-sample numbers of one Euler step, each (B, 1, 1).

    weights = softmax(logweights + inverse_d (scores)) with scores <e_k, a x + minus_b x_src +
    minus_zeta (c + e_k / 2)>; x <- keep x + source x_src + pull (c + sum_k weights_k e_k).
    """

    a: Tensor
    minus_b: Tensor
    minus_zeta: Tensor
    inverse_d: Tensor
    keep: Tensor
    source: Tensor
    pull: Tensor


class Gram(NamedTuple):
    """Inner products over channels that a rollout in the means' span needs."""

    means: Tensor
    """<m_k, e_j> at [b, k, j], (B, K, K, P)."""
    x_src: Tensor
    """<x_src, e_j>, (B, K, P)."""
    threshold: Tensor
    """<c + e_j / 2, e_j>, (B, K, P)."""


class SpanState(NamedTuple):
    """A rollout's x in the span of what it can reach."""

    inner: Tensor
    """<e_k, x>, (B, K, P)."""
    coefficients: Tensor
    """x's coefficient on each e_k, (B, K, P)."""
    start: Tensor
    """x's coefficient on the rollout's first x, (B, 1, 1)."""
    x_src: Tensor
    """x's coefficient on x_src, (B, 1, 1)."""
    center: Tensor
    """x's coefficient on the center, (B, 1, 1)."""


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture over x0 a pixel, space flattened to P pixels.

    The means are kept as center + offset, m_k = c + e_k: component scores are then differences of
    small numbers, not small differences of large ones, which matters in float32 at low sigma.

    center (B, C, P), the plain average of the means; offsets (B, K, C, P) and their squared norms
    over channels (B, K, P); logweights (B, K, P), up to a constant over K; variance (B,),
    isotropic; the state that the mixture was predicted from: x_src (B, C, P), sigma_src (B,).
    """

    center: Tensor
    offsets: Tensor
    squared_offsets: Tensor
    logweights: Tensor
    variance: Tensor
    x_src: Tensor
    sigma_src: Tensor

    def scalars(self, sigma: Tensor) -> PosteriorScalars:
        """The coefficients of the posterior at `sigma` (B,)."""
        sigma = sigma.clamp(min=SIGMA_MIN)
        sigma_src = self.sigma_src.clamp(min=SIGMA_MIN)
        rho = (1 - sigma) / sigma
        rho_src = (1 - sigma_src) / sigma_src
        zeta = rho.square() - rho_src.square()
        denominator = (self.variance * zeta + 1).clamp(min=_DENOMINATOR_MIN)
        numbers = (rho / sigma, rho_src / sigma_src, zeta, denominator)
        return PosteriorScalars(*(number[:, None, None] for number in numbers))

    def step_scalars(self, sigma: Tensor, delta: Tensor) -> StepScalars:
        """The coefficients of one Euler step x + delta u from `sigma`; both (B,)."""
        a, b, zeta, d = self.scalars(sigma)
        share = (-delta / sigma.clamp(min=SIGMA_MIN))[:, None, None]
        variance = self.variance[:, None, None]
        keep = 1 - share + share * variance * a / d
        return StepScalars(a, -b, -zeta, 1 / d, keep, -share * variance * b / d, share / d)

    def gram(self) -> Gram:
        """The inner products that rollouts in the means' span need."""
        on_center = contract_channels(self.offsets, self.center)
        rows = [contract_channels(self.offsets, row) + on_center for row in self.offsets.unbind(1)]
        return Gram(
            torch.stack(rows, dim=1),
            contract_channels(self.offsets, self.x_src),
            on_center + 0.5 * self.squared_offsets,
        )

    def posterior_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] (B, C, P) at x (B, C, P), sigma (B,).

        nu is formed before any inner product, so that at (x_src, sigma_src) it is exactly zero and
        the same formula gives the mixture's mean.
        """
        a, b, zeta, d = self.scalars(sigma)
        nu = a * x - b * self.x_src
        scores = contract_channels(self.offsets, nu - zeta * self.center)
        logits = self.logweights + (scores - 0.5 * zeta * self.squared_offsets) / d
        mixed = mix_components(self.offsets, torch.softmax(logits, dim=1))
        return (self.variance[:, None, None] * nu + self.center + mixed) / d

    def euler_step(self, x: Tensor, sigma: Tensor, delta: Tensor) -> Tensor:
        """x + delta u with every number a sample folded; x (B, C, P), sigma and delta (B,)."""
        scalars = self.step_scalars(sigma, delta)
        query = torch.addcmul(scalars.a * x, scalars.minus_b, self.x_src)
        query = torch.addcmul(query, scalars.minus_zeta, self.center)
        scores = contract_channels(self.offsets, query)
        scores = torch.addcmul(scores, 0.5 * scalars.minus_zeta, self.squared_offsets)
        weights = torch.softmax(torch.addcmul(self.logweights, scores, scalars.inverse_d), dim=1)
        moved = torch.addcmul(scalars.keep * x, scalars.source, self.x_src)
        return torch.addcmul(
            moved, scalars.pull, self.center + mix_components(self.offsets, weights)
        )

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """Euler steps x <- x + delta u from x (B, C, P); tables (n, B)."""
        for sigma, delta in zip(sigmas.unbind(0), deltas.unbind(0), strict=True):
            x = recomputed(self.euler_step, x, sigma, delta)
        return x

    def integrate_in_span(self, x: Tensor, gram: Gram, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """`integrate` on the Gram matrix.

        x never leaves span{x, x_src, c, e_1 .. e_K}: it is followed through its inner products
        with the offsets, its coefficients on the offsets and three numbers a sample, at K^2
        instead of 2 K C multiplications a pixel and substep.
        """
        inner = contract_channels(self.offsets, x)
        one = torch.ones_like(self.variance)[:, None, None]
        zero = torch.zeros_like(one)
        state = SpanState(inner, torch.zeros_like(inner), one, zero, zero)
        for sigma, delta in zip(sigmas.unbind(0), deltas.unbind(0), strict=True):
            state = recomputed(self.span_step, gram, state, sigma, delta)
        anchors = state.start * x + state.x_src * self.x_src + state.center * self.center
        return anchors + mix_components(self.offsets, state.coefficients)

    def span_step(self, gram: Gram, state: SpanState, sigma: Tensor, delta: Tensor) -> SpanState:
        """`euler_step` on a `SpanState`."""
        scalars = self.step_scalars(sigma, delta)
        scores = torch.addcmul(scalars.a * state.inner, scalars.minus_b, gram.x_src)
        scores = torch.addcmul(scores, scalars.minus_zeta, gram.threshold)
        weights = torch.softmax(torch.addcmul(self.logweights, scores, scalars.inverse_d), dim=1)
        keep, source, pull = scalars.keep, scalars.source, scalars.pull
        inner = torch.addcmul(keep * state.inner, source, gram.x_src)
        return SpanState(
            torch.addcmul(inner, pull, mix_components(gram.means, weights)),
            torch.addcmul(keep * state.coefficients, pull, weights),
            keep * state.start,
            keep * state.x_src + source,
            keep * state.center + pull,
        )

    def detach(self) -> Mixture:
        """The same numbers without gradient."""
        return Mixture(
            self.center.detach(),
            self.offsets.detach(),
            self.squared_offsets.detach(),
            self.logweights.detach(),
            self.variance.detach(),
            self.x_src.detach(),
            self.sigma_src.detach(),
        )


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
        sigma = per_sample(sigma_src, latents, "sigma_src")
        sigma_all = expand_as_latents(sigma, means)
        velocities = means.to(dtype)
        average = velocities.mean(1)
        variance = (2 * logstds.to(dtype)).exp().reshape(-1) * sigma.square()
        self.latent_shape = x_src.shape
        self._gram: Gram | None = None
        offsets = (sigma_all * (average.unsqueeze(1) - velocities)).flatten(3)
        self.mixture = Mixture(
            (latents - expand_as_latents(sigma, latents) * average).flatten(2),
            offsets,
            offsets.square().sum(2),
            logweights.to(dtype).squeeze(2).flatten(2),
            variance,
            latents.flatten(2),
            sigma,
        )

    @classmethod
    def from_mixture(cls, mixture: Mixture, latent_shape: torch.Size) -> GMFlowPolicy:
        """A policy over a mixture in x0 space; `latent_shape` is that of x_src."""
        policy = cls.__new__(cls)
        policy.latent_shape = latent_shape
        policy.mixture = mixture
        policy._gram = None
        return policy

    @property
    def num_gaussians(self) -> int:
        """K."""
        return self.mixture.offsets.shape[1]

    def posterior_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] under the mixture; x as x_src, sigma (B,)."""
        flat = self.flatten(x)
        noise_level = per_sample(sigma, flat, "sigma")
        return self.mixture.posterior_mean(flat, noise_level).reshape(self.latent_shape)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(x - E[x0 | x]) / sigma at x (as x_src) and sigma (B,)."""
        latents = x.to(self.mixture.x_src.dtype)
        noise_level = per_sample(sigma, latents, "sigma").clamp(min=SIGMA_MIN)
        return (latents - self.posterior_mean(x, sigma)) / expand_as_latents(noise_level, latents)

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        """Euler steps x <- x + delta u from x (as x_src); sigmas and deltas (n, B).

        Long rollouts with K < 2 C run on the Gram matrix, which is kept for the policy's next
        rollout if it has no gradient.
        """
        flat = self.flatten(x)
        components, channels = self.mixture.offsets.shape[1:3]
        pays = components < 2 * channels and len(sigmas) >= _SPAN_SUBSTEPS
        if self._gram is None and not pays:
            return self.mixture.integrate(flat, sigmas, deltas).reshape(x.shape)
        gram = self._gram if self._gram is not None else self.mixture.gram()
        if not gram.means.requires_grad:
            self._gram = gram
        return self.mixture.integrate_in_span(flat, gram, sigmas, deltas).reshape(x.shape)

    def flatten(self, x: Tensor) -> Tensor:
        """Latents (B, C, ...) -> (B, C, P) in the policy's dtype, checked."""
        if x.shape != self.latent_shape:
            raise ValueError(
                f"GMFlowPolicy: expected latents {tuple(self.latent_shape)} as x_src, "
                f"got {tuple(x.shape)}"
            )
        return x.to(self.mixture.x_src.dtype).flatten(2)

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
        offsets = self.mixture.offsets
        device = generator.device if generator is not None else offsets.device
        draws = torch.rand(offsets.shape[:2], generator=generator, device=device)
        dropped = (draws < p) & (draws < draws.amax(1, keepdim=True))
        mask = dropped.to(offsets.device, non_blocking=offsets.is_cuda)[:, :, None]
        logweights = self.mixture.logweights.masked_fill(mask, -torch.inf)
        return GMFlowPolicy.from_mixture(
            replace(self.mixture, logweights=logweights), self.latent_shape
        )

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
        gap = logweights - logweights.amax(1, keepdim=True)
        sharpened = gap / temperature if temperature > 0 else torch.where(gap < 0, -torch.inf, 0.0)
        mixture = replace(
            self.mixture,
            logweights=torch.log_softmax(sharpened.to(logweights.dtype), dim=1),
            variance=self.mixture.variance * temperature,
        )
        return GMFlowPolicy.from_mixture(mixture, self.latent_shape)


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
