"""Teacher guidance: classifier-free, limited to an interval, optionally orthogonal.

Source: arXiv 2510.14974, section 5 (teacher settings); orthogonal projection as in arXiv
2410.02416.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from piflow.flow import Velocity
from piflow.policies.base import expand_as_latents, working_dtype


def guided_velocity(
    u_pos: Tensor,
    u_neg: Tensor,
    scale: float,
    active: Tensor | None = None,
    orthogonal: float = 0.0,
    x0_pos: Tensor | None = None,
    norm_patch: int | None = None,
) -> Tensor:
    """u = u_pos + (g - 1)(u_pos - u_neg) where guidance is active, else u_pos.

    Args:
        u_pos, u_neg: velocities (B, C, ...) under the positive and the negative condition.
        scale: g; 1 is no guidance.
        active: (B,) bool, samples that are guided; None = all.
        orthogonal: share in [0, 1] of the bias's component along `x0_pos` that is taken out.
        x0_pos: (B, C, ...), the positive branch's x0 = x - sigma u_pos; needed if orthogonal > 0.
        norm_patch: side p of patches, of latents (B, C, H, W), in each of which u is scaled to
            u_pos's norm, as the pipelines of Qwen-Image do; None: u stays as it is.

    Returns:
        (B, C, ...), float32 (float64 if a velocity is).

    Raises:
        ValueError: shapes differ, `orthogonal` outside [0, 1], or `x0_pos` missing.
    """
    if u_pos.shape != u_neg.shape:
        raise ValueError(
            f"guided_velocity: expected velocities of one shape, got {tuple(u_pos.shape)} and "
            f"{tuple(u_neg.shape)}"
        )
    _check_orthogonal(orthogonal)
    dtype = working_dtype(u_pos, u_neg)
    positive = u_pos.to(dtype)
    bias = positive - u_neg.to(dtype)
    if orthogonal > 0:
        if x0_pos is None:
            raise ValueError("guided_velocity: orthogonal > 0 needs x0_pos; pass x - sigma * u_pos")
        bias = bias - orthogonal * _projection(bias, x0_pos.to(dtype))
    strength = torch.full((len(positive),), scale - 1.0, dtype=dtype, device=positive.device)
    if active is not None:
        strength = strength * active.to(positive.device)
    guided = positive + expand_as_latents(strength, positive) * bias
    if norm_patch is None:
        return guided
    wanted, found = _patch_norms(positive, norm_patch), _patch_norms(guided, norm_patch)
    return guided * (wanted / found.clamp_min(torch.finfo(dtype).tiny))


def guidance_active(sigma: Tensor, interval: tuple[float, float]) -> Tensor:
    """Which samples (B,) have their sigma inside the closed `interval` (low, high)."""
    low, high = interval
    return (sigma >= low) & (sigma <= high)


def guided_teacher(
    doubled: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    orthogonal: float = 0.0,
    norm_patch: int | None = None,
) -> Velocity:
    """A guided teacher (x, sigma) -> u that calls the network once, on a doubled batch.

    Args:
        doubled: (x (2B, ...), sigma (2B,)) -> u (2B, ...); its first half is conditioned on the
            prompts, its second on the negative prompts.
        scale, orthogonal, norm_patch: as in `guided_velocity`.
        interval: sigmas (low, high) at which guidance is on, both included.

    Raises:
        ValueError: an interval with low > high, or `orthogonal` outside [0, 1].

    The network is always called on the doubled batch, also where guidance is off: under sharding
    all workers must make the same calls.
    """
    low, high = interval
    if low > high:
        raise ValueError(
            f"guided_teacher: expected interval (low, high) with low <= high, got ({low}, {high})"
        )
    _check_orthogonal(orthogonal)

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        u_pos, u_neg = doubled(torch.cat([x, x]), torch.cat([sigma, sigma])).chunk(2)
        active = guidance_active(sigma, interval)
        x0_pos = x - expand_as_latents(sigma, x) * u_pos if orthogonal > 0 else None
        return guided_velocity(u_pos, u_neg, scale, active, orthogonal, x0_pos, norm_patch)

    return teacher


def _check_orthogonal(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(
            f"expected orthogonal in [0, 1], got {share}; it is the share of the guidance along x0 "
            "that is taken out"
        )


def _patch_norms(u: Tensor, patch: int) -> Tensor:
    """Each patch's norm over its channels and pixels, at all of its pixels, (B, 1, H, W)."""
    squares = u.square().sum(1, keepdim=True)
    norms = (F.avg_pool2d(squares, patch) * patch**2).sqrt()
    return norms.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def _projection(vector: Tensor, axis: Tensor) -> Tensor:
    """The component of `vector` along `axis`, per sample over all other dimensions."""
    # an axis of zeros has no direction: 0 / tiny is 0 where 0 / 0 would be NaN
    flat_axis = axis.flatten(1)
    length = flat_axis.square().sum(1).clamp(min=torch.finfo(axis.dtype).tiny)
    share = (vector.flatten(1) * flat_axis).sum(1) / length
    return expand_as_latents(share, vector) * axis
