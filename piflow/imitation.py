"""π-ID: policy-based imitation distillation, as pure functions of their arguments.

Source: arXiv 2510.14974, section 4. A policy is rolled out (detached) to a few intermediate states;
there its mean velocity over a micro-window is matched to the teacher's velocity. lambda, the
teacher ratio, says how much of the way is walked on the teacher's velocity instead.

Times stay on the CPU throughout (their values steer loops); sigmas go to the latents' device. All
random numbers of one call come from the one generator passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from piflow.policies.base import Policy, expand_as_latents, working_dtype
from piflow.policies.gmflow import GMFlowPolicy
from piflow.policies.rollout import mean_velocity, rollout
from piflow.schedule import FlowSchedule, Segment, num_substeps, sample_segments

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma (B,)) -> u."""
Student = Callable[[Tensor, Tensor], Policy]
"""(x, sigma (B,)) -> policy."""
Backward = Callable[[Tensor, bool], None]
"""(weighted loss of a segment, whether it is the iteration's last) -> None."""


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
        total_substeps: S, policy substeps over tau in [0, 1].
        scale: factor of the loss.

    Raises:
        ValueError: a value outside its range.
    """

    num_states: int
    window_substeps: int = 3
    teacher_ratio: float = 0.0
    dropout: float = 0.0
    total_substeps: int = 128
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("num_states", self.num_states, self.num_states >= 1, ">= 1"),
            ("window_substeps", self.window_substeps, self.window_substeps >= 0, ">= 0"),
            ("teacher_ratio", self.teacher_ratio, 0 <= self.teacher_ratio <= 1, "in [0, 1]"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)"),
            ("total_substeps", self.total_substeps, self.total_substeps >= 1, ">= 1"),
            ("scale", self.scale, self.scale > 0, "> 0"),
        ):
            if not good:
                raise ValueError(f"ImitationSettings: expected {name} {expected}, got {value}")


def teacher_ratio(step: int, num_decay_iters: int) -> float:
    """lambda, falling linearly from 1 at step 0 to 0 at `num_decay_iters` (0 = always 0)."""
    if num_decay_iters <= 0:
        return 0.0
    return max(0.0, 1.0 - step / num_decay_iters)


def micro_window(segment_size: Tensor, window_substeps: int, total_substeps: int = 128) -> Tensor:
    """Delta = min(window_substeps h / n, h) of segments of size h with n substeps; (B,) -> (B,)."""
    if window_substeps < 0:
        raise ValueError(f"expected window_substeps >= 0, got {window_substeps}; 0 = instantaneous")
    substep = segment_size / num_substeps(segment_size, total_substeps)
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
    length = (segment_size - window).clamp(min=0)[:, None]
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

    Returns:
        loss = scale / 2 mean |u_mean - u_teacher|^2 over all J states (scalar), and the state after
        the last teacher step.
    """
    walker = policy.detach() if rollout_policy is None else rollout_policy
    x = x_src.detach().to(working_dtype(x_src))
    tau, window = tau_src.detach().cpu(), window.detach().cpu()
    student_steps = intervals.student.cpu().unbind(1)
    teacher_steps = intervals.teacher.cpu().unbind(1)
    losses = []
    for student_step, teacher_step in zip(student_steps, teacher_steps, strict=True):
        with torch.no_grad():
            tau_a = (tau - student_step).clamp(min=0)
            x_a = rollout(walker, x, tau, tau_a, schedule, total_substeps)
            sigma_a = _on(x, schedule.sigma(tau_a))
            target = teacher(x_a, sigma_a).to(x_a.dtype)
        tau_b = (tau_a - teacher_step).clamp(min=0)
        tau_end = (tau_b - window).clamp(min=0)
        average = mean_velocity(policy, x_a, tau_a, tau_end, schedule, total_substeps)
        losses.append((average - target).square().mean())
        step = _on(x, schedule.sigma(tau_b)) - sigma_a
        x, tau = x_a + expand_as_latents(step, x_a) * target, tau_b
    loss = 0.5 * scale * torch.stack(losses).mean()
    return ImitationOutput(loss, x, tau)


def run_data_free(
    student: Student,
    teacher: Velocity,
    noise: Tensor,
    schedule: FlowSchedule,
    segments: Sequence[Segment],
    settings: ImitationSettings,
    *,
    generator: torch.Generator,
    backward: Backward,
) -> list[Tensor]:
    """One data-free iteration: all segments in order, each back-propagated at once.

    x starts as noise; a segment's end state, rolled out without gradient, starts the next. Each
    segment's loss times its size (sizes sum to 1) goes to `backward(loss, last)`, and its graph is
    dropped before the next network call, so peak memory is one segment's.

    Args:
        student: (x, sigma) -> policy, called once a segment.
        teacher: (x, sigma) -> u, called `settings.num_states` times a segment.
        noise: (B, C, H, W) or (B, C, T, H, W) at sigma = 1.
        schedule, segments: the clock, and `piflow.schedule.segments(...)`.
        settings: how each segment is imitated.
        generator: the only source of random numbers.
        backward: receives each weighted loss and whether it is the last.

    Returns:
        The segments' losses, detached, not weighted.

    Raises:
        ValueError: `settings.dropout` > 0 for a policy that isn't a GMFlowPolicy.
    """
    x, losses = noise.to(working_dtype(noise)), []
    for index, segment in enumerate(segments):
        tau_src, tau_dst, size = (
            torch.full((len(noise),), value)
            for value in (segment.tau_src, segment.tau_dst, segment.size)
        )
        last = index == len(segments) - 1
        # Everything with a graph lives and dies inside the call.
        x, loss = _run_segment(
            student, teacher, x, tau_src, size, schedule, settings, generator,
            partial(_weighted, backward, segment.size, last), None if last else tau_dst,
        )  # fmt: skip
        losses.append(loss)
    return losses


def run_data_dependent(
    student: Student,
    teacher: Velocity,
    data: Tensor,
    noise: Tensor,
    schedule: FlowSchedule,
    segments: Sequence[Segment],
    settings: ImitationSettings,
    *,
    generator: torch.Generator,
    backward: Backward,
) -> list[Tensor]:
    """One data-dependent iteration: one random segment a sample, started from noised data.

    A segment is drawn in proportion to its size (tau ~ U(0, 1]); x_src = (1 - sigma) data +
    sigma noise at the segment's start. Arguments and errors as in `run_data_free`, and `data`,
    clean latents shaped as `noise`. Calls `backward(loss, True)` once; returns [loss], detached.
    """
    if data.shape != noise.shape:
        raise ValueError(
            f"run_data_dependent: expected data and noise of one shape, got {tuple(data.shape)} "
            f"and {tuple(noise.shape)}"
        )
    tau_src, size = (value.cpu() for value in sample_segments(len(data), segments, generator))
    dtype = working_dtype(data, noise)
    sigma = _on(data, schedule.sigma(tau_src))
    x = torch.lerp(data.to(dtype), noise.to(dtype), expand_as_latents(sigma, data).to(dtype))
    _, loss = _run_segment(
        student, teacher, x, tau_src, size, schedule, settings, generator,
        partial(_weighted, backward, 1.0, True), None,
    )  # fmt: skip
    return [loss]


def _run_segment(
    student: Student,
    teacher: Velocity,
    x: Tensor,
    tau_src: Tensor,
    size: Tensor,
    schedule: FlowSchedule,
    settings: ImitationSettings,
    generator: torch.Generator,
    backward: Callable[[Tensor], None],
    tau_dst: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One segment's student call, loss and backward; then x at `tau_dst`, if it is wanted."""
    policy = student(x, _on(x, schedule.sigma(tau_src)))
    walker = _walker(policy, settings.dropout, generator)
    window = micro_window(size, settings.window_substeps, settings.total_substeps)
    intervals = sample_intervals(
        len(x), settings.num_states, size, window, settings.teacher_ratio, generator
    )
    output = imitation_loss(
        policy, teacher, x, tau_src, intervals, window, schedule,
        settings.total_substeps, settings.scale, walker,
    )  # fmt: skip
    backward(output.loss)
    if tau_dst is None:
        return output.x, output.loss.detach()
    with torch.no_grad():
        end = rollout(walker, output.x, output.tau, tau_dst, schedule, settings.total_substeps)
    return end, output.loss.detach()


def _weighted(backward: Backward, weight: float, last: bool, loss: Tensor) -> None:
    backward(loss * weight, last)


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


def _on(x: Tensor, value: Tensor) -> Tensor:
    """A (B,) host value on the device of `x`, without waiting for it; its dtype stays."""
    return value.to(x.device, non_blocking=x.is_cuda)
