"""π-ID: intervals, the loss by hand, pure trajectories at lambda 0 and 1, both drivers."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from piflow.imitation import (
    ImitationSettings,
    Intervals,
    imitation_loss,
    micro_window,
    run_data_dependent,
    run_data_free,
    sample_intervals,
    teacher_ratio,
)
from piflow.policies import DXPolicy, GMFlowPolicy, mean_velocity, rollout
from piflow.schedule import FewStep

F64 = torch.float64
FEW_STEP = FewStep(nfe=4, final_step_size_scale=0.5, shift=3.2, total_substeps=128)
SCHEDULE, PARTS = FEW_STEP.schedule, FEW_STEP.segments


def column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    return x.sin() + column(sigma)


class Recorder:
    """A teacher that remembers where it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not x.requires_grad
        self.calls.append((x, sigma))
        return teacher(x, sigma)


def gm(x: Tensor, tau: Tensor, seed: int = 0) -> tuple[GMFlowPolicy, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = x.shape
    leaves = [
        torch.randn(batch, 3, channels, height, width, dtype=F64, generator=generator),
        torch.full((batch, 1, 1, 1, 1), -2.0, dtype=F64),
        torch.randn(batch, 3, 1, height, width, dtype=F64, generator=generator),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return GMFlowPolicy(*leaves, x, SCHEDULE.sigma(tau)), leaves


def start(batch: int = 2, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_src, tau_src and size of one of the four segments."""
    x = torch.randn(batch, 2, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(5))
    tau, size = PARTS[index].tau_src, PARTS[index].size
    return x, torch.full((batch,), tau, dtype=F64), torch.full((batch,), size, dtype=F64)


@settings(max_examples=40, deadline=None)
@given(
    states=st.integers(1, 6),
    ratio=st.floats(0, 1),
    sizes=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    substeps=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_intervals_fit_the_segment(states, ratio, sizes, substeps, seed) -> None:
    size = torch.tensor(sizes)
    window = micro_window(size, substeps)
    generator = torch.Generator().manual_seed(seed)
    intervals = sample_intervals(len(sizes), states, size, window, ratio, generator)
    assert intervals.student.shape == intervals.teacher.shape == (len(sizes), states)
    assert (intervals.student >= 0).all() and (intervals.teacher >= 0).all()
    torch.testing.assert_close(intervals.teacher.sum(1), ratio * (size - window), atol=1e-6, rtol=0)
    assert (intervals.student.sum(1) <= (1 - ratio) * (size - window) + 1e-6).all()


def test_student_states_are_sorted_uniforms() -> None:
    """Of J sorted uniforms on [0, L], the j-th has mean L j / (J + 1)."""
    size, window = torch.full((20_000,), 0.5), torch.full((20_000,), 0.1)
    generator = torch.Generator().manual_seed(0)
    intervals = sample_intervals(20_000, 3, size, window, 0.25, generator)
    places = intervals.student.cumsum(1).mean(0)
    torch.testing.assert_close(places, 0.3 * torch.tensor([0.25, 0.5, 0.75]), atol=2e-3, rtol=0)
    pieces = intervals.teacher.mean(0)
    torch.testing.assert_close(pieces, torch.full((3,), 0.1 / 3), atol=1e-3, rtol=0)


def test_lambda_schedule_and_window() -> None:
    assert [teacher_ratio(step, 2000) for step in (0, 500, 2000, 9000)] == [1.0, 0.75, 0.0, 0.0]
    assert teacher_ratio(0, 0) == 0.0
    sizes = torch.tensor([1 / 3.5, 0.5 / 3.5, 1 / 128])
    expected = torch.tensor([3 / 3.5 / 37, 3 * 0.5 / 3.5 / 18, 1 / 128])
    torch.testing.assert_close(micro_window(sizes, 3), expected)
    assert micro_window(sizes, 0).tolist() == [0.0, 0.0, 0.0]


def test_lambda_one_is_the_teachers_trajectory() -> None:
    x, tau, size = start()
    policy, _ = gm(x, tau)
    window = micro_window(size, 3)
    intervals = sample_intervals(2, 4, size, window, 1.0, torch.Generator().manual_seed(0))
    assert (intervals.student == 0).all()
    recorder = Recorder()
    output = imitation_loss(policy, recorder, x, tau, intervals, window, SCHEDULE)
    y, now = x, tau
    for (at, sigma), step in zip(recorder.calls, intervals.teacher.unbind(1), strict=True):
        torch.testing.assert_close(at, y)
        torch.testing.assert_close(sigma, SCHEDULE.sigma(now))
        later = now - step
        move = SCHEDULE.sigma(later) - SCHEDULE.sigma(now)
        y, now = y + column(move) * teacher(y, SCHEDULE.sigma(now)), later
    torch.testing.assert_close(output.x, y)
    torch.testing.assert_close(output.tau, now)
    torch.testing.assert_close(output.tau, tau - size + window)


def test_lambda_zero_is_the_policys_trajectory() -> None:
    x, tau, size = start()
    policy, _ = gm(x, tau)
    window = micro_window(size, 3)
    intervals = sample_intervals(2, 4, size, window, 0.0, torch.Generator().manual_seed(0))
    assert (intervals.teacher == 0).all()
    recorder = Recorder()
    output = imitation_loss(policy, recorder, x, tau, intervals, window, SCHEDULE)
    y, now = x, tau
    for (at, sigma), step in zip(recorder.calls, intervals.student.unbind(1), strict=True):
        y, now = rollout(policy.detach(), y, now, now - step, SCHEDULE), now - step
        torch.testing.assert_close(at, y)
        torch.testing.assert_close(sigma, SCHEDULE.sigma(now))
    torch.testing.assert_close(output.x, y)
    torch.testing.assert_close(output.tau, now)


@pytest.mark.parametrize("substeps", [0, 3])
def test_loss_by_hand(substeps: int) -> None:
    """J = 2, mixed trajectory; without a window the target meets the instantaneous velocity."""
    x, tau, size = start(index=1)
    policy, _ = gm(x, tau)
    window = micro_window(size, substeps)
    intervals = Intervals(
        torch.tensor([[0.05, 0.03], [0.0, 0.07]], dtype=F64),
        torch.tensor([[0.0, 0.02], [0.0, 0.0]], dtype=F64),
    )
    output = imitation_loss(policy, teacher, x, tau, intervals, window, SCHEDULE, 128, 30.0)
    total, y, now = torch.zeros((), dtype=F64), x, tau
    for own, other in zip(intervals.student.unbind(1), intervals.teacher.unbind(1), strict=True):
        at, mark = rollout(policy, y, now, now - own, SCHEDULE), now - own
        target = teacher(at, SCHEDULE.sigma(mark))
        found = mean_velocity(policy, at, mark, mark - other - window, SCHEDULE)
        if substeps == 0 and (other == 0).all():
            torch.testing.assert_close(found, policy.velocity(at, SCHEDULE.sigma(mark)))
        total = total + (found - target).square().sum()
        now = mark - other
        y = at + column(SCHEDULE.sigma(now) - SCHEDULE.sigma(mark)) * target
    expected = 30.0 * 0.5 * total / (2 * x.numel())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.x, y)


def test_no_loss_and_no_gradient_where_policy_and_teacher_agree() -> None:
    x, tau, size = start()
    goal = torch.randn_like(x)
    sigma_src = column(SCHEDULE.sigma(tau))
    values = ((x - goal) / sigma_src).unsqueeze(1).requires_grad_()
    policy = DXPolicy(values, x, sigma_src.flatten(), 1 / 3.5, 3.2)
    window = micro_window(size, 3)
    intervals = sample_intervals(2, 4, size, window, 0.5, torch.Generator().manual_seed(0))
    output = imitation_loss(
        policy, lambda y, sigma: (y - goal) / column(sigma), x, tau, intervals, window, SCHEDULE
    )
    output.loss.backward()
    assert output.loss.item() < 1e-20 and values.grad.abs().max().item() < 1e-10


def test_loss_gradient_by_finite_differences_flows_through_the_window_alone() -> None:
    """The walk is held fixed (its own copy), so finite differences see the same gradient."""
    x, tau, size = start(batch=1)
    walker, leaves = gm(x, tau)
    fixed = gm(x, tau)[0].detach()
    window = micro_window(size, 3)
    intervals = sample_intervals(1, 2, size, window, 0.3, torch.Generator().manual_seed(0))

    def loss(means: Tensor, logstds: Tensor, logweights: Tensor) -> Tensor:
        policy = GMFlowPolicy(means, logstds, logweights, x, SCHEDULE.sigma(tau))
        output = imitation_loss(
            policy, teacher, x, tau, intervals, window, SCHEDULE, rollout_policy=fixed
        )
        assert not output.x.requires_grad
        return output.loss

    assert torch.autograd.gradcheck(loss, tuple(leaves))
    same = imitation_loss(walker, teacher, x, tau, intervals, window, SCHEDULE).loss
    torch.testing.assert_close(same, loss(*leaves))


class Free:
    """A data-free iteration with a student that owns one parameter, and what happened in it."""

    def __init__(self, ratio: float = 0.5, dropout: float = 0.0, seed: int = 0) -> None:
        self.weight = torch.full((1, 3, 2, 1, 1), 0.1, dtype=F64, requires_grad=True)
        self.sigmas: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.alive: list[weakref.ref] = []
        self.parts: list[tuple[float, bool]] = []
        self.recorder = Recorder()
        noise = torch.randn(2, 2, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
        self.settings = ImitationSettings(3, teacher_ratio=ratio, dropout=dropout, scale=2.0)
        for loss, last in run_data_free(
            self.student,
            self.recorder,
            noise,
            FEW_STEP,
            self.settings,
            generator=torch.Generator().manual_seed(seed),
        ):
            self.parts.append((loss.item(), last))
            loss.backward()

    def student(self, x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        assert all(reference() is None for reference in self.alive), "an older graph is alive"
        self.sigmas.append(sigma)
        self.inputs.append(x)
        return self.policy(x, sigma)

    def policy(self, x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        spread = torch.tensor([-1.0, 0.0, 1.0], dtype=F64).reshape(1, 3, 1, 1, 1)
        means = spread + self.weight.sin() * x.unsqueeze(1)
        self.alive.append(weakref.ref(means))
        ones = torch.ones(2, 1, 1, 1, 1, dtype=F64)
        logweights = torch.zeros(2, 3, 1, 2, 2, dtype=F64)
        return GMFlowPolicy(means, -2 * ones, logweights, x, sigma)


def test_data_free_runs_all_segments_and_weighs_them_by_size() -> None:
    run = Free()
    starts = torch.tensor([SCHEDULE.sigma(part.tau_src) for part in PARTS])
    torch.testing.assert_close(torch.stack(run.sigmas)[:, 0], starts)
    assert len(run.recorder.calls) == 3 * len(PARTS)
    assert [last for _, last in run.parts] == [False, False, False, True]
    generator, expected = torch.Generator().manual_seed(0), torch.zeros_like(run.weight)
    for (weighted, _), x, part in zip(run.parts, run.inputs, PARTS, strict=True):
        tau, size = torch.full((2,), part.tau_src), torch.full((2,), part.size)
        window = micro_window(size, 3)
        intervals = sample_intervals(2, 3, size, window, 0.5, generator)
        policy = run.policy(x, SCHEDULE.sigma(tau))
        output = imitation_loss(policy, teacher, x, tau, intervals, window, SCHEDULE, 128, 2.0)
        assert weighted == pytest.approx(output.loss.item() * part.size, rel=1e-12)
        expected += part.size * torch.autograd.grad(output.loss, run.weight)[0]
    torch.testing.assert_close(run.weight.grad, expected, rtol=1e-10, atol=0)
    assert expected.abs().min() > 0


def test_data_free_holds_one_segments_graph_at_a_time() -> None:
    """`Free.student` fails if any earlier output is still alive when it is called."""
    assert len(Free().alive) == len(PARTS)


@dataclass(eq=False)
class Kept:
    """What autograd holds in a saved tensor's place."""

    tensor: Tensor


class SavedBytes:
    """Bytes of the tensors that autograd keeps for backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> Kept:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        kept = Kept(tensor)
        if not self._holders[address]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[address] += 1
        weakref.finalize(kept, self._drop, address, size)
        return kept

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.now -= size


def peak_of_an_iteration(nfe: int, at_once: bool) -> tuple[int, Tensor]:
    """Most saved bytes of a data-free iteration, and the student's gradient.

    Not at once: all segments' losses are back-propagated together, after the last.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
        network = nn.Sequential(nn.Linear(4, 32), *hidden, nn.Linear(32, 8))

    def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        means = network(x.movedim(1, -1)).movedim(-1, 1).unflatten(1, (2, 4))
        logstds = torch.full((len(x), 1, 1, 1, 1), -2.0)
        return GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x, sigma)

    parts: list[Tensor] = []
    saved = SavedBytes()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with saved.hooks():
        for loss, last in run_data_free(
            student, teacher, noise, FewStep(nfe, 1.0, 3.2, 128), ImitationSettings(num_states=2),
            generator=torch.Generator().manual_seed(0),
        ):  # fmt: skip
            parts.append(loss)
            del loss
            if at_once or last:
                torch.stack(parts).sum().backward()
                parts.clear()
    assert saved.now == 0
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return saved.peak, gradient


def test_peak_memory_of_data_free_mode_is_one_segments() -> None:
    """Four segments need what one needs; back-propagated at the end they would need four times."""
    one, _ = peak_of_an_iteration(1, at_once=True)
    four, gradient = peak_of_an_iteration(4, at_once=True)
    late, same = peak_of_an_iteration(4, at_once=False)
    assert one > 100_000
    assert four <= 1.1 * one
    assert 3.5 * one < late < 4.1 * one
    torch.testing.assert_close(gradient, same)


def test_data_free_segments_chain() -> None:
    """A one-component policy without spread goes straight, so each start is known exactly."""
    inputs = []

    def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        inputs.append((x, sigma))
        zeros = torch.zeros(2, 1, 1, 2, 2, dtype=F64)
        logstds = torch.full((2, 1, 1, 1, 1), -60.0, dtype=F64)
        return GMFlowPolicy(x.cos().unsqueeze(1), logstds, zeros, x, sigma)

    noise = start()[0]
    parts = run_data_free(
        student, teacher, noise, FEW_STEP, ImitationSettings(num_states=3),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(list(parts)) == len(PARTS)
    assert torch.equal(inputs[0][0], noise)
    for (x, sigma), (following, later) in zip(inputs[:-1], inputs[1:], strict=True):
        expected = x + x.cos() * column(later - sigma)
        torch.testing.assert_close(following, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_data_free_walks_from_noise_to_data(ratio: float) -> None:
    """Policy and teacher agree on a straight flow to `goal`: every state lies on it exactly."""
    goal, noise = torch.randn(2, 2, 2, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    visits: list[Tensor] = []

    def straight(x: Tensor, sigma: Tensor) -> Tensor:
        visits.append(sigma)
        torch.testing.assert_close(x, torch.lerp(goal, noise, column(sigma.double())), rtol=1e-5,
                                   atol=1e-5)  # fmt: skip
        return (x - goal) / column(sigma)

    def student(x: Tensor, sigma: Tensor) -> DXPolicy:
        values = ((x - goal) / column(sigma)).unsqueeze(1).requires_grad_()
        return DXPolicy(values, x, sigma, 1 / 3.5, 3.2)

    parts = run_data_free(
        student, straight, noise, FEW_STEP, ImitationSettings(num_states=3, teacher_ratio=ratio),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert max(loss.item() for loss, _ in parts) < 1e-8
    levels = torch.stack(visits)
    assert len(levels) == 3 * len(PARTS) and (levels.diff(dim=0) <= 0).all()
    assert levels.min() < SCHEDULE.sigma(PARTS[-1].tau_src)


def test_data_free_at_lambda_one_is_the_teachers_trajectory() -> None:
    """Whatever the student says, the teacher is asked along its own Euler steps in a segment."""
    run = Free(ratio=1.0)
    for segment in range(len(PARTS)):
        inside = run.recorder.calls[3 * segment : 3 * segment + 3]
        assert torch.equal(inside[0][0], run.inputs[segment])
        for (x, sigma), (following, later) in zip(inside[:-1], inside[1:], strict=True):
            expected = x + column(later - sigma) * teacher(x, sigma)
            torch.testing.assert_close(following, expected, rtol=1e-5, atol=1e-5)


def test_data_free_at_lambda_zero_is_the_policys_trajectory() -> None:
    run = Free(ratio=0.0)
    for segment, part in enumerate(PARTS):
        x_src, sigma_src = run.inputs[segment], run.sigmas[segment]
        with torch.no_grad():
            policy = run.policy(x_src, sigma_src)
        tau_src = torch.full((2,), part.tau_src, dtype=torch.float32)
        x, tau = x_src, tau_src
        for at, sigma in run.recorder.calls[3 * segment : 3 * segment + 3]:
            later = SCHEDULE.tau(sigma).float()
            x, tau = rollout(policy, x, tau, later, SCHEDULE), later
            torch.testing.assert_close(at, x, rtol=1e-4, atol=1e-4)


def test_data_free_takes_frames() -> None:
    """(B, C, T, H, W): a policy works by pixel, so frames are as good as more rows."""

    def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        means = torch.stack([x.cos(), x.sin(), -x], dim=1).requires_grad_()
        ones = torch.ones(2, *[1] * x.ndim, dtype=F64)
        return GMFlowPolicy(means, -ones, torch.zeros_like(means[:, :, :1]), x, sigma)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x.sin() + sigma.reshape(-1, *[1] * (x.ndim - 1))

    frames = torch.randn(2, 3, 5, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    found, expected = (
        [loss.item() for loss, _ in run_data_free(
            student, velocity, noise, FEW_STEP,
            ImitationSettings(num_states=2, teacher_ratio=0.4, dropout=0.2),
            generator=torch.Generator().manual_seed(0),
        )]
        for noise in (frames, frames.flatten(2, 3))
    )  # fmt: skip
    assert len(found) == len(PARTS) and found == pytest.approx(expected, rel=1e-7)


def test_data_free_depends_on_its_generator_alone() -> None:
    torch.manual_seed(0)
    first = Free(dropout=0.3, seed=4)
    torch.manual_seed(1)
    second, other = Free(dropout=0.3, seed=4), Free(dropout=0.3, seed=5)
    assert first.parts == second.parts
    assert first.parts != other.parts
    plain = Free(dropout=0.0, seed=4)
    assert not torch.equal(first.inputs[-1], plain.inputs[-1])


def test_data_dependent_starts_from_noised_data_at_segment_starts() -> None:
    generator = torch.Generator().manual_seed(3)
    data, noise = torch.randn(2, 64, 2, 2, 2, dtype=F64, generator=generator).unbind(0)
    calls: list[tuple[Tensor, Tensor]] = []
    weight = torch.zeros((), dtype=F64, requires_grad=True)

    def student(x: Tensor, sigma: Tensor) -> DXPolicy:
        calls.append((x, sigma))
        return DXPolicy((weight + x).unsqueeze(1), x, sigma, 1 / 3.5, 3.2)

    recorder = Recorder()
    parts = run_data_dependent(
        student,
        recorder,
        data,
        noise,
        FEW_STEP,
        ImitationSettings(num_states=2, window_substeps=0),
        generator=torch.Generator().manual_seed(0),
    )
    ((loss, last),) = parts
    assert last and loss.requires_grad
    (x, sigma), *rest = calls
    assert not rest and len(recorder.calls) == 2
    starts = torch.tensor([SCHEDULE.sigma(part.tau_src) for part in PARTS])
    gaps = (sigma[:, None] - starts).abs()
    assert gaps.amin(1).max() < 1e-6 and len(gaps.argmin(1).unique()) == len(PARTS)
    expected = (1 - column(sigma)) * data + column(sigma) * noise
    torch.testing.assert_close(x, expected.double(), rtol=1e-6, atol=1e-6)
    ends = torch.tensor([SCHEDULE.sigma(part.tau_dst) for part in PARTS])[gaps.argmin(1)]
    for _, at in recorder.calls:
        assert (at <= sigma + 1e-6).all() and (at >= ends - 1e-6).all()


def test_bad_input_says_what_was_expected() -> None:
    half = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="num_states >= 1"):
        sample_intervals(2, 0, half, half, 0.0)
    with pytest.raises(ValueError, match="teacher_ratio in"):
        sample_intervals(2, 1, half, half, 1.5)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        sample_intervals(3, 1, half, half, 0.5)
    with pytest.raises(ValueError, match="window_substeps >= 0"):
        micro_window(half, -1)
    x, tau, _ = start()
    dx = DXPolicy(x.unsqueeze(1), x, SCHEDULE.sigma(tau), 1.0, 3.2)
    common = {"generator": torch.Generator()}
    plain = ImitationSettings(num_states=1, window_substeps=0)
    dropping = ImitationSettings(num_states=1, window_substeps=0, dropout=0.1)
    with pytest.raises(ValueError, match="set dropout to 0"):
        next(run_data_free(lambda y, s: dx, teacher, x, FEW_STEP, dropping, **common))
    with pytest.raises(ValueError, match="one shape"):
        next(run_data_dependent(lambda y, s: dx, teacher, x, x[:1], FEW_STEP, plain, **common))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_states", 0), ("window_substeps", -1), ("teacher_ratio", 1.1), ("teacher_ratio", -0.1),
     ("dropout", 1.0), ("scale", 0.0)],
)  # fmt: skip
def test_settings_name_what_is_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"expected {name} .*, got {value}"):
        ImitationSettings(**{"num_states": 1, name: value})
