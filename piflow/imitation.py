"""π-ID: policy-based imitation distillation, as pure functions of their arguments.

Source: arXiv 2510.14974, section 4. A policy is rolled out (detached) to a few intermediate states;
there its mean velocity over a micro-window is matched to the teacher's velocity. lambda, the
teacher ratio, says how much of the way is walked on the teacher's velocity instead.

Times stay on the CPU throughout (their values steer loops); sigmas go to the latents' device. All
random numbers of one call come from the one generator passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.flow import Student, Velocity, noised
from piflow.policies.base import Policy, expand_as_latents, to_device, working_dtype
from piflow.policies.gmflow import GMFlowPolicy
from piflow.policies.rollout import mean_velocity, rollout
from piflow.schedule import FewStep, FlowSchedule, Rounding, num_substeps, sample_segments

PartOfLoss = tuple[Tensor, bool]
"""(a weighted part of an iteration's loss, whether it is the last part)."""


@dataclass(frozen=True)
class Intervals:
    """Raw-time lengths of a segment's J steps, (B, J) each."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class ImitationOutput:
    """One segment's scalar loss, and latents and times (B,) after its last teacher step."""

    loss: Tensor
    x: Tensor
    tau: Tensor


@dataclass(frozen=True)
class ImitationSettings:
    """How a segment is imitated; the same for all segments of an iteration.

    Attributes:
        num_states: J, teacher evaluations a segment.
        window_substeps: micro-window in substeps of its segment; 0 = instantaneous velocity.
        teacher_ratio: lambda in [0, 1].
        dropout: probability in [0, 1) that a GM component is dropped from a rollout; GM policies
            only.
        scale: factor of the loss.

    Raises:
        ValueError: a value outside its range.
    """

    num_states: int
    window_substeps: int = 3
    teacher_ratio: float = 0.0
    dropout: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("num_states", self.num_states, self.num_states >= 1, ">= 1"),
            ("window_substeps", self.window_substeps, self.window_substeps >= 0, ">= 0"),
            ("teacher_ratio", self.teacher_ratio, 0 <= self.teacher_ratio <= 1, "in [0, 1]"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)"),
            ("scale", self.scale, self.scale > 0, "> 0"),
        ):
            if not good:
                raise ValueError(f"ImitationSettings: expected {name} {expected}, got {value}")


def teacher_ratio(step: int, num_decay_iters: int) -> float:
    """lambda, falling linearly from 1 at step 0 to 0 at `num_decay_iters` (0 = always 0)."""
    if num_decay_iters <= 0:
        return 0.0
    return max(0.0, 1.0 - step / num_decay_iters)


def micro_window(
    segment_size: Tensor,
    window_substeps: int,
    total_substeps: int = 128,
    rounding: Rounding = "nearest",
) -> Tensor:
    """Delta = min(window_substeps h / n, h) of segments of size h with n substeps; (B,) -> (B,)."""
    if window_substeps < 0:
        raise ValueError(f"expected window_substeps >= 0, got {window_substeps}; 0 = instantaneous")
    substep = segment_size / num_substeps(segment_size, total_substeps, rounding)
    return torch.minimum(window_substeps * substep, segment_size)


def sample_intervals(
    batch: int,
    num_states: int,
    segment_size: Tensor,
    window: Tensor,
    teacher_ratio: float,
    generator: torch.Generator | None = None,
) -> Intervals:
    """Draw how far the student and the teacher walk before and after each of J states.

    Student: J sorted uniforms on [0, (1 - lambda)(h - Delta)], differences from 0. Teacher: J - 1
    sorted uniforms cut lambda (h - Delta) into J pieces.

    Args:
        batch: B.
        num_states: J >= 1.
        segment_size: h, (B,).
        window: Delta, (B,), at most h.
        teacher_ratio: lambda in [0, 1].
        generator: source of the random numbers, drawn on its device.

    Raises:
        ValueError: J < 1, lambda outside [0, 1], or shapes other than (B,).
    """
    if num_states < 1:
        raise ValueError(f"sample_intervals: expected num_states >= 1, got {num_states}")
    if not 0 <= teacher_ratio <= 1:
        raise ValueError(f"sample_intervals: expected teacher_ratio in [0, 1], got {teacher_ratio}")
    if segment_size.shape != (batch,) or window.shape != (batch,):
        raise ValueError(
            f"sample_intervals: expected segment_size and window of shape ({batch},), got "
            f"{tuple(segment_size.shape)} and {tuple(window.shape)}; expand scalars"
        )
    device = generator.device if generator is not None else segment_size.device
    length = (segment_size - window).clamp(min=0)[:, None]  # a window reaches beyond its state
    draws = torch.rand(
        (batch, 2 * num_states - 1), generator=generator, device=device, dtype=length.dtype
    ).to(length.device)
    zeros, ones = torch.zeros_like(length), torch.ones_like(length)
    student = torch.cat([zeros, draws[:, :num_states].sort(1).values], dim=1)
    teacher = torch.cat([zeros, draws[:, num_states:].sort(1).values, ones], dim=1)
    return Intervals(
        student.diff(dim=1) * (1 - teacher_ratio) * length,
        teacher.diff(dim=1) * teacher_ratio * length,
    )


def imitation_loss(
    policy: Policy,
    teacher: Velocity,
    x_src: Tensor,
    tau_src: Tensor,
    intervals: Intervals,
    window: Tensor,
    schedule: FlowSchedule,
    total_substeps: int = 128,
    scale: float = 1.0,
    rollout_policy: Policy | None = None,
    rounding: Rounding = "nearest",
) -> ImitationOutput:
    """Match the policy's mean velocity to the teacher's at J states of one segment.

    Args:
        policy: the student's output at (x_src, tau_src); gradients flow to it alone.
        teacher: (x, sigma (B,)) -> u, guided; called J times without gradient.
        x_src: latents (B, C, H, W) or (B, C, T, H, W) at `tau_src` (B,).
        intervals: student and teacher steps in raw time, (B, J).
        window: Delta, (B,), the micro-window in raw time.
        schedule: raw time -> sigma.
        total_substeps: policy substeps over tau in [0, 1].
        scale: factor of the loss.
        rollout_policy: the detached, dropped-out copy to walk on; default `policy.detach()`.
        rounding: of an interval's share of the substeps.

    Returns:
        loss = scale / 2 mean |u_mean - u_teacher|^2 over all J states (scalar), and the state after
        the last teacher step.
    """
    walker = policy.detach() if rollout_policy is None else rollout_policy
    # A bfloat16 state would round away what one of 128 substeps moves it.
    x = x_src.detach().to(working_dtype(x_src))
    tau, window = tau_src.detach().cpu(), window.detach().cpu()
    student_steps = intervals.student.cpu().unbind(1)
    teacher_steps = intervals.teacher.cpu().unbind(1)
    losses = []
    for student_step, teacher_step in zip(student_steps, teacher_steps, strict=True):
        # The state is found without gradient: the loss is to pull on the policy's velocity there,
        # not to move the state to where the two agree.
        with torch.no_grad():
            tau_a = (tau - student_step).clamp(min=0)  # rounding may take it below 0
            x_a = rollout(walker, x, tau, tau_a, schedule, total_substeps, rounding)
            sigma_a = to_device(schedule.sigma(tau_a), x.device)
            target = teacher(x_a, sigma_a).to(x_a.dtype)
        tau_b = (tau_a - teacher_step).clamp(min=0)
        tau_end = (tau_b - window).clamp(min=0)
        average = mean_velocity(policy, x_a, tau_a, tau_end, schedule, total_substeps, rounding)
        losses.append((average - target).square().mean())
        step = to_device(schedule.sigma(tau_b), x.device) - sigma_a
        # On the teacher's velocity up to tau_b, not to tau_end: windows may overlap the next step.
        x, tau = x_a + expand_as_latents(step, x_a) * target, tau_b
    loss = 0.5 * scale * torch.stack(losses).mean()
    return ImitationOutput(loss, x, tau)


def run_data_free(
    student: Student,
    teacher: Velocity,
    noise: Tensor,
    few_step: FewStep,
    settings: ImitationSettings,
    *,
    generator: torch.Generator,
) -> Iterator[PartOfLoss]:
    """One data-free iteration: all segments in order, each one part of the loss.

    x starts as noise; a segment's end state, rolled out without gradient, starts the next. A
    segment's loss is weighted by its size; sizes sum to 1.

    Back-propagate each part before asking for the next, and peak memory is one segment's: nothing
    here holds on to a segment's graph beyond that.

    Args:
        student: called once a segment.
        teacher: guided; called `settings.num_states` times a segment.
        noise: (B, C, H, W) or (B, C, T, H, W) at sigma = 1.
        few_step: the student's schedule.
        settings: how each segment is imitated.
        generator: the only source of random numbers.

    Yields:
        A segment's loss times its size, and whether it is the last segment.

    Raises:
        ValueError: `settings.dropout` > 0 for a policy that isn't a GMFlowPolicy.
    """
    x, schedule = noise.to(working_dtype(noise)), few_step.schedule
    for count, segment in enumerate(few_step.segments, 1):
        tau_src, tau_dst, size = (
            torch.full((len(noise),), value)
            for value in (segment.tau_src, segment.tau_dst, segment.size)
        )
        output, walker = _imitate(student, teacher, x, tau_src, size, few_step, settings, generator)
        yield output.loss * segment.size, count == few_step.nfe
        if count < few_step.nfe:
            with torch.no_grad():
                substeps, rounding = few_step.total_substeps, few_step.substep_rounding
                x = rollout(walker, output.x, output.tau, tau_dst, schedule, substeps, rounding)
        del output, walker  # else the segment's tensors lived on through the next network call


def run_data_dependent(
    student: Student,
    teacher: Velocity,
    data: Tensor,
    noise: Tensor,
    few_step: FewStep,
    settings: ImitationSettings,
    *,
    generator: torch.Generator,
) -> Iterator[PartOfLoss]:
    """One data-dependent iteration: one random segment a sample, started from noised data.

    A segment is drawn in proportion to its size (tau ~ U(0, 1]); x_src = (1 - sigma) data +
    sigma noise at the segment's start. Arguments and errors as in `run_data_free`, and `data`,
    clean latents shaped as `noise`.

    Yields:
        (loss, True), once.
    """
    segments = sample_segments(len(data), few_step.segments, generator)
    tau_src, size = (value.cpu() for value in segments)
    x = noised(data, noise, few_step.schedule.sigma(tau_src))
    output, _ = _imitate(student, teacher, x, tau_src, size, few_step, settings, generator)
    yield output.loss, True


def _imitate(
    student: Student,
    teacher: Velocity,
    x: Tensor,
    tau_src: Tensor,
    size: Tensor,
    few_step: FewStep,
    settings: ImitationSettings,
    generator: torch.Generator,
) -> tuple[ImitationOutput, Policy]:
    """One segment's student call and loss; and the detached policy that was walked on."""
    schedule, substeps = few_step.schedule, few_step.total_substeps
    rounding = few_step.substep_rounding
    policy = student(x, to_device(schedule.sigma(tau_src), x.device))
    walker = _walker(policy, settings.dropout, generator)
    window = micro_window(size, settings.window_substeps, substeps, rounding)
    intervals = sample_intervals(
        len(x), settings.num_states, size, window, settings.teacher_ratio, generator
    )
    output = imitation_loss(
        policy,
        teacher,
        x,
        tau_src,
        intervals,
        window,
        schedule,
        substeps,
        settings.scale,
        walker,
        rounding,
    )
    return output, walker


def _walker(policy: Policy, dropout: float, generator: torch.Generator) -> Policy:
    """The detached copy that rollouts follow, with GM dropout."""
    if dropout == 0:
        return policy.detach()
    if not isinstance(policy, GMFlowPolicy):
        raise ValueError(
            f"expected a GMFlowPolicy for dropout = {dropout}, got {type(policy).__name__}; "
            "set dropout to 0"
        )
    return policy.detach().dropout(dropout, generator)
