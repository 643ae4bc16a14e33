"""A GM policy's whole rollout in one Triton kernel, forward and backward; formulas in `mixture`.

A program holds a few pixels, mostly 32, of one sample. It reads their K x C means once, as the
network made them (any floating-point dtype), centers them in registers, and takes all of the
sample's substeps there; substeps that move nothing are skipped, so a sample that is done costs
nothing. The numbers of a substep (`StepTable`'s) are a handful of scalars, computed in place from
the host's table of sigma and delta: made beforehand on the device, where the variance is, they
would be a chain of tiny launches that outlasts the kernel.

The backward recomputes. A step has no closed inverse (its weights depend on where it started), and
taking the first k steps again for every k would make the work quadratic, so the program runs the
forward once more and keeps y before each substep in a scratch buffer, C numbers a pixel and
substep, then walks back through it. The buffer belongs to the program: the backward launches a
bounded number of programs, each taking one block of pixels after the other, so the buffer's size
doesn't grow with the batch or the picture and it stays in the L2 cache. Nothing of size n K C is
ever made; the gradient of the means is summed in registers and written once.

Everything is float32 inside. Pixels are the lanes of a warp and K and C lie in the registers of
one thread, as long as they fit, so the sums over them need no exchange between threads. That is
why `pixels` isn't specialised: knowing its divisibility, Triton would give four pixels to a thread
and spread K over the lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from piflow.policies.base import SIGMA_MIN
from piflow.policies.euler import DENOMINATOR_MIN

LANES = 32
"""Threads a warp, and pixels a program unless K C is very large."""
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs of the backward, about as many as run at once; bounds its scratch buffer."""
_FORWARD_ELEMENTS = 128
"""Means that one thread of the forward holds in registers, of at most 255."""
_BACKWARD_ELEMENTS = 32
"""The same in the backward, which holds the means' gradients and two products beside them."""
_MAX_WARPS = 8
"""More would leave a thread fewer registers than 255."""

_SIGMA_MIN = tl.constexpr(SIGMA_MIN)
_DENOMINATOR_MIN = tl.constexpr(DENOMINATOR_MIN)


@triton.jit
def _load_latents(
    pointer: tl.tensor, base: tl.tensor, c: tl.tensor, p: tl.tensor, pixels: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(C, P) in float32; zero beyond C or the end."""
    inside = (c < C)[:, None] & (p < pixels)[None, :]
    index = c[:, None] * pixels + p[None, :]
    return tl.load(pointer + base * C + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_latents(
    pointer: tl.tensor, value: tl.tensor, base: tl.tensor, c: tl.tensor, p: tl.tensor,
    pixels: tl.tensor, C: tl.constexpr,
) -> None:  # fmt: skip
    inside = (c < C)[:, None] & (p < pixels)[None, :]
    tl.store(pointer + base * C + c[:, None] * pixels + p[None, :], value, mask=inside)


@triton.jit
def _load_mixture(
    velocities: tl.tensor, logweights: tl.tensor, source: tl.tensor, base: tl.tensor, k: tl.tensor,
    c: tl.tensor, p: tl.tensor, pixels: tl.tensor, K: tl.constexpr, C: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Drift (C, P), offsets e_k (K, C, P), |e_k|^2 and log-weights (K, P), -inf beyond K."""
    index = (k[:, None, None] * C + c[None, :, None]) * pixels + p[None, None, :]
    inside = (k < K)[:, None, None] & (c < C)[None, :, None] & (p < pixels)[None, None, :]
    velocity = tl.load(velocities + base * K * C + index, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(velocity, axis=0) / K
    offsets = source * (average[None, :, :] - velocity)
    weights_inside = (k < K)[:, None] & (p < pixels)[None, :]
    weights_index = base * K + k[:, None] * pixels + p[None, :]
    found = tl.load(logweights + weights_index, mask=weights_inside, other=0.0)
    found = tl.where((k < K)[:, None], found, float("-inf"))
    return source * average, offsets, tl.sum(offsets * offsets, axis=1), found


@triton.jit
def _store_mixture(
    g_velocities: tl.tensor, g_logweights: tl.tensor, g_offsets: tl.tensor, g_drift: tl.tensor,
    g_logs: tl.tensor, source: tl.tensor, base: tl.tensor, k: tl.tensor, c: tl.tensor, p: tl.tensor,
    pixels: tl.tensor, K: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of what `_load_mixture` loads; drift and offsets are linear in the velocities."""
    g_average = source * (g_drift + tl.sum(g_offsets, axis=0))
    index = (k[:, None, None] * C + c[None, :, None]) * pixels + p[None, None, :]
    inside = (k < K)[:, None, None] & (c < C)[None, :, None] & (p < pixels)[None, None, :]
    value = g_average[None, :, :] / K - source * g_offsets
    tl.store(g_velocities + base * K * C + index, value, mask=inside)
    weights_inside = (k < K)[:, None] & (p < pixels)[None, :]
    weights_index = base * K + k[:, None] * pixels + p[None, :]
    tl.store(g_logweights + weights_index, g_logs, mask=weights_inside)


@triton.jit
def _step_numbers(
    sigma: tl.tensor, delta: tl.tensor, source: tl.tensor, variance: tl.tensor,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """A substep's numbers: factors of y, drift and c in q; zeta; 1 / d; -delta / sigma."""
    sigma = tl.maximum(sigma, _SIGMA_MIN)
    source = tl.maximum(source, _SIGMA_MIN)
    rho = (1 - sigma) / sigma
    rho_src = (1 - source) / source
    gap = (source - sigma) / (source * sigma)
    zeta = gap * (rho + rho_src)
    inverse = 1 / tl.maximum(variance * zeta + 1, _DENOMINATOR_MIN)
    by_drift = -inverse * rho_src / source
    return inverse * rho / sigma, by_drift, inverse * gap, zeta, inverse, -delta / sigma


@triton.jit
def _attend(
    query: tl.tensor, offsets: tl.tensor, squares: tl.tensor, logweights: tl.tensor,
    zeta: tl.tensor, inverse: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The posterior weights (K, P) at a query (C, P)."""
    scores = tl.sum(offsets * query[None, :, :], axis=1) - (0.5 * zeta * inverse) * squares
    logits = logweights + scores
    weights = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@triton.jit
def _euler_step(
    y: tl.tensor, sigma: tl.tensor, delta: tl.tensor, source: tl.tensor, variance: tl.tensor,
    center: tl.tensor, drift: tl.tensor, offsets: tl.tensor, squares: tl.tensor,
    logweights: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """y (C, P) after one substep."""
    by_y, by_drift, by_center, zeta, inverse, share = _step_numbers(sigma, delta, source, variance)
    query = by_y * y + by_drift * drift + by_center * center
    weights = _attend(query, offsets, squares, logweights, zeta, inverse)
    mixed = tl.sum(offsets * weights[:, None, :], axis=0)
    return (1 - share) * y + share * (variance * query + inverse * mixed)


@triton.jit(do_not_specialize=["steps", "batch", "pixels"])
def _forward(
    velocities: tl.tensor, logweights: tl.tensor, variances: tl.tensor, x: tl.tensor,
    x_src: tl.tensor, sigma_src: tl.tensor, sigmas: tl.tensor, deltas: tl.tensor, out: tl.tensor,
    steps: tl.tensor, batch: tl.tensor, pixels: tl.tensor, K: tl.constexpr, C: tl.constexpr,
    K_PAD: tl.constexpr, C_PAD: tl.constexpr, SIZE: tl.constexpr, ENDPOINT: tl.constexpr,
) -> None:  # fmt: skip
    sample = tl.program_id(1)
    base = sample.to(tl.int64) * pixels
    k, c = tl.arange(0, K_PAD), tl.arange(0, C_PAD)
    p = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    source, variance = tl.load(sigma_src + sample), tl.load(variances + sample)
    drift, offsets, squares, logs = _load_mixture(
        velocities, logweights, source, base, k, c, p, pixels, K, C
    )
    origin = _load_latents(x_src, base, c, p, pixels, C)
    center = origin - drift
    latents = _load_latents(x, base, c, p, pixels, C)
    start = (latents - origin) + drift
    y = start
    for step in range(steps):
        delta = tl.load(deltas + step * batch + sample)
        if delta != 0:
            sigma = tl.load(sigmas + step * batch + sample)
            y = _euler_step(
                y, sigma, delta, source, variance, center, drift, offsets, squares, logs
            )
    moved = y - start
    if ENDPOINT:
        moved += latents
    _store_latents(out, moved, base, c, p, pixels, C)


@triton.jit
def _backward_step(
    y: tl.tensor, g: tl.tensor, sigma: tl.tensor, delta: tl.tensor, source: tl.tensor,
    variance: tl.tensor, center: tl.tensor, drift: tl.tensor, offsets: tl.tensor,
    squares: tl.tensor, logweights: tl.tensor,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """One substep's adjoint, from y before it and g = dL/dy after it.

    Returns dL/dy before it and the query (C, P); what it adds to dL/ddrift and dL/dcenter (C, P);
    the gradients of sum_k w_k e_k in y's terms, weights share / d, and of the logits (K, P), which
    with g and the query make its part of dL/doffsets; the factor of those on e_k itself (scalar);
    and its part of dL/dvariance (P).
    """
    by_y, by_drift, by_center, zeta, inverse, share = _step_numbers(sigma, delta, source, variance)
    query = by_y * y + by_drift * drift + by_center * center
    weights = _attend(query, offsets, squares, logweights, zeta, inverse)
    pulled = (share * inverse) * weights
    aligned = pulled * tl.sum(offsets * g[None, :, :], axis=1)
    total = tl.sum(aligned, axis=0)
    g_logits = aligned - weights * total[None, :]
    mixed = tl.sum(offsets * g_logits[:, None, :], axis=0)
    g_query = mixed + (share * variance) * g
    unclamped = variance * zeta + 1 > _DENOMINATOR_MIN
    log_slope = tl.where(unclamped, -zeta * inverse, 0.0)
    scores = tl.sum(query * mixed, axis=0) - (0.5 * zeta * inverse) * tl.sum(
        g_logits * squares, axis=0
    )
    g_variance = log_slope * (scores + total) + share * (1 + variance * log_slope) * tl.sum(
        g * query, axis=0
    )
    g_before = (1 - share) * g + by_y * g_query
    g_drift, g_center = by_drift * g_query, by_center * g_query
    return g_before, query, g_drift, g_center, pulled, g_logits, -zeta * inverse, g_variance


@triton.jit
def _walk_back(
    g: tl.tensor, room: tl.tensor, cell: tl.tensor, sigmas: tl.tensor, deltas: tl.tensor,
    steps: tl.tensor, batch: tl.tensor, source: tl.tensor, variance: tl.tensor, center: tl.tensor,
    drift: tl.tensor, offsets: tl.tensor, squares: tl.tensor, logweights: tl.tensor,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """All substeps' adjoints, last to first, from g = dL/dy at the end.

    `room` + `cell` is where y (C, P) before the first substep was kept. Returns dL/dy before it,
    and the gradients of offsets (K, C, P), log-weights (K, P), drift and center (C, P), and of the
    variance (P).
    """
    g_offsets, g_squares = tl.zeros_like(offsets), tl.zeros_like(squares)
    g_logs = tl.zeros_like(squares)
    g_drift, g_center = tl.zeros_like(drift), tl.zeros_like(drift)
    g_variance = tl.sum(tl.zeros_like(drift), axis=0)
    for index in range(steps):
        step = steps - 1 - index
        delta = tl.load(deltas + step * batch)
        if delta != 0:
            sigma = tl.load(sigmas + step * batch)
            y = tl.load(room + step * (drift.shape[0] * drift.shape[1]) + cell)
            before, query, d_drift, d_center, pulled, g_logits, by_square, d_variance = (
                _backward_step(
                    y, g, sigma, delta, source, variance, center, drift, offsets, squares,
                    logweights,
                )
            )  # fmt: skip
            g_offsets += pulled[:, None, :] * g[None, :, :]
            g_offsets += g_logits[:, None, :] * query[None, :, :]
            g_squares += by_square * g_logits
            g_logs += g_logits
            g_drift += d_drift
            g_center += d_center
            g_variance += d_variance
            g = before
    return g, g_offsets + g_squares[:, None, :] * offsets, g_logs, g_drift, g_center, g_variance


@triton.jit(do_not_specialize=["steps", "batch", "pixels", "blocks"])
def _backward(
    velocities: tl.tensor, logweights: tl.tensor, variances: tl.tensor, x: tl.tensor,
    x_src: tl.tensor, sigma_src: tl.tensor, sigmas: tl.tensor, deltas: tl.tensor, grad: tl.tensor,
    scratch: tl.tensor, g_velocities: tl.tensor, g_logweights: tl.tensor, g_variances: tl.tensor,
    g_x: tl.tensor, g_x_src: tl.tensor, steps: tl.tensor, batch: tl.tensor, pixels: tl.tensor,
    blocks: tl.tensor, K: tl.constexpr, C: tl.constexpr, K_PAD: tl.constexpr, C_PAD: tl.constexpr,
    SIZE: tl.constexpr, ENDPOINT: tl.constexpr, LATENTS: tl.constexpr,
) -> None:  # fmt: skip
    k, c = tl.arange(0, K_PAD), tl.arange(0, C_PAD)
    lane = tl.arange(0, SIZE)
    cell = c[:, None] * SIZE + lane[None, :]
    room = scratch + tl.program_id(0).to(tl.int64) * steps * (C_PAD * SIZE)
    for block in range(tl.program_id(0), blocks * batch, tl.num_programs(0)):
        sample = block // blocks
        base = sample.to(tl.int64) * pixels
        p = (block % blocks) * SIZE + lane
        source, variance = tl.load(sigma_src + sample), tl.load(variances + sample)
        drift, offsets, squares, logs = _load_mixture(
            velocities, logweights, source, base, k, c, p, pixels, K, C
        )
        origin = _load_latents(x_src, base, c, p, pixels, C)
        center = origin - drift
        y = (_load_latents(x, base, c, p, pixels, C) - origin) + drift
        # A thread may read what another one of the program wrote, here and for the last block.
        tl.debug_barrier()
        for step in range(steps):
            delta = tl.load(deltas + step * batch + sample)
            if delta != 0:
                sigma = tl.load(sigmas + step * batch + sample)
                tl.store(room + step * (C_PAD * SIZE) + cell, y)
                y = _euler_step(
                    y, sigma, delta, source, variance, center, drift, offsets, squares, logs
                )
        tl.debug_barrier()
        end = _load_latents(grad, base, c, p, pixels, C)
        g, g_offsets, g_logs, g_drift, g_center, g_variance = _walk_back(
            end, room, cell, sigmas + sample, deltas + sample, steps, batch, source, variance,
            center, drift, offsets, squares, logs,
        )  # fmt: skip
        # start = x - x_src + drift and center = x_src - drift.
        g_start = g - end
        g_drift += g_start - g_center
        _store_mixture(
            g_velocities, g_logweights, g_offsets, g_drift, g_logs, source, base, k, c, p, pixels,
            K, C,
        )  # fmt: skip
        tl.store(g_variances + block, tl.sum(tl.where(p < pixels, g_variance, 0.0), axis=0))
        if LATENTS:
            _store_latents(g_x, g if ENDPOINT else g_start, base, c, p, pixels, C)
            _store_latents(g_x_src, g_center - g_start, base, c, p, pixels, C)


def fused_rollout(
    velocities: Tensor,
    logweights: Tensor,
    variance: Tensor,
    x: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    sigmas: Tensor,
    deltas: Tensor,
    endpoint: bool = True,
) -> Tensor:
    """Where x goes in Euler steps x + delta u at sigma, (B, C, P), float32.

    Args:
        velocities: means in velocity space, (B, K, C, P), any floating-point dtype; K and C at
            most 64 each.
        logweights: (B, K, P); -inf takes a component out.
        variance: (B,), of x0.
        x, x_src: (B, C, P).
        sigma_src: (B,).
        sigmas, deltas: (n, B); steps with delta = 0 are skipped.
        endpoint: x at the end; else how far it moved, which is exact where x is large beside it.

    Differentiable in the first five.
    """
    result: Tensor = _FusedRollout.apply(
        endpoint, velocities, logweights, variance, x, x_src, sigma_src, sigmas, deltas
    )
    return result


class _FusedRollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, endpoint: bool, velocities: Tensor, *tensors: Tensor) -> Tensor:
        inputs = (velocities.contiguous(), *(tensor.float().contiguous() for tensor in tensors))
        batch, components, channels, pixels = velocities.shape
        out = torch.empty_like(inputs[3])
        shape = forward_shape(components, channels)
        with torch.cuda.device_of(out):
            _forward[(triton.cdiv(pixels, shape.pixels), batch)](
                *inputs, out, len(inputs[-1]), batch, pixels,
                ENDPOINT=endpoint, **shape.constants(), **shape.options(),
            )  # fmt: skip
        ctx.save_for_backward(*inputs)
        ctx.endpoint = endpoint
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        velocities, logweights, variance, x, x_src, *times = ctx.saved_tensors
        batch, components, channels, pixels = velocities.shape
        shape = backward_shape(components, channels)
        steps, blocks = len(times[-1]), triton.cdiv(pixels, shape.pixels)
        programs = min(blocks * batch, max_backward_programs(x.device))
        scratch = x.new_empty(programs, steps, shape.padded_channels, shape.pixels)
        g_velocities, g_logweights = torch.empty_like(velocities), torch.empty_like(logweights)
        g_variances = x.new_empty(batch, blocks)
        latents = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        g_x, g_x_src = (torch.empty_like(x) if latents else x for _ in range(2))
        with torch.cuda.device_of(x):
            _backward[(programs,)](
                velocities, logweights, variance, x, x_src, *times, grad.contiguous(), scratch,
                g_velocities, g_logweights, g_variances, g_x, g_x_src,
                steps, batch, pixels, blocks,
                ENDPOINT=ctx.endpoint, LATENTS=latents, **shape.constants(), **shape.options(),
            )  # fmt: skip
        g_latents = (g_x, g_x_src) if latents else (None, None)
        return None, g_velocities, g_logweights, g_variances.sum(1), *g_latents, None, None, None


def max_backward_programs(device: torch.device) -> int:
    """Programs of the backward on a GPU; off it (the interpreter), one after the other, few."""
    if device.type != "cuda":
        return PROGRAMS_PER_MULTIPROCESSOR
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count * PROGRAMS_PER_MULTIPROCESSOR


@dataclass(frozen=True)
class LaunchShape:
    """How a kernel is cut for K components of C channels."""

    components: int
    channels: int
    pixels: int
    """A program's."""
    num_warps: int

    @classmethod
    def of(cls, components: int, channels: int, elements: int) -> LaunchShape:
        """So that a thread holds at most `elements` means: more warps, then fewer pixels."""
        means = triton.next_power_of_2(components) * triton.next_power_of_2(channels)
        num_warps = max(1, min(means // elements, _MAX_WARPS))
        pixels = max(1, min(LANES, elements * num_warps * LANES // means))
        return cls(components, channels, pixels, num_warps)

    @property
    def padded_channels(self) -> int:
        """C up to a power of two."""
        size: int = triton.next_power_of_2(self.channels)
        return size

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time constants."""
        return {
            "K": self.components,
            "C": self.channels,
            "K_PAD": triton.next_power_of_2(self.components),
            "C_PAD": self.padded_channels,
            "SIZE": self.pixels,
        }

    def options(self) -> dict[str, int | bool]:
        """Launch options; fused multiply-adds are half of the arithmetic."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def forward_shape(components: int, channels: int) -> LaunchShape:
    """One read of the means and nothing but the substeps' arithmetic."""
    return LaunchShape.of(components, channels, _FORWARD_ELEMENTS)


def backward_shape(components: int, channels: int) -> LaunchShape:
    """Sums over K or C cross warps here: the means alone would fit one, their gradient wouldn't."""
    return LaunchShape.of(components, channels, _BACKWARD_ELEMENTS)


@dataclass(frozen=True)
class FusedMixture:
    """A `piflow.policies.mixture.Mixture` run by the kernel; nothing is computed from the means.

    velocities (B, K, C, P), contiguous, as the network made them; logweights (B, K, P), variance
    (B,), x_src (B, C, P) and sigma_src (B,) in float32.
    """

    velocities: Tensor
    logweights: Tensor
    variance: Tensor
    x_src: Tensor
    sigma_src: Tensor

    def displacement(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        return self._run(x, sigmas, deltas, endpoint=False)

    def integrate(self, x: Tensor, sigmas: Tensor, deltas: Tensor) -> Tensor:
        return self._run(x, sigmas, deltas, endpoint=True)

    def reweighted(self, logweights: Tensor, variance: Tensor) -> FusedMixture:
        return replace(self, logweights=logweights, variance=variance)

    def detach(self) -> FusedMixture:
        return FusedMixture(
            self.velocities.detach(),
            self.logweights.detach(),
            self.variance.detach(),
            self.x_src.detach(),
            self.sigma_src.detach(),
        )

    def _run(self, x: Tensor, sigmas: Tensor, deltas: Tensor, endpoint: bool) -> Tensor:
        return fused_rollout(
            self.velocities, self.logweights, self.variance, x, self.x_src, self.sigma_src,
            sigmas, deltas, endpoint,
        )  # fmt: skip
