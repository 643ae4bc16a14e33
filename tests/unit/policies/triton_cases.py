"""The fused kernel against the plain reference in float64. Run by test_gmflow_triton.py.

Off a GPU the kernel only runs in Triton's interpreter, which must be chosen before Triton is first
imported: `TRITON_INTERPRET=1 python -m pytest tests/unit/policies/triton_cases.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from piflow.policies import GMFlowPolicy, gmflow_triton, mean_velocity, rollout
from piflow.policies.gmflow_triton import FusedMixture
from piflow.policies.mixture import CenteredMixture
from piflow.policies.reference import posterior_mean
from piflow.policies.rollout import substep_table
from piflow.schedule import FlowSchedule

F64 = torch.float64
SCHEDULE = FlowSchedule(3.2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE = 1e-5


@dataclass
class Case:
    """Float32 numbers of a mixture and of a state on its way, and the substeps from there."""

    velocities: Tensor
    logweights: Tensor
    variance: Tensor
    x: Tensor
    x_src: Tensor
    sigma_src: Tensor
    sigmas: Tensor
    deltas: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow to."""
        return [self.velocities, self.logweights, self.variance, self.x, self.x_src]

    @property
    def numbers(self) -> list[Tensor]:
        """The leaves, and the times."""
        return [*self.leaves, self.sigma_src, self.sigmas, self.deltas]


def make_case(
    sizes: tuple[int, int, int, int],
    substeps: tuple[int, ...],
    tau_src: float = 0.8,
    tau_dst: float = 0.3,
    std: float = 0.2,
    seed: int = 0,
) -> Case:
    """`substeps`: of each sample, cut from the way of the longest; 0 = stays put."""
    batch, components, channels, pixels = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    longest = max(1, *substeps)
    stop = tau_src - torch.tensor(substeps) / longest * (tau_src - tau_dst)
    start = torch.full((batch,), tau_src)
    table = substep_table(start, stop, SCHEDULE, round(longest / (tau_src - tau_dst)))
    sigma_src = SCHEDULE.sigma(start) * torch.linspace(1.05, 1.0, batch).clamp(max=1 / 0.95)
    sigma_src = sigma_src.clamp(max=1)
    data, noise = normal(2, batch, channels, pixels).unbind(0)
    level = sigma_src[:, None, None]
    x_src = (1 - level) * data + level * noise
    spread = 0.3 * normal(batch, components, channels, pixels)
    return Case(
        *(
            tensor.to(DEVICE)
            for tensor in (
                (noise - data).unsqueeze(1) + spread,
                normal(batch, components, pixels).log_softmax(1),
                (std * sigma_src).square(),
                x_src + 0.05 * normal(batch, channels, pixels),
                x_src,
                sigma_src,
                table.sigma,
                table.delta,
            )
        )
    )


def displacement_by_reference(
    velocities: Tensor,
    logweights: Tensor,
    variance: Tensor,
    x: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    sigmas: Tensor,
    deltas: Tensor,
) -> Tensor:
    """Euler steps along the plain posterior mean, differentiated by autograd."""
    m = x_src[:, None] - sigma_src[:, None, None, None] * velocities
    y = x
    for sigma, delta in zip(sigmas, deltas, strict=True):
        mean = posterior_mean(m, logweights, variance, x_src, sigma_src, y, sigma)
        y = y + (delta / sigma)[:, None, None] * (y - mean)
    return y - x


def displacement_centered(*arguments: Tensor) -> Tensor:
    """By the PyTorch form, which keeps d from 0 as the kernel does."""
    velocities, logweights, variance, x, x_src, sigma_src, sigmas, deltas = arguments
    mixture = CenteredMixture.from_velocities(velocities, logweights, variance, x_src, sigma_src)
    return mixture.displacement(x, sigmas, deltas)


def displacement_fused(*arguments: Tensor) -> Tensor:
    """By the kernel."""
    velocities, logweights, variance, x, x_src, sigma_src, sigmas, deltas = arguments
    mixture = FusedMixture(velocities, logweights, variance, x_src, sigma_src)
    return mixture.displacement(x, sigmas, deltas)


def run(
    case: Case, dtype: torch.dtype, exact: Callable[..., Tensor] = displacement_by_reference
) -> tuple[Tensor, list[Tensor]]:
    """Displacement and the gradients of a random projection of it.

    float32 by the kernel, float64 by `exact`.
    """
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
    times = [number.to(dtype) for number in (case.sigma_src, case.sigmas, case.deltas)]
    moved = (displacement_fused if dtype == torch.float32 else exact)(*leaves, *times)
    gradients = torch.autograd.grad((moved * projection(moved)).sum(), leaves)
    return moved.detach(), list(gradients)


def projection(moved: Tensor) -> Tensor:
    """Random weights, the same for equal shapes."""
    return torch.randn(moved.shape, generator=torch.Generator().manual_seed(1)).to(moved)


def assert_close(
    found: Tensor, exact: Tensor, relative: float = RELATIVE, scale: Tensor | None = None
) -> None:
    """Within `relative` of the largest element, or of the largest of `scale`."""
    assert found.shape == exact.shape and found.dtype == torch.float32
    error = (found.double() - exact).abs().max().item()
    assert error <= relative * (exact if scale is None else scale).abs().max().item()


def size_of_variance_terms(case: Case, exact: Callable[..., Tensor]) -> Tensor:
    """The variance's gradient sums pixels of either sign, and rounds as they do: sum of sizes."""
    variance = case.variance.double().requires_grad_()
    others = [number.double() for number in case.numbers]
    moved = exact(*others[:2], variance, *others[3:])
    pixels = (moved * projection(moved)).sum((0, 1))
    terms = [torch.autograd.grad(pixel, variance, retain_graph=True)[0] for pixel in pixels]
    return torch.stack(terms).abs().sum(0)


def check(
    case: Case,
    relative: float = RELATIVE,
    exact: Callable[..., Tensor] = displacement_by_reference,
) -> None:
    moved, gradients = run(case, torch.float32)
    true, exact_gradients = run(case, F64, exact)
    assert_close(moved, true, relative)
    for found, expected in zip(gradients, exact_gradients, strict=True):
        of_variance = expected.shape == case.variance.shape
        scale = size_of_variance_terms(case, exact) if of_variance else None
        assert_close(found, expected, relative, scale)


@pytest.mark.parametrize(
    ("sizes", "substeps"),
    [
        ((2, 8, 16, 33), (5, 3)),
        ((2, 32, 4, 40), (2, 4)),
        ((3, 8, 12, 20), (4, 0, 1)),
        ((1, 1, 4, 64), (3,)),
        ((1, 3, 1, 7), (1,)),
        ((1, 40, 33, 3), (2,)),
    ],
)
def test_kernel_is_the_reference(sizes, substeps) -> None:
    """Shapes of FLUX, DiT and the demo, odd ones, and a pixel count no block divides."""
    check(make_case(sizes, substeps))


@settings(max_examples=12, deadline=None)
@given(
    components=st.integers(1, 9),
    channels=st.integers(1, 6),
    pixels=st.integers(1, 40),
    substeps=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    std=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_kernel_is_the_reference_at_any_shape(
    components, channels, pixels, substeps, std, seed
) -> None:
    sizes = (len(substeps), components, channels, pixels)
    check(make_case(sizes, substeps, std=std, seed=seed), relative=2e-5)


def test_dropped_components_and_no_variance() -> None:
    case = make_case((2, 4, 3, 34), (4, 2), std=0.0)
    case.logweights[0, 1:3] = -torch.inf
    case.logweights[1, 0] = -torch.inf
    check(case)
    _, gradients = run(case, torch.float32)
    assert not gradients[1][0, 1:3].any() and gradients[1][0, 0].any()


def test_variance_gradient_where_the_denominator_is_clamped() -> None:
    """Above the source's noise level d = v zeta + 1 falls to its floor for a large variance."""
    case = make_case((1, 1, 2, 5), (1,))
    case.sigma_src, case.sigmas = (torch.full_like(case.sigma_src, 0.3), case.sigmas * 0 + 0.6)
    case.variance = torch.full_like(case.variance, 2.0)
    assert run(case, F64, displacement_centered)[1][2].abs().item() > 1.0
    check(case, exact=displacement_centered)


def test_last_segment_to_zero() -> None:
    """The centered form keeps float32 accurate where rho / sigma grows to 1e4 and beyond."""
    check(make_case((1, 8, 4, 16), (18,), tau_src=0.5 / 3.5, tau_dst=0.0, std=0.05))


def test_a_sample_that_is_done_is_not_touched() -> None:
    case = make_case((2, 3, 4, 8), (3, 0))
    mixture = FusedMixture(
        case.velocities, case.logweights, case.variance, case.x_src, case.sigma_src
    )
    end = mixture.integrate(case.x, case.sigmas, case.deltas)
    assert torch.equal(end[1], case.x[1]) and not torch.equal(end[0], case.x[0])
    moved = mixture.displacement(case.x, case.sigmas, case.deltas)
    torch.testing.assert_close(end - case.x, moved, rtol=0, atol=1e-6)


def test_endpoint_has_the_identity_in_its_gradient() -> None:
    case = make_case((1, 3, 2, 6), (2,))
    x = case.x.requires_grad_()
    mixture = FusedMixture(
        case.velocities, case.logweights, case.variance, case.x_src, case.sigma_src
    )
    (moved,) = torch.autograd.grad(mixture.displacement(x, case.sigmas, case.deltas).sum(), x)
    (end,) = torch.autograd.grad(mixture.integrate(x, case.sigmas, case.deltas).sum(), x)
    torch.testing.assert_close(end, moved + 1)


def test_programs_take_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all blocks and samples gives the gradients of one program a block."""
    case, results = make_case((2, 2, 2, 70), (3, 2)), []
    for programs in (1, 100):
        monkeypatch.setattr(gmflow_triton, "max_backward_programs", lambda device, n=programs: n)
        results.append(run(case, torch.float32)[1])
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_half_precision_means_are_read_as_they_are() -> None:
    case = make_case((1, 4, 4, 16), (3,))
    half = case.velocities.to(torch.bfloat16).requires_grad_()
    case.velocities = half.detach().float()
    mixture = FusedMixture(half, case.logweights, case.variance, case.x_src, case.sigma_src)
    moved = mixture.displacement(case.x, case.sigmas, case.deltas)
    assert_close(moved.detach(), run(case, F64)[0])
    (gradient,) = torch.autograd.grad(moved.square().sum(), half)
    assert gradient.dtype == torch.bfloat16 and torch.isfinite(gradient).all()


def policies(space: tuple[int, ...]) -> tuple[GMFlowPolicy, GMFlowPolicy, Tensor, Tensor]:
    """The same policy on the kernel and in float64, its x_src and tau_src."""
    pixels = math.prod(space)
    case = make_case((2, 5, 3, pixels), (1, 1), std=0.1)
    shape = torch.Size((2, 3, *space))
    names = ("velocities", "logweights", "variance", "x_src", "sigma_src")
    numbers = [getattr(case, name) for name in names]
    fused = GMFlowPolicy.from_mixture(FusedMixture(*numbers), shape)
    exact = CenteredMixture.from_velocities(*(number.double() for number in numbers))
    tau = SCHEDULE.tau(case.sigma_src.cpu().double())
    return fused, GMFlowPolicy.from_mixture(exact, shape), case.x_src.reshape(shape), tau


@pytest.mark.parametrize("space", [(2, 3), (2, 2, 3)])
def test_every_use_of_a_policy(space: tuple[int, ...]) -> None:
    """Rollout, velocity, posterior mean, mean velocity; dropout and temperature; 4-D and 5-D."""
    fused, exact, x, tau = policies(space)
    stop = tau - torch.tensor([0.2, 0.01], dtype=F64)
    sigma = SCHEDULE.sigma(stop).to(DEVICE)
    for change in (
        lambda policy: policy,
        lambda policy: policy.dropout(0.5, torch.Generator().manual_seed(3)),
        lambda policy: policy.temperature(0.3),
        lambda policy: policy.temperature(0.0),
        lambda policy: policy.detach(),
    ):
        mine, true = change(fused), change(exact)
        assert isinstance(mine.mixture, FusedMixture)
        wide = x.double()
        assert_close(mine.velocity(x, sigma), true.velocity(wide, sigma))
        assert_close(mine.posterior_mean(x, sigma), true.posterior_mean(wide, sigma))
        assert_close(
            rollout(mine, x, tau, stop, SCHEDULE, 20), rollout(true, wide, tau, stop, SCHEDULE, 20)
        )
        assert_close(
            mean_velocity(mine, x, tau, stop, SCHEDULE, 20),
            mean_velocity(true, wide, tau, stop, SCHEDULE, 20),
        )


def test_velocity_at_the_source_is_the_mixture_mean() -> None:
    fused, _, x, _ = policies((2, 3))
    mixture = fused.mixture
    mean = (mixture.logweights.exp().unsqueeze(2) * mixture.velocities).sum(1).reshape(x.shape)
    torch.testing.assert_close(fused.velocity(x, mixture.sigma_src), mean, rtol=1e-5, atol=1e-6)
