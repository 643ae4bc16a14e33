"""Euler steps along a Gaussian mixture's flow in PyTorch, in two forms; formulas in `mixture`.

`displace` runs them as attention, forward and backward written out: the forward keeps y and the
weights of each substep, C + K numbers a pixel, the backward makes one gradient of the table and
adds to it in place, where autograd would make one a substep. `displace_in_span` runs them without
gradient on the K x K Gram matrix of the offsets.

Times carry no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from piflow.policies.base import SIGMA_MIN
from piflow.policies.tensor_products import (
    add_outer_products,
    contract_channels,
    inner_products,
    mix_components,
)

DENOMINATOR_MIN = 1e-6
"""The posterior's d = v zeta + 1 is kept at or above this.

Up to the source's noise level zeta >= 0 and d >= 1. Above it a large variance takes d to 0, where
no posterior is left and the floor only keeps numbers finite.
"""


class StepTable(NamedTuple):
    """Numbers of Euler steps, one each a substep and sample: (n, B, 1, 1), or (B, 1, 1) of one.

    q = query_y y + query_drift drift + query_center c; logits = logweights + <e_k, q> +
    half_square |e_k|^2; y <- keep y + spread q + pull sum_k w_k e_k. `regular`: d wasn't clamped.
    """

    query_y: Tensor
    query_drift: Tensor
    query_center: Tensor
    half_square: Tensor
    keep: Tensor
    spread: Tensor
    pull: Tensor
    regular: Tensor

    def steps(self) -> list[StepTable]:
        """One table a substep."""
        return [StepTable(*row) for row in zip(*(column.unbind(0) for column in self), strict=True)]

    def variance_slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives in v, (n, B): of log(1 / d); of q's factor, with q's own dependence in it.

        -zeta / d, and with s = -delta / sigma, s - s v zeta / d = s / d.
        """
        of_inverse = torch.where(self.regular, 2 * self.half_square, 0.0)
        of_spread = torch.where(self.regular, self.pull, 1 - self.keep)
        return of_inverse.flatten(1), of_spread.flatten(1)


def step_table(sigma_src: Tensor, variance: Tensor, sigmas: Tensor, deltas: Tensor) -> StepTable:
    """The numbers of Euler steps x + delta u at sigma; sigma_src, variance (B,), the rest (n, B).

    Made in float64: a few thousand numbers whose rounding would reach every pixel.
    """
    sigma = sigmas.double().clamp(min=SIGMA_MIN)
    source, v = sigma_src.double().clamp(min=SIGMA_MIN), variance.double()
    rho, rho_src = (1 - sigma) / sigma, (1 - source) / source
    # rho - rho_src and rho^2 - rho_src^2, without subtracting large numbers from one another; both
    # exactly 0 at the source
    gap = (source - sigma) / (source * sigma)
    zeta = gap * (rho + rho_src)
    unclamped = v * zeta + 1
    inverse = 1 / unclamped.clamp(min=DENOMINATOR_MIN)
    share = -deltas.double() / sigma
    columns = (
        inverse * rho / sigma,
        -inverse * rho_src / source,
        inverse * gap,
        -0.5 * inverse * zeta,
        1 - share,
        share * v,
        share * inverse,
    )
    numbers = torch.stack(columns).to(variance.dtype)[..., None, None]
    regular = (unclamped > DENOMINATOR_MIN)[..., None, None]
    return StepTable._make((*numbers.unbind(0), regular))


def displace(
    offsets: Tensor,
    squared_offsets: Tensor,
    center: Tensor,
    drift: Tensor,
    logweights: Tensor,
    variance: Tensor,
    start: Tensor,
    table: StepTable,
    differentiable: bool = True,
) -> Tensor:
    """How far y moves from `start` in the table's Euler steps, (B, C, P).

    Args:
        offsets: e_k, (B, K, C, P); `squared_offsets` |e_k|^2, (B, K, P), whose gradient is counted
            to the offsets.
        center, drift: c and x_src - c, (B, C, P).
        logweights: (B, K, P).
        variance: v, (B,), which the table was made with.
        start: y, (B, C, P).
        differentiable: keep what a backward pass needs.
    """
    result: Tensor = _Displacement.apply(
        offsets, squared_offsets, center, drift, logweights, variance, start, table, differentiable
    )
    return result


class _Displacement(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        offsets: Tensor,
        squared_offsets: Tensor,
        center: Tensor,
        drift: Tensor,
        logweights: Tensor,
        variance: Tensor,
        start: Tensor,
        table: StepTable,
        differentiable: bool,
    ) -> Tensor:
        y, states, mixed = start, [], []
        steps = table.steps()
        for step in steps:
            query = _query(step, y, drift, center)
            logits = torch.addcmul(logweights, step.half_square, squared_offsets)
            weights = torch.softmax(logits.add_(contract_channels(offsets, query)), dim=1)
            if differentiable:
                states.append(y)
                mixed.append(weights)
            moved = torch.addcmul(step.keep * y, step.spread, query)
            y = moved.addcmul_(step.pull, mix_components(offsets, weights))
        ctx.save_for_backward(offsets, squared_offsets, center, drift, *states, *mixed)
        ctx.table, ctx.steps = table, steps
        return y - start

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, squared_offsets, center, drift, *kept = ctx.saved_tensors
        count = len(ctx.steps)
        sums = _Gradients.zeros(offsets, center)
        of_inverse, of_spread = [], []
        g = grad
        for step, y, weights in zip(
            reversed(ctx.steps), reversed(kept[:count]), reversed(kept[count:]), strict=True
        ):
            query = _query(step, y, drift, center)
            aligned = contract_channels(offsets, g).mul_(step.pull).mul_(weights)
            total = aligned.sum(1, keepdim=True)
            g_logits = torch.addcmul(aligned, weights, total, value=-1)
            mixed = mix_components(offsets, g_logits)
            g_query = torch.addcmul(mixed, step.spread, g)
            if ctx.needs_input_grad[5]:
                squares = inner_products(g_logits, squared_offsets) * step.half_square.flatten()
                of_inverse.append(inner_products(query, mixed) + squares + total.sum((1, 2)))
                of_spread.append(inner_products(g, query))
            add_outer_products(sums.offsets, ((weights * step.pull, g), (g_logits, query)))
            sums.squared.addcmul_(step.half_square, g_logits)
            sums.logweights.add_(g_logits)
            sums.drift.addcmul_(step.query_drift, g_query)
            sums.center.addcmul_(step.query_center, g_query)
            g = torch.addcmul(step.keep * g, step.query_y, g_query)
        sums.offsets.addcmul_(offsets, sums.squared.unsqueeze(2), value=2)
        g_variance = None
        if ctx.needs_input_grad[5]:
            by_inverse, by_spread = ctx.table.variance_slopes()
            by_step = torch.stack(of_inverse[::-1]) * by_inverse
            g_variance = by_step.add_(torch.stack(of_spread[::-1]) * by_spread).sum(0)
        return (
            sums.offsets, None, sums.center, sums.drift, sums.logweights, g_variance, g - grad,
            None, None,
        )  # fmt: skip


class _Gradients(NamedTuple):
    """Sums over substeps."""

    offsets: Tensor
    squared: Tensor
    center: Tensor
    drift: Tensor
    logweights: Tensor

    @classmethod
    def zeros(cls, offsets: Tensor, center: Tensor) -> _Gradients:
        """Nothing yet."""
        components = torch.zeros_like(offsets[:, :, 0])
        return cls(
            torch.zeros_like(offsets),
            components,
            torch.zeros_like(center),
            torch.zeros_like(center),
            torch.zeros_like(components),
        )


def _query(step: StepTable, y: Tensor, drift: Tensor, center: Tensor) -> Tensor:
    query = torch.addcmul(step.query_y * y, step.query_drift, drift)
    return query.addcmul_(step.query_center, center)


class Gram(NamedTuple):
    """Inner products over channels that a rollout in the offsets' span needs."""

    offsets: Tensor
    """<e_k, e_j> at [b, k, j], (B, K, K, P)."""
    drift: Tensor
    """<e_k, drift>, (B, K, P)."""
    center: Tensor
    """<e_k, c>, (B, K, P)."""

    @classmethod
    def of(cls, offsets: Tensor, drift: Tensor, center: Tensor) -> Gram:
        """Computed from the offsets (B, K, C, P) and the anchors (B, C, P)."""
        batch, components, _, pixels = offsets.shape
        products = offsets.new_empty(batch, components, components, pixels)
        for k in range(components):
            row = contract_channels(offsets[:, k:], offsets[:, k])
            products[:, k, k:] = row
            products[:, k:, k] = row
        return cls(products, contract_channels(offsets, drift), contract_channels(offsets, center))


def displace_in_span(
    gram: Gram,
    offsets: Tensor,
    squared_offsets: Tensor,
    center: Tensor,
    drift: Tensor,
    logweights: Tensor,
    start: Tensor,
    table: StepTable,
) -> Tensor:
    """`displace` on the Gram matrix, without gradient.

    y never leaves span{start, drift, c, e_1 .. e_K}: it is followed by its coefficients, one a
    sample on the first three and K a pixel on the rest, at K^2 instead of 2 K C multiplications a
    pixel and substep.
    """
    on_start = contract_channels(offsets, start)
    coefficients = torch.zeros_like(logweights)
    of_start, zero = torch.ones_like(table.keep[0]), torch.zeros_like(table.keep[0])
    of_drift, of_center = zero, zero
    for index, step in enumerate(table.steps()):
        # q's own coefficients on the three anchors.
        q_start = step.query_y * of_start
        q_drift = torch.addcmul(step.query_drift, step.query_y, of_drift)
        q_center = torch.addcmul(step.query_center, step.query_y, of_center)
        logits = torch.addcmul(logweights, step.half_square, squared_offsets)
        logits.addcmul_(q_start, on_start)
        logits.addcmul_(q_drift, gram.drift).addcmul_(q_center, gram.center)
        if index > 0:
            logits.addcmul_(step.query_y, mix_components(gram.offsets, coefficients))
        weights = torch.softmax(logits, dim=1)
        keep = torch.addcmul(step.keep, step.spread, step.query_y)
        coefficients = coefficients.mul_(keep).addcmul_(step.pull, weights)
        of_start = keep * of_start
        of_drift = torch.addcmul(keep * of_drift, step.spread, step.query_drift)
        of_center = torch.addcmul(keep * of_center, step.spread, step.query_center)
    moved = mix_components(offsets, coefficients).addcmul_(of_start - 1, start)
    return moved.addcmul_(of_drift, drift).addcmul_(of_center, center)
