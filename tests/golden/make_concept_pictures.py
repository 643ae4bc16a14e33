"""Draws docs/concepts-*.svg with piflow's own schedule, policy and rollout.

To be run where they were changed: python -m tests.golden.make_concept_pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from piflow.policies.rollout import mean_velocity, rollout
from piflow.schedule import FewStep
from tests.unit.test_toy_2d import F64, GaussianMixtureData

FOLDER = Path(__file__).parents[2] / "docs"
FOUR = FewStep(nfe=4, final_step_size_scale=0.5, shift=3.2, total_substeps=128)
ONE = FewStep(nfe=1, final_step_size_scale=1.0, shift=1.0, total_substeps=128)
DATA = GaussianMixtureData(
    torch.tensor([[-1.3], [0.2], [1.5]], dtype=F64), torch.tensor([0.4, 0.2, 0.4], dtype=F64), 0.1
)
YOUNG = GaussianMixtureData(  # what a student may believe early in its training
    DATA.means, torch.tensor([0.05, 0.9, 0.05], dtype=F64), 0.2
)
TEACHER, POLICY, EULER = "#3949ab", "#d84315", "#757575"
STYLE = {
    "svg.hashsalt": "piflow",  # the same names of parts each time
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_all() -> dict[str, Figure]:
    """The pictures by the names of their files."""
    with mpl.rc_context(STYLE):
        return {
            "concepts-segments.svg": draw_segments(),
            "concepts-policy.svg": draw_policy(),
            "concepts-imitation.svg": draw_imitation(),
        }


def draw_segments() -> Figure:
    """The clock: raw time, its segments and substeps, and the noise level that networks see."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    tau = torch.linspace(0, 1, FOUR.total_substeps + 1)
    axes.plot(tau, FOUR.schedule.sigma(tau), color=TEACHER, lw=1)
    axes.plot(tau, FOUR.schedule.sigma(tau), "|", color=TEACHER, ms=4, label="a substep")
    for number, segment in enumerate(FOUR.segments, 1):
        level = FOUR.schedule.sigma(segment.tau_src)
        axes.axvspan(segment.tau_dst, segment.tau_src, color=POLICY, alpha=0.05 * (number % 2 + 1))
        label = "an evaluation of the network" if number == 1 else None
        axes.plot(segment.tau_src, level, "o", color=POLICY, label=label, clip_on=False)
        middle = (segment.tau_src + segment.tau_dst) / 2
        axes.text(middle, 0.04, f"segment {number}", ha="center")
    axes.set(xlabel="raw time τ", ylabel="noise level σ", xlim=(1, -0.02), ylim=(0, 1.05))
    axes.legend(loc="upper right", frameon=False)
    return figure


def draw_policy() -> Figure:
    """One evaluation from noise to data: as an Euler step, and as a policy."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _draw_flow(axes)
    for number, start in enumerate((-0.8, 0.0, 0.7)):
        x = torch.full((1, 1, 1, 1), start, dtype=F64)
        straight = x - DATA.velocity(x, torch.ones(1, dtype=F64))
        names = [None, None] if number else ["an Euler step", "a policy, followed in substeps"]
        axes.plot((1, 0), (start, straight.item()), "--", color=EULER, label=names[0])
        axes.plot(*_walk(DATA, [start]), color=POLICY, lw=2.5, label=names[1])
        axes.plot(1, start, "o", color=POLICY, clip_on=False)
    axes.legend(loc="lower left", frameon=False)
    return figure


def draw_imitation() -> Figure:
    """One iteration of a segment: the policy's own states, and the two velocities at each."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _draw_flow(axes)
    x, one = torch.full((1, 1, 1, 1), 0.7, dtype=F64), torch.ones(1, dtype=F64)
    axes.plot(*_walk(YOUNG, [0.7]), color=POLICY, lw=2, label="the student's policy")
    axes.plot(1, x.item(), "o", color=POLICY, clip_on=False)
    policy = YOUNG.policy(x, one)
    window = 3 / ONE.total_substeps
    for number, level in enumerate((0.8, 0.5, 0.2)):
        sigma = torch.tensor([level], dtype=F64)
        state = rollout(policy, x, one, sigma, ONE.schedule)
        own = mean_velocity(policy, state, sigma, sigma - window, ONE.schedule)
        names = [None, None] if number else ["the teacher's velocity", "the policy's mean velocity"]
        for velocity, colour, name in (
            (DATA.velocity(state, sigma), TEACHER, names[0]),
            (own, POLICY, names[1]),
        ):
            end = (level - 0.15, state.item() - 0.15 * velocity.item())
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0}
            axes.annotate("", end, (level, state.item()), arrowprops=arrow)
            if name:
                axes.plot([], [], color=colour, lw=2, marker=">", label=name)
        axes.plot(level, state.item(), "s", color="black", ms=5)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _draw_flow(axes: Axes) -> None:
    """Ways of the teacher's flow from noise to data, exactly."""
    levels, ways = _walk(DATA, torch.linspace(-2.2, 2.2, 23, dtype=F64).tolist())
    axes.plot(levels, ways, color=TEACHER, lw=0.5, alpha=0.5)
    axes.plot([], [], color=TEACHER, lw=0.5, label="the teacher's flow: very many evaluations")
    axes.set(xlabel="noise level σ: noise on the left, data on the right", ylabel="a latent value")
    axes.set(xlim=(1, 0), ylim=(-3.4, 2.4))


def _walk(
    data: GaussianMixtureData, starts: Sequence[float]
) -> tuple[list[float], list[list[float]]]:
    """Noise levels, and the values there on the ways of policies that know `data`, from noise."""
    x = torch.tensor(starts, dtype=F64)[:, None, None, None]
    levels = torch.linspace(1, 0, 61, dtype=F64)
    policy = data.policy(x, torch.ones(len(starts), dtype=F64))
    ways = [x.flatten().tolist()]
    for level, below in pairwise(levels.unbind()):
        x = rollout(policy, x, level.expand(len(x)), below.expand(len(x)), ONE.schedule, 512)
        ways.append(x.flatten().tolist())
    return levels.tolist(), ways


def main() -> None:
    for name, figure in draw_all().items():
        with mpl.rc_context(STYLE):
            figure.savefig(FOLDER / name, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
