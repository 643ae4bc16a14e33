"""Data whose flow is known exactly: a Gaussian mixture on a line or in the plane.

The exact posterior as a policy must be the probability flow itself; and a small network distilled
from the exact teacher must sample the data in 1, 2 and 4 evaluations.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from piflow.ema import ema_update, karras_beta
from piflow.imitation import ImitationSettings, run_data_free
from piflow.policies import GMFlowPolicy, rollout
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep, FlowSchedule

F64 = torch.float64
SHIFT = 2.0
SCHEDULE = FlowSchedule(SHIFT)


@dataclass(frozen=True)
class GaussianMixtureData:
    """means (M, C), weights (M,), one std; latents are (B, C, 1, 1)."""

    means: Tensor
    weights: Tensor
    std: float

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact marginal velocity E[eps - x0 | x], from x_sigma's own mixture."""
        level, alpha = sigma[:, None, None], 1 - sigma[:, None, None]
        spread = (alpha * self.std) ** 2 + level**2
        gap = x.flatten(1)[:, None] - alpha * self.means
        share = torch.softmax(self.weights.log() - (gap**2).sum(2) / (2 * spread[..., 0]), 1)
        clean = self.means + alpha * self.std**2 / spread * gap
        mean = (share[..., None] * clean).sum(1).reshape(x.shape)
        return (x - mean) / sigma[:, None, None, None]

    def policy(self, x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        """The policy whose mixture is the exact p(x0 | x_sigma = x); x (B, C, 1, 1)."""
        level, alpha = sigma[:, None, None], 1 - sigma[:, None, None]
        spread = (alpha * self.std) ** 2 + level**2
        gap = x.flatten(1)[:, None] - alpha * self.means
        share = torch.log_softmax(self.weights.log() - (gap**2).sum(2) / (2 * spread[..., 0]), 1)
        clean = self.means + alpha * self.std**2 / spread * gap
        logstd = (self.std / spread.sqrt()).log()
        return GMFlowPolicy(
            ((x.flatten(1)[:, None] - clean) / level)[..., None, None],
            logstd[..., None, None],
            share[..., None, None, None],
            x,
            sigma,
        )

    def cdf(self, value: Tensor) -> Tensor:
        """P(x0 <= value) of data on a line."""
        scaled = (value[..., None] - self.means[:, 0]) / (self.std * math.sqrt(2))
        return (self.weights * 0.5 * (1 + torch.erf(scaled))).sum(-1)


def ring(count: int = 8, radius: float = 1.5, std: float = 0.15) -> GaussianMixtureData:
    """`count` Gaussians on a circle, unequal weights."""
    angle = torch.arange(count) * (2 * math.pi / count)
    weights = torch.arange(1, count + 1, dtype=torch.float32)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixtureData(means, weights / weights.sum(), std)


def line(dtype: torch.dtype = F64) -> GaussianMixtureData:
    """Three unequal Gaussians on a line."""
    means = torch.tensor([[-1.2], [0.1], [1.6]], dtype=dtype)
    return GaussianMixtureData(means, torch.tensor([0.5, 0.2, 0.3], dtype=dtype), 0.25)


@pytest.mark.parametrize("sigma_src", [1.0, 0.8, 0.3])
def test_fitted_mixture_is_the_marginal_velocity_field(sigma_src: float) -> None:
    """Made at one (x, sigma), exact at every other: what x_src told is divided out again."""
    data = ring()
    data = GaussianMixtureData(data.means.double(), data.weights.double(), data.std)
    x = torch.randn(16, 2, 1, 1, dtype=F64)
    policy = data.policy(x, torch.full((16,), sigma_src, dtype=F64))
    for sigma in (sigma_src, 0.9 * sigma_src, 0.3 * sigma_src, 0.02):
        y = torch.randn(16, 2, 1, 1, dtype=F64)
        level = torch.full((16,), sigma, dtype=F64)
        expected = data.velocity(y, level)
        found = policy.velocity(y, level)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_fitted_mixture_reaches_the_exact_endpoint() -> None:
    """On a line the flow keeps order: the endpoint is the data's quantile of the noise's."""
    data = line()
    quantile = torch.linspace(0.02, 0.98, 25, dtype=F64)
    noise = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    x, one = noise[:, None, None, None], torch.ones(25, dtype=F64)
    policy = data.policy(x, one)
    errors = []
    for substeps in (128, 512, 2048):
        end = rollout(policy, x, one, 0 * one, FlowSchedule(3.2), substeps)
        errors.append((data.cdf(end.flatten()) - quantile).abs().max().item())
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("nfe", [2, 4, 8])
def test_exact_student_is_elastic(nfe: int) -> None:
    """More evaluations of an exact student walk the same substeps as one, and as the teacher."""
    data, schedule = line(), FlowSchedule(3.2)
    noise = torch.randn(32, 1, 1, 1, dtype=F64)
    once = sample_few_step(data.policy, noise, FewStep(1, 1.0, 3.2, 128))
    many = sample_few_step(data.policy, noise, FewStep(nfe, 1.0, 3.2, 128), temperature=1.0)
    teacher = sample_euler(data.velocity, noise, schedule, 128)
    torch.testing.assert_close(once, teacher, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many, teacher, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("h", [0.5, 1.0, math.inf])
def test_stochastic_sampling_of_an_exact_student_keeps_the_data(h: float) -> None:
    data, few_step, count = line(torch.float32), FewStep(4, 0.5, 3.2, 128), 20_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, 1, 1, generator=generator)
    found = sample_few_step(
        data.policy, noise, few_step, temperature=1.0, h=h, generator=generator
    ).flatten()
    deterministic = sample_few_step(data.policy, noise, few_step, temperature=1.0).flatten()
    assert (found - deterministic).abs().mean() > 0.1
    grid = torch.linspace(-2.5, 2.5, 41)
    empirical = (found[:, None] <= grid).float().mean(0)
    assert (empirical - data.cdf(grid)).abs().max() < 0.02


class Student(nn.Module):
    """An MLP with the outputs of a GM head for one two-channel pixel; it predicts x0 means."""

    def __init__(self, components: int = 12, width: int = 128) -> None:
        super().__init__()
        self.components = components
        self.body = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 3 * components),
        )  # fmt: skip
        self.logstd = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.normal_(self.body[-1].bias, std=1.5)
        nn.init.constant_(self.logstd[-1].bias, math.log(0.3))

    def forward(self, x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        phase = sigma[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * (math.pi / 2)
        time = torch.cat([phase.cos(), phase.sin()], 1)
        state = torch.cat([x.flatten(1) / (0.3 + sigma[:, None]), time], 1)
        out = self.body(state).unflatten(1, (3, self.components))
        clean = out[:, :2].transpose(1, 2)
        means = (x.flatten(1)[:, None] - clean) / sigma[:, None, None]
        logweights = (3 * out[:, 2]).log_softmax(1)
        return GMFlowPolicy(
            means[..., None, None],
            self.logstd(time)[..., None, None, None],
            logweights[..., None, None, None],
            x,
            sigma,
        )


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """Root mean squared distance of sorted projections; a, b (n, 2)."""
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).square().mean().sqrt().item()


def distill(data: GaussianMixtureData, nfe: int, steps: int, batch: int = 512) -> Student:
    """Data-free distillation of the exact teacher; returns averaged weights."""
    torch.manual_seed(nfe)
    student, generator = Student(), torch.Generator().manual_seed(nfe)
    average = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    settings = ImitationSettings(num_states=1, window_substeps=0)
    for step in range(1, steps + 1):
        noise = torch.randn(batch, 2, 1, 1, generator=generator)
        optimizer.zero_grad()
        few_step = FewStep(nfe, 0.5, SHIFT, total_substeps=16)
        for loss, _ in run_data_free(
            student, data.velocity, noise, few_step, settings, generator=generator
        ):
            loss.backward()
        optimizer.step()
        decay.step()
        ema_update(list(average.parameters()), list(student.parameters()), karras_beta(step, 12))
    return average


def draw(clouds: dict[str, Tensor], path: Path) -> None:
    """Scatter plots side by side, PNG."""
    side, reach = 240, 2.2
    canvas = Image.new("RGB", (side * len(clouds), side + 16), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (name, points) in enumerate(clouds.items()):
        pen.text((side * index + 6, 2), name, fill="black")
        places = ((points / reach + 1) * side / 2).clamp(0, side - 1)
        for x, y in places.tolist():
            pen.point((side * index + x, 16 + y), fill=(40, 70, 160))
    canvas.save(path)


@pytest.mark.parametrize(("nfe", "steps", "bar"), [(1, 250, 1.2), (2, 200, 1.2), (4, 250, 1.2)])
def test_distilled_student_samples_the_teachers_distribution(
    nfe: int, steps: int, bar: float, tmp_path: Path
) -> None:
    """Sliced Wasserstein distance to fresh teacher samples, against the teacher's own (the floor).

    Student and floor start from the same noise, so their ratio has little sampling noise. The
    plain teacher in as many Euler steps is far off.
    """
    data, count, generator = ring(), 1500, torch.Generator().manual_seed(99)
    noises = [torch.randn(count, 2, 1, 1, generator=generator) for _ in range(4)]
    teacher = [sample_euler(data.velocity, z, SCHEDULE, 256).flatten(1) for z in noises]
    euler = sample_euler(data.velocity, noises[0], SCHEDULE, nfe).flatten(1)
    student = sample_few_step(
        distill(data, nfe, steps), noises[0], FewStep(nfe, 0.5, SHIFT, 128), temperature=1.0
    ).flatten(1)

    def distance(points: Tensor) -> float:
        return sum(sliced_wasserstein(points, other) for other in teacher[1:]) / 3

    draw({"teacher, 256 steps": teacher[0], f"student, {nfe} NFE": student}, tmp_path / "toy.png")
    floor = distance(teacher[0])
    print(
        f"nfe {nfe}: student {distance(student) / floor:.3f}, Euler {distance(euler) / floor:.3f}"
    )
    assert distance(student) < bar * floor
    assert distance(student) < 0.7 * distance(euler)
    assert (student - teacher[0]).square().mean() < 0.1 * (euler - teacher[0]).square().mean()
