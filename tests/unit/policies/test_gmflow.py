"""The GMFlow policy against brute-force Bayes, and its identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from piflow.policies import GMFlowPolicy, auto_temperature
from piflow.policies.base import expand_as_latents
from piflow.policies.reference import posterior_mean

F64 = torch.float64


def outputs(
    batch: int = 2,
    components: int = 3,
    channels: int = 2,
    space: tuple[int, ...] = (2, 3),
    seed: int = 0,
    sigma: float | None = None,
) -> dict[str, Tensor]:
    """Random network outputs in float64, by the constructor's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=F64, generator=generator)

    noise_level = 0.3 + 0.6 * torch.rand(batch, dtype=F64, generator=generator)
    ones = [1] * (len(space) + 2)
    return {
        "means": normal(batch, components, channels, *space),
        "logstds": 0.5 * normal(batch, *ones) - 1,
        "logweights": normal(batch, components, 1, *space).log_softmax(1),
        "x_src": normal(batch, channels, *space),
        "sigma_src": noise_level if sigma is None else torch.full((batch,), sigma, dtype=F64),
    }


def x0_means(out: dict[str, Tensor]) -> Tensor:
    """Component means in x0 space, (B, K, C, ...)."""
    sigma = out["sigma_src"].reshape(-1, *[1] * (out["means"].ndim - 1))
    return out["x_src"].unsqueeze(1) - sigma * out["means"]


def reference_mean(out: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """The plain posterior mean of a policy of these outputs, shaped as x."""
    variance = (2 * out["logstds"]).exp().flatten() * out["sigma_src"] ** 2
    mean = posterior_mean(
        x0_means(out).flatten(3),
        out["logweights"].squeeze(2).flatten(2),
        variance,
        out["x_src"].flatten(2),
        out["sigma_src"],
        x.flatten(2),
        sigma,
    )
    return mean.reshape(x.shape)


def test_posterior_mean_is_brute_force_bayes_on_a_grid() -> None:
    """The policy's and the reference's, by quadrature. One channel, one pixel.

    p(x0 | x_src) is the mixture.

    x given x0 is a second, less noisy look at x0 whose own density relative to x_src's is the
    ratio of the two Gaussian likelihoods of x0.
    """
    out = outputs(batch=1, components=4, channels=1, space=(1, 1))
    policy = GMFlowPolicy(**out)
    sigma_src, sigma = out["sigma_src"].item(), 0.6 * out["sigma_src"].item()
    x_src, x = out["x_src"].item(), 0.37
    means = x0_means(out).flatten()
    std = out["logstds"].exp().item() * sigma_src
    grid = torch.linspace(-30, 30, 2_000_001, dtype=F64)
    log_prior = torch.full_like(grid, -torch.inf)
    for weight, mean in zip(out["logweights"].flatten(), means, strict=True):
        log_prior = torch.logaddexp(log_prior, weight - (grid - mean) ** 2 / (2 * std**2))
    likelihood = -((x - (1 - sigma) * grid) ** 2) / (2 * sigma**2)
    likelihood_src = -((x_src - (1 - sigma_src) * grid) ** 2) / (2 * sigma_src**2)
    density = torch.softmax(log_prior + likelihood - likelihood_src, dim=0)
    expected = (density * grid).sum()
    noise_level = torch.tensor([sigma], dtype=F64)
    found = policy.posterior_mean(torch.full((1, 1, 1, 1), x, dtype=F64), noise_level).squeeze()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    reference = reference_mean(out, torch.full((1, 1, 1, 1), x, dtype=F64), noise_level).squeeze()
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    components=st.integers(1, 9),
    channels=st.integers(1, 5),
    space=st.sampled_from([(1, 1), (2, 3), (2, 2, 3)]),
    seed=st.integers(0, 10_000),
    ratio=st.floats(0.02, 1.0),
)
def test_is_the_reference(batch, components, channels, space, seed, ratio) -> None:
    out = outputs(batch, components, channels, space, seed)
    x = torch.randn(out["x_src"].shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    sigma = out["sigma_src"] * ratio

    policy, mean = GMFlowPolicy(**out), reference_mean(out, x, sigma)
    torch.testing.assert_close(policy.posterior_mean(x, sigma), mean, rtol=1e-9, atol=1e-9)
    velocity = (x - mean) / expand_as_latents(sigma, x)
    torch.testing.assert_close(policy.velocity(x, sigma), velocity, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma", [1.0, 0.4, 1e-3])
def test_velocity_at_the_source_is_the_mixture_mean(sigma: float) -> None:
    out = outputs(sigma=sigma)
    found = GMFlowPolicy(**out).velocity(out["x_src"], out["sigma_src"])
    expected = (out["logweights"].exp() * out["means"]).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 / sigma)


def test_all_gradients_by_finite_differences() -> None:
    out = outputs(components=3, channels=2, space=(1, 2))
    leaves = [out[name].requires_grad_() for name in ("means", "logstds", "logweights", "x_src")]
    x, sigma = torch.randn_like(out["x_src"]).requires_grad_(), 0.7 * out["sigma_src"]

    def velocity(means, logstds, logweights, x_src, at) -> Tensor:
        policy = GMFlowPolicy(means, logstds, logweights, x_src, out["sigma_src"])
        return policy.velocity(at, sigma)

    assert torch.autograd.gradcheck(velocity, (*leaves, x))


def test_variance_gradient_where_the_denominator_is_clamped() -> None:
    """Above the source's noise level d = v zeta + 1 falls to its floor for a large variance."""
    out = outputs(batch=1, components=1, channels=2, space=(1, 2), sigma=0.3)
    logstd = torch.full((1, 1, 1, 1, 1), 1.5, dtype=F64, requires_grad=True)
    level = torch.full((1,), 0.6, dtype=F64)

    def velocity(logstds: Tensor) -> Tensor:
        names = ("means", "logweights", "x_src", "sigma_src")
        means, logweights, x_src, sigma_src = (out[name] for name in names)
        policy = GMFlowPolicy(means, logstds, logweights, x_src, sigma_src)
        # Up to a millionth, the denominator's floor.
        return 1e-6 * policy.velocity(x_src, level)

    (slope,) = torch.autograd.grad(velocity(logstd).sum(), logstd)
    assert slope.abs().item() > 1e-2
    assert torch.autograd.gradcheck(velocity, (logstd,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    out = {name: value.to(dtype) for name, value in outputs().items()}
    found = GMFlowPolicy(**out).velocity(out["x_src"], 0.5 * out["sigma_src"])
    assert found.dtype == torch.float32
    exact = {name: value.double() for name, value in out.items()}
    sigma = (0.5 * out["sigma_src"]).double()
    expected = GMFlowPolicy(**exact).velocity(exact["x_src"], sigma)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_detach_cuts_gradient_and_nothing_else() -> None:
    out = outputs()
    out["means"].requires_grad_()
    policy, sigma = GMFlowPolicy(**out), 0.5 * out["sigma_src"]
    detached = policy.detach().velocity(out["x_src"], sigma)
    assert not detached.requires_grad and policy.velocity(out["x_src"], sigma).requires_grad
    torch.testing.assert_close(detached, policy.velocity(out["x_src"], sigma).detach())


def test_dropout_drops_whole_components_per_sample() -> None:
    out = outputs(batch=400, components=4, channels=1, space=(1, 2))
    policy = GMFlowPolicy(**out)
    assert policy.dropout(0.0) is policy
    dropped = policy.dropout(0.3, torch.Generator().manual_seed(1))
    gone = dropped.mixture.logweights.isneginf()
    assert torch.equal(gone[..., 0], gone[..., 1])
    assert gone[..., 0].float().mean().item() == pytest.approx(0.3, abs=0.04)
    again = policy.dropout(0.3, torch.Generator().manual_seed(1))
    assert torch.equal(dropped.mixture.logweights, again.mixture.logweights)
    kept = ~gone[..., 0]
    expected = (out["logweights"].exp() * out["means"] * kept[:, :, None, None, None]).sum(1)
    total = (out["logweights"].exp() * kept[:, :, None, None, None]).sum(1)
    found = dropped.velocity(out["x_src"], out["sigma_src"])
    torch.testing.assert_close(found, expected / total)


@pytest.mark.parametrize("components", [1, 2, 5])
def test_dropout_never_drops_all(components: int) -> None:
    policy = GMFlowPolicy(**outputs(batch=300, components=components, space=(1, 1)))
    dropped = policy.dropout(0.999, torch.Generator().manual_seed(0))
    kept = ~dropped.mixture.logweights.isneginf().squeeze(-1)
    assert (kept.sum(1) >= 1).all()
    if components > 1:
        assert kept.sum(1).float().mean() < 1.1
        assert kept.any(0).all()


def test_temperature_identities() -> None:
    out = outputs()
    policy, x, sigma = GMFlowPolicy(**out), torch.randn_like(out["x_src"]), 0.5 * out["sigma_src"]
    assert policy.temperature(1.0) is policy
    sharpened = GMFlowPolicy(
        out["means"],
        out["logstds"] + 0.5 * torch.log(torch.tensor(0.3, dtype=F64)),
        (out["logweights"] / 0.3).log_softmax(1),
        out["x_src"],
        out["sigma_src"],
    )
    found = policy.temperature(0.3).velocity(x, sigma)
    torch.testing.assert_close(found, sharpened.velocity(x, sigma))
    twice = policy.temperature(0.5).temperature(0.6)
    torch.testing.assert_close(twice.velocity(x, sigma), found)


def test_zero_temperature_is_the_limit() -> None:
    out = outputs()
    best = out["logweights"].argmax(1, keepdim=True).expand(-1, -1, out["means"].shape[2], -1, -1)
    expected = out["means"].gather(1, best).squeeze(1)
    zero, tiny = (GMFlowPolicy(**out).temperature(T) for T in (0.0, 1e-40))
    for policy in (zero, tiny):
        found = policy.velocity(out["x_src"], out["sigma_src"])
        torch.testing.assert_close(found, expected)
        later = policy.velocity(out["x_src"], 0.2 * out["sigma_src"])
        assert torch.isfinite(later).all()
    out["logweights"] = torch.zeros_like(out["logweights"])
    tied = GMFlowPolicy(**out).temperature(0.0).velocity(out["x_src"], out["sigma_src"])
    torch.testing.assert_close(tied, out["means"].mean(1))


def test_automatic_temperature() -> None:
    assert [auto_temperature(n) for n in (1, 2, 4, 8, 11, 50)] == pytest.approx(
        [0.0, 0.1, 0.3, 0.7, 1.0, 1.0]
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_src", torch.zeros(2, 3), r"\(B, C, H, W\)"),
        ("means", torch.zeros(2, 3, 4, 2, 3), "expected means"),
        ("logweights", torch.zeros(2, 3, 2, 2, 3), "expected logweights"),
        ("logstds", torch.zeros(2), "expected logstds"),
        ("sigma_src", torch.tensor(0.5), r"expected shape \(2,\)"),
        ("means", torch.zeros(2, 3, 2, 2, 3, dtype=torch.int64), "floating-point"),
    ],
)
def test_bad_shapes_say_what_was_expected(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GMFlowPolicy(**{**outputs(), name: value})


def test_bad_numbers_say_what_was_expected() -> None:
    policy = GMFlowPolicy(**outputs())
    with pytest.raises(ValueError, match=r"p in \[0, 1\)"):
        policy.dropout(1.0)
    with pytest.raises(ValueError, match="finite T >= 0"):
        policy.temperature(-0.1)
    with pytest.raises(ValueError, match="as x_src"):
        policy.velocity(torch.zeros(2, 2, 4, 4), torch.ones(2))
