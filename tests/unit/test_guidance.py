"""Guidance: identities of CFG, interval and orthogonal projection; one doubled call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from piflow.guidance import guidance_active, guided_teacher, guided_velocity

POS, NEG, X0 = torch.randn(3, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_scale_identities() -> None:
    torch.testing.assert_close(guided_velocity(POS, NEG, 1.0), POS)
    torch.testing.assert_close(guided_velocity(POS, NEG, 0.0), NEG)
    torch.testing.assert_close(guided_velocity(POS, NEG, 4.0), NEG + 4 * (POS - NEG))
    torch.testing.assert_close(guided_velocity(POS, POS, 7.0), POS)


def test_only_active_samples_are_guided() -> None:
    active = guidance_active(torch.tensor([0.7, 0.6, 0.1]), (0.2, 0.6))
    assert active.tolist() == [False, True, False]
    mixed = guided_velocity(POS, NEG, 2.7, active)
    torch.testing.assert_close(mixed[[0, 2]], POS[[0, 2]])
    torch.testing.assert_close(mixed[1], guided_velocity(POS, NEG, 2.7)[1])


def test_orthogonal_removes_the_parallel_part() -> None:
    def parallel(u: Tensor) -> Tensor:
        return ((u - POS) * X0).flatten(1).sum(1)

    full = guided_velocity(POS, NEG, 3.0)
    half = guided_velocity(POS, NEG, 3.0, orthogonal=0.5, x0_pos=X0)
    none = guided_velocity(POS, NEG, 3.0, orthogonal=1.0, x0_pos=X0)
    assert parallel(full).abs().min() > 0.1
    torch.testing.assert_close(parallel(half), 0.5 * parallel(full))
    torch.testing.assert_close(parallel(none), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(2 * half, full + none)


def test_teacher_calls_once_on_a_doubled_batch() -> None:
    calls = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, sigma))
        return torch.cat([POS, NEG]).to(torch.bfloat16)

    sigma = torch.tensor([0.9, 0.5, 0.2])
    teacher = guided_teacher(network, 4.0, interval=(0.3, 0.6), orthogonal=1.0)
    guided = teacher(X0, sigma)
    assert len(calls) == 1 and guided.dtype == torch.float32
    torch.testing.assert_close(calls[0][0], torch.cat([X0, X0]))
    torch.testing.assert_close(calls[0][1], torch.cat([sigma, sigma]))
    pos, neg = POS.bfloat16().float(), NEG.bfloat16().float()
    clean = X0 - sigma[:, None, None, None] * pos
    active = torch.tensor([False, True, False])
    torch.testing.assert_close(guided, guided_velocity(pos, neg, 4.0, active, 1.0, clean))


def test_interval_includes_its_bounds() -> None:
    sigma = torch.tensor([0.25, 0.5, 0.75, 0.2499, 0.7501])
    assert guidance_active(sigma, (0.25, 0.75)).tolist() == [True, True, True, False, False]
    assert guidance_active(sigma, (0.0, 1.0)).all()


def test_frames_are_guided_as_pictures_are() -> None:
    """(B, C, T, H, W): projections run over all of a sample's values."""
    pos, neg, x0 = (value.unflatten(3, (2, 3)) for value in (POS, NEG, X0))
    active = torch.tensor([True, False, True])
    found = guided_velocity(pos, neg, 3.0, active, 0.7, x0)
    torch.testing.assert_close(found.flatten(3), guided_velocity(POS, NEG, 3.0, active, 0.7, X0))
    sigma = torch.tensor([0.9, 0.5, 0.2])
    teacher = guided_teacher(lambda x, s: torch.cat([pos, neg]), 3.0, orthogonal=0.7)
    flat = guided_teacher(lambda x, s: torch.cat([POS, NEG]), 3.0, orthogonal=0.7)
    torch.testing.assert_close(teacher(x0, sigma).flatten(3), flat(X0, sigma))


def test_each_patch_keeps_the_prompts_norm() -> None:
    pos, neg = (torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    active = torch.tensor([True, False, True])
    found = guided_velocity(pos, neg, 4.0, active, norm_patch=2)
    plain = guided_velocity(pos, neg, 4.0, active)
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            here = (slice(None), slice(None), slice(row, row + 2), slice(column, column + 2))
            wanted, got, before = (u[here].flatten(1) for u in (pos, found, plain))
            torch.testing.assert_close(got.norm(dim=1), wanted.norm(dim=1))
            direction = before / before.norm(dim=1, keepdim=True)
            torch.testing.assert_close(got / got.norm(dim=1, keepdim=True), direction)
    torch.testing.assert_close(found[1], pos[1])
    assert not guided_velocity(
        torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), 4.0, norm_patch=2
    ).any()


def test_bad_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="one shape"):
        guided_velocity(POS, NEG[:2], 2.0)
    with pytest.raises(ValueError, match="needs x0_pos"):
        guided_velocity(POS, NEG, 2.0, orthogonal=0.5)
    with pytest.raises(ValueError, match=r"orthogonal in \[0, 1\]"):
        guided_velocity(POS, NEG, 2.0, orthogonal=2.0, x0_pos=X0)
    with pytest.raises(ValueError, match=r"low <= high, got \(0.6, 0.2\)"):
        guided_teacher(lambda x, sigma: x, 2.0, interval=(0.6, 0.2))
    with pytest.raises(ValueError, match=r"orthogonal in \[0, 1\]"):
        guided_teacher(lambda x, sigma: x, 2.0, orthogonal=-0.1)
